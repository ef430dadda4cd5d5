"""What a validator checks in a submission before it spends time on scoring it."""

from __future__ import annotations

import base64
import binascii

import numpy as np

from neurons import ply, spz
from neurons.protocol import COMPRESSION_SPZ, SubmitResults, Task, signature_is_valid

MIN_GAUSSIANS = 7_000
INVISIBLE_OPACITY = 0.001
MAX_INVISIBLE_SHARE = 0.8
MAX_RESULT_CHARACTERS = 64 << 20
# The largest x, y or z that packing can leave in a quaternion without rotation: zero lies between two bytes.
IDENTITY_TOLERANCE = 1 / 127.5


class Unacceptable(ValueError):
    """The submission gets score 0; the message says why."""


def check_submission(submission: SubmitResults, task: Task, validator_hotkey: str, miner_hotkey: str) -> None:
    """Signature, encoding and the hard rejections. Raises Unacceptable."""
    if not signature_is_valid(submission, task.prompt, validator_hotkey, miner_hotkey):
        raise Unacceptable("signature does not match")
    if submission.compression != COMPRESSION_SPZ or submission.data_format != "ply":
        raise Unacceptable(f"compression {submission.compression} of {submission.data_format!r}, expected spz of ply")
    if len(submission.results) > MAX_RESULT_CHARACTERS:
        raise Unacceptable(f"{len(submission.results)} characters, the limit is {MAX_RESULT_CHARACTERS}")
    try:
        check_splat(ply.read(spz.decompress(base64.b64decode(submission.results, validate=True))))
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
