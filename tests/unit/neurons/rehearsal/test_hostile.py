"""Validators that mean no good: what each habit of `neurons.rehearsal.hostile` comes to at the miner."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import time
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest
from aiohttp import web

from neurons import logging_setup
from neurons.chain import Neuron
from neurons.miner.validators import dendrite as dendrites
from neurons.miner.validators.clock import ValidatorClocks
from neurons.miner.validators.dendrite import MAX_ANSWER_BYTES, NO_CONNECTION, ValidatorDendrite
from neurons.protocol import (
    DECLARATION,
    LARGEST_INTEGER,
    PullTask,
    SubmitResults,
    TextTask,
    make_submission,
)
from neurons.rehearsal import __main__ as rehearsal
from neurons.rehearsal import hostile as hostile_module
from neurons.rehearsal.hostile import HABITS, HostileValidator
from neurons.rehearsal.rules import Limits
from tests.support.answers import went
from tests.support.signatures import signature_is_valid
from tests.support.waiting import until

KEYPAIR = bt.Keypair.create_from_uri("//miner")
VALIDATOR = bt.Keypair.create_from_uri("//validator").ss58_address
TASK = TextTask(id="1", prompt="a red cube")


@contextlib.asynccontextmanager
async def hostile(kind: str) -> AsyncIterator[HostileValidator]:
    validator = HostileValidator(1, VALIDATOR, kind, Limits())
    serving = asyncio.create_task(validator.serve())
    try:
        await until(lambda: validator.started, every=0.001)
        yield validator
    finally:
        validator.stop()
        await serving


async def call(validator: HostileValidator, synapse: Any, seconds: float = 5) -> Any:
    axon = Neuron(1, validator.hotkey, "127.0.0.1", validator.port, 1e4, True).axon_info()
    async with ValidatorDendrite(KEYPAIR) as dendrite:
        return await dendrite.call(axon, synapse, timeout=seconds, deserialize=False)


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
        ("drops-connection", 502, None, "ClientPayloadError"),
        ("floods", 502, None, "larger than"),
        ("endless-headers", 502, None, ""),
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
        response = await call(validator, synapse.model_copy(), seconds=0.5 if status == 408 else 5)
        assert time.monotonic() - started < 3
    assert not response.is_success
    assert went(response)[:2] == (status, answered)
    assert message in went(response).message
    assert len(went(response).message) <= 500
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


async def test_a_host_that_is_gone_is_told_from_one_that_may_have_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packets to it are dropped, as the kernel drops those to a listener whose queue is full."""
    monkeypatch.setattr(dendrites, "CONNECT_TIMEOUT_S", 0.2)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(listener.getsockname())
        axon = Neuron(1, VALIDATOR, "127.0.0.1", listener.getsockname()[1], 1e4, True).axon_info()
        async with ValidatorDendrite(KEYPAIR) as dendrite:
            response = await dendrite.call(axon, submission(), timeout=5)
    assert went(response)[:2] == (NO_CONNECTION, None)


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
    assert not response.is_success
    assert went(response).answered == 403


# --- answers that are taken, and what is made of them


async def pull(kind: str) -> PullTask:
    async with hostile(kind) as validator:
        return await call(validator, PullTask())


async def submit(kind: str) -> SubmitResults:
    async with hostile(kind) as validator:
        return await call(validator, submission())


async def test_wrong_types_make_a_pull_fail_and_a_submission_answered() -> None:
    assert went(await pull("wrong-types")).status == 422
    for kind in ("wrong-types", "wrong-feedback"):
        answer = await submit(kind)
        assert answer.is_success
        assert (answer.feedback, answer.cooldown_until) == (None, 0)


async def test_an_unreadable_answer_to_a_submission_is_told_from_none() -> None:
    """With status 200 the validator has the result: it must not be handed in a second time."""
    answer = await submit("malformed-feedback")
    assert not answer.is_success
    assert went(answer).answered == 200


async def test_fields_that_are_not_the_validator_s_stay_as_they_are() -> None:
    pulled = await pull("overwrites")
    assert pulled.is_success
    assert (pulled.name, pulled.timeout, pulled.task) == ("PullTask", 5.0, None)
    sent = submission()
    async with hostile("overwrites") as validator:
        answer = await call(validator, sent)
    assert answer.is_success
    assert (answer.results, answer.signature) == (sent.results, sent.signature)
    assert answer.dendrite.hotkey == KEYPAIR.ss58_address


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cooldown-far", 4_000_000_000),
        ("cooldown-past", 1),
        ("cooldown-negative", -(10**9)),
        ("cooldown-huge", LARGEST_INTEGER),
    ],
)
async def test_cooldowns_come_through_within_bounds(kind: str, expected: int) -> None:
    assert (await submit(kind)).cooldown_until == expected
    async with hostile(kind) as validator:
        first, second = await call(validator, PullTask()), await call(validator, PullTask())
    assert first.task is not None
    assert second.task is None
    assert second.is_success
    assert second.cooldown_until == expected


async def test_feedback_that_is_not_a_number_counts_as_not_said() -> None:
    answer = await submit("feedback-nan")
    assert answer.is_success
    assert answer.feedback is not None
    assert (answer.feedback.task_fidelity_score, answer.feedback.current_miner_reward) == (0.0, 0.0)
    assert answer.cooldown_until == 0


