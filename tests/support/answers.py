"""How a call to an axon went."""

from __future__ import annotations

from typing import NamedTuple

import bittensor as bt


class Went(NamedTuple):
    status: int | None  # the caller's word: what came of the call
    answered: int | None  # the axon's word, None when it did not answer
    message: str


def went(synapse: bt.Synapse) -> Went:
    assert synapse.dendrite is not None
    assert synapse.axon is not None
    return Went(synapse.dendrite.status_code, synapse.axon.status_code, str(synapse.dendrite.status_message))
