"""Validators that mean no good: what each habit of `neurons.rehearsal.hostile` comes to at the miner."""

from __future__ import annotations

import asyncio
import logging
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import bittensor as bt
import pytest

from neurons.chain import Neuron
from neurons.miner.dendrite import MAX_ANSWER_BYTES, ValidatorDendrite
from neurons.protocol import LARGEST_INTEGER, PullTask, SubmitResults, TextTask, make_submission
from neurons.rehearsal.hostile import HABITS, HostileValidator
from neurons.rehearsal.rules import Limits

KEYPAIR = bt.Keypair.create_from_uri("//miner")
VALIDATOR = bt.Keypair.create_from_uri("//validator").ss58_address
TASK = TextTask(id="1", prompt="a red cube")


@asynccontextmanager
async def hostile(kind: str) -> AsyncIterator[HostileValidator]:
    validator = HostileValidator(1, VALIDATOR, kind, Limits())
    serving = asyncio.create_task(validator.serve())
    try:
        while not validator.started:
            await asyncio.sleep(0.001)
        yield validator
    finally:
        validator.stop()
        await serving


async def call(validator: HostileValidator, synapse: Any, timeout: float = 5) -> Any:
    axon = Neuron(1, validator.hotkey, "127.0.0.1", validator.port, 1e4, True).axon_info()
    async with ValidatorDendrite(KEYPAIR) as dendrite:
        return await dendrite.call(axon, synapse, timeout=timeout, deserialize=False)


def submission(result: bytes = b"spz") -> SubmitResults:
    return make_submission(TASK, result, VALIDATOR, KEYPAIR)


# --- on the way: no answer, or none that is taken


@pytest.mark.parametrize("synapse", [PullTask(), submission()], ids=["pull", "submission"])
@pytest.mark.parametrize(
    ("kind", "status", "answered", "message"),
    [
        ("never-answers", 408, None, "no answer within"),
        ("answers-late", 408, None, "no answer within"),
        ("trickles", 408, None, "no answer within"),
        ("drops-connection", 503, None, "ClientPayloadError"),
        ("floods", 503, None, "larger than"),
        ("endless-headers", 503, None, ""),
        ("fails", 500, 500, "Server Error"),
        ("redirects", 307, 307, ""),
        ("gzip-bomb", 422, 200, "malformed"),
        ("slow-codec", 422, 200, "malformed"),
        ("malformed", 422, 200, "malformed"),
        ("nested", 422, 200, "malformed"),
        ("many-values", 422, 200, "malformed"),
    ],
)
async def test_what_is_no_answer(kind: str, status: int, answered: int | None, message: str, synapse: Any) -> None:
    async with hostile(kind) as validator:
        started = time.monotonic()
        response = await call(validator, synapse.model_copy(), timeout=0.5 if status == 408 else 5)
        assert time.monotonic() - started < 3
    assert not response.is_success
    assert (response.dendrite.status_code, response.axon.status_code) == (status, answered)
    assert message in response.dendrite.status_message
    assert len(response.dendrite.status_message) <= 500
    assert validator.pulls + len(validator.submissions) == 1  # a redirect is not followed


@pytest.mark.parametrize("kind", ["floods", "gzip-bomb", "endless-headers", "slow-codec", "nested", "many-values"])
async def test_answers_cost_bounded_memory(kind: str) -> None:
    async with hostile(kind) as validator:
        tracemalloc.start()
        try:
            response = await call(validator, PullTask())
            assert tracemalloc.get_traced_memory()[1] < 4 * MAX_ANSWER_BYTES
        finally:
            tracemalloc.stop()
    assert not response.is_success


async def test_an_upload_that_is_not_read_is_not_waited_for() -> None:
    """A refusal before the result is sent must not block what comes next."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"message": "No"}'
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        await reading_ends.wait()
        writer.close()

    reading_ends = asyncio.Event()
    server = await asyncio.start_server(refuse, "127.0.0.1", 0, limit=1 << 16)
    axon = Neuron(1, VALIDATOR, "127.0.0.1", server.sockets[0].getsockname()[1], 1e4, True).axon_info()
    async with server, ValidatorDendrite(KEYPAIR) as dendrite:
        started = time.monotonic()
        response = await dendrite.call(axon, submission(bytes(12 << 20)), timeout=5)
        reading_ends.set()
        assert time.monotonic() - started < 3
    assert not response.is_success and response.axon.status_code == 403
