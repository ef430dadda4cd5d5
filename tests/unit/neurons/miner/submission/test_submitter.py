"""What log lines and records say of a call."""

from __future__ import annotations

import bittensor as bt

from neurons.miner.submission.submitter import status_of
from neurons.protocol import PullTask


def test_the_status_of_a_call_is_one_line() -> None:
    answer = PullTask(dendrite=bt.TerminalInfo(status_code=422, status_message="not\nfor you"))
    assert status_of(answer) == r"422 'not\nfor you'"
    answer.dendrite = None
    assert status_of(answer) == "no answer"
