"""A submission's signature, checked as the protocol defines it."""

from __future__ import annotations

import base64
import binascii

import bittensor as bt

from neurons.protocol import SubmitResults, signed_message


def signature_is_valid(submission: SubmitResults, prompt: str, validator_hotkey: str, miner_hotkey: str) -> bool:
    """Whether `miner_hotkey` signed exactly this submission of `prompt` to `validator_hotkey`."""
    message = signed_message(submission.submit_time, prompt, validator_hotkey, miner_hotkey)
    try:
        signature = base64.b64decode(submission.signature, validate=True)
        return bool(bt.Keypair(ss58_address=miner_hotkey).verify(message, signature))
    except (binascii.Error, ValueError):
        return False