async def test_a_text_without_utf8_is_a_malformed_answer() -> None:
    answer = await pull("prompt-surrogate")
    assert not answer.is_success
    assert "utf-8" in went(answer).message


async def test_a_clock_an_hour_ahead_refuses_who_does_not_know_it() -> None:
    assert went(await pull("clock-ahead")).status == 401
    assert (await pull("clock-behind")).task is not None
    clocks = ValidatorClocks()
    async with hostile("clock-ahead") as validator, ValidatorDendrite(KEYPAIR) as dendrite:
        dendrite.on_date, dendrite.seconds_ahead = clocks.answered, clocks.highest_offset
        axon = Neuron(1, VALIDATOR, "127.0.0.1", validator.port, 1e4, True).axon_info()
        for _ in range(3):
            assert (await dendrite.call(axon, PullTask(), timeout=1.0)).task is not None


# --- what a validator could make this miner do


class RecordingKeypair:
    """A keypair that remembers what it signed."""

    ss58_address = KEYPAIR.ss58_address

    def __init__(self) -> None:
        self.signed: list[bytes] = []

    def sign(self, message: bytes | str) -> bytes:
        self.signed.append(message if isinstance(message, bytes) else message.encode())
        return KEYPAIR.sign(message)


@pytest.mark.parametrize("kind", HABITS)
async def test_nothing_is_signed_but_requests_and_the_protocol_s_message(kind: str) -> None:
    keypair = RecordingKeypair()
    async with hostile(kind) as validator, ValidatorDendrite(keypair) as dendrite:  # type: ignore[arg-type]
        axon = Neuron(1, VALIDATOR, "127.0.0.1", validator.port, 1e4, True).axon_info()
        pulled = await dendrite.call(axon, PullTask(), timeout=0.5)
        if pulled.is_success and pulled.task is not None:
            result = make_submission(pulled.task, b"spz", VALIDATOR, keypair)  # type: ignore[arg-type]
            await dendrite.call(axon, result, timeout=0.5)
    request = re.compile(rf"\d+\.{KEYPAIR.ss58_address}\.{VALIDATOR}\.[0-9a-f-]{{36}}\.[0-9a-f]{{64}}".encode())
    ending = (VALIDATOR + KEYPAIR.ss58_address).encode()
    submissions = [message for message in keypair.signed if request.fullmatch(message) is None]
    assert len(keypair.signed) - len(submissions) >= 1
    assert all(m.startswith(DECLARATION.encode()) and m.endswith(ending) for m in submissions)


async def test_an_impostor_has_no_use_for_what_it_gets() -> None:
    """Whoever answers at a validator's address can have results made; they are signed for that validator alone."""
    async with hostile("impostor") as impostor:
        pulled = await call(impostor, PullTask())
        await call(impostor, make_submission(pulled.task, b"spz", impostor.hotkey, KEYPAIR))
        (stolen,) = impostor.submissions
    got = SubmitResults(**stolen)
    assert signature_is_valid(got, pulled.task.prompt, VALIDATOR, KEYPAIR.ss58_address)
    for other in ("//impostor", "//validator2"):
        keypair = bt.Keypair.create_from_uri(other)
        assert not signature_is_valid(got, pulled.task.prompt, keypair.ss58_address, KEYPAIR.ss58_address)
        assert not signature_is_valid(got, pulled.task.prompt, VALIDATOR, keypair.ss58_address)


async def test_neither_proxies_nor_cookies_nor_credentials_come_from_outside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login user password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    seen: list[dict[str, str]] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(dict(request.headers))
        return web.json_response({}, headers={"Set-Cookie": "track=me"})

    runner = web.AppRunner(web.Application())
    runner.app.router.add_post("/PullTask", handler)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    axon = Neuron(1, VALIDATOR, "127.0.0.1", runner.addresses[0][1], 1e4, True).axon_info()
    try:
        async with ValidatorDendrite(KEYPAIR) as dendrite:
            for _ in range(2):
                assert (await dendrite.call(axon, PullTask(), timeout=5)).is_success
    finally:
        await runner.cleanup()
    assert len(seen) == 2
    for headers in seen:
        assert not {"authorization", "proxy-authorization", "cookie"} & {name.lower() for name in headers}
        assert headers["Accept-Encoding"] == "identity"


async def test_a_rehearsal_of_days_keeps_few_results() -> None:
    most = hostile_module.KEPT_SUBMISSIONS
    async with hostile("impostor") as validator:
        for _ in range(most + 2):
            response = await call(validator, submission())
        assert len(validator.submissions) == most
    assert response.feedback.generations_within_the_window == most + 2


def test_the_rehearsal_knows_its_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rehearsal.parse(["--hostile", "floods", "malformed"]).hostile == ["floods", "malformed"]
    monkeypatch.setattr("sys.argv", ["rehearsal", "--hostile", "floods", "bites"])
    with pytest.raises(SystemExit, match="'bites' is none of all, never-answers, "):
        rehearsal.main()


@pytest.mark.parametrize("flag", ["--logging.file", "--state", "--truth"])
def test_a_file_that_the_rehearsal_can_not_write_is_named(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.pthread_sigmask", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["rehearsal", "--state", str(tmp_path), flag, "/proc/nowhere/file"])
    if flag != "--logging.file":
        monkeypatch.setattr(logging_setup, "configure", lambda _: None)
    with pytest.raises(SystemExit, match=r"^/proc/nowhere.*: No such file or directory$"):
        rehearsal.main()
