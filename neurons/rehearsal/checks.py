"""What a submission is checked for: its signature by the validator, the splat by the service that scores it."""

from __future__ import annotations

import base64
import binascii

import bittensor as bt
import numpy as np

from common import ply, spz
from neurons.protocol import SubmitResults, Task, signed_message

MIN_GAUSSIANS = 7_000
INVISIBLE_OPACITY = 0.001
MAX_INVISIBLE_SHARE = 0.8
MAX_RESULT_CHARACTERS = 64 << 20
# The largest x, y or z that packing can leave in a quaternion without rotation: zero lies between two bytes.
IDENTITY_TOLERANCE = 1 / 127.5


class Unacceptable(ValueError):
    """The submission gets score 0; the message says why."""


def signature_matches(submission: SubmitResults, task: Task, validator_hotkey: str, miner_hotkey: str) -> bool:
    """Whether the miner signed this submission. Raises ValueError for what is no signature at all: a validator's axon
    answers 500 to that, and nothing else happens.
    """
    message = signed_message(submission.submit_time, task.prompt, validator_hotkey, miner_hotkey)
    signature = base64.b64decode(submission.signature, validate=True)
    return bool(bt.Keypair(ss58_address=miner_hotkey).verify(message, signature))


def check_results(results: str) -> None:
    """Encoding and hard rejections of a splat (base64 of `.spz`). Raises Unacceptable."""
    if len(results) > MAX_RESULT_CHARACTERS:
        raise Unacceptable(f"{len(results)} characters, the limit is {MAX_RESULT_CHARACTERS}")
    try:
        check_splat(ply.read(spz.decompress(base64.b64decode(results, validate=True))))
    except binascii.Error as error:
        raise Unacceptable(f"results are not base64: {error}") from error
    except ValueError as error:
        raise Unacceptable(str(error)) from error


def check_splat(vertices: ply.Vertices) -> None:
    """The hard rejections. Raises Unacceptable."""
    count = len(vertices.table)
    if count < MIN_GAUSSIANS:
        raise Unacceptable(f"{count} Gaussians, at least {MIN_GAUSSIANS} are required")
    opacities = 1 / (1 + np.exp(-vertices.block("opacity").astype(np.float64)))
    invisible = float((opacities < INVISIBLE_OPACITY).mean())
    if invisible > MAX_INVISIBLE_SHARE:
        raise Unacceptable(f"{invisible:.0%} of the Gaussians are invisible, the limit is {MAX_INVISIBLE_SHARE:.0%}")
    if (np.abs(vertices.block("rot_1", "rot_2", "rot_3")) <= IDENTITY_TOLERANCE).all():
        raise Unacceptable("all rotations are identity")
