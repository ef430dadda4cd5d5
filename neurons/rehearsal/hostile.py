"""Validators that misbehave, for practice and for tests: what a miner must get along with on a public network.

None of them has an axon, or the key that the metagraph names: each is an HTTP server on loopback with one bad habit.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import json
import logging
import socket
import time
import uuid
import zlib
from collections import deque
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any, NamedTuple

from aiohttp import web

from common.log_lines import quoted
from neurons.rehearsal.rules import Limits

FLOOD_BYTES = 50 << 20
LATE_S = 60.0
CLOCK_OFFSET_S = 3600
# How much older than its own clock a real axon accepts a request, in seconds on top of the request's time-out.
NONCE_AGE_S = 4.0
# A submission of 64 MB, as the well-behaved accept.
MAX_REQUEST_BYTES = 96 << 20
KEPT_SUBMISSIONS = 16

log = logging.getLogger(__name__)

Fields = dict[str, Any]


class HostileValidator:
    """Serves PullTask and SubmitResults on a loopback port of the system's choice, and misbehaves in one way."""

    def __init__(self, uid: int, hotkey: str, kind: str, limits: Limits) -> None:
        self.uid = uid
        self.hotkey = hotkey
        self.kind = kind
        self.limits = limits
        self.pulls = 0
        self.tasks = 0
        self.free_at = 0.0  # by its own clock: when it may be asked again
        self.early_pulls = 0
        self.submissions: deque[Fields] = deque(maxlen=KEPT_SUBMISSIONS)
        self.accepted = 0
        self.started = False
        self._habit = HABITS[kind]
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._stopping = asyncio.Event()

    async def serve(self) -> None:
        """Misbehaves until `stop`."""
        self._loop = asyncio.get_running_loop()
        app = web.Application(client_max_size=MAX_REQUEST_BYTES)
        app.router.add_post("/PullTask", self._pull_task)
        app.router.add_post("/SubmitResults", self._submit_results)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.SockSite(runner, self._socket).start()
            self.started = True
            await self._stopping.wait()
        finally:
            await runner.cleanup()

    def stop(self) -> None:
        """May be called from another thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self._stopping.set)

    def new_task(self, **fields: Any) -> Fields:
        """The fields of a task, with these in place of the usual ones."""
        self.tasks += 1
        return {"type": "text", "id": str(uuid.uuid4()), "prompt": "a chair that nobody pays for", **fields}

    def cooldown_until(self) -> int:
        """Unix seconds by which a miner may pull again, as the rules have it."""
        return int(time.time() + self.limits.task_cooldown) + 1

    async def _pull_task(self, request: web.Request) -> web.StreamResponse:
        self.pulls += 1
        log.info("[%d] %s: pull %d", self.uid, self.kind, self.pulls)
        return await self._habit.pull(self, request)

    async def _submit_results(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.submissions.append(body)
        log.info("[%d] %s: submission of %s", self.uid, self.kind, quoted(body["task_id"]))
        return await self._habit.submit(self, request)


Handler = Callable[[HostileValidator, web.Request], Awaitable[web.StreamResponse]]


class Habit(NamedTuple):
    """What one kind of validator answers to pulls and to submissions."""

    pull: Handler
    submit: Handler


def _answer(fields: Fields, **headers: str) -> web.Response:
    # Unlike web.json_response, and like no real axon, lets NaN through.
    return web.Response(text=json.dumps(fields), content_type="application/json", headers=headers)


def _says(**fields: Any) -> Handler:
    """Answers with these fields."""

    async def handler(validator: HostileValidator, _: web.Request) -> web.StreamResponse:
        return _answer(fields)

    return handler


def _hands_out(pull_fields: Fields | None = None, **task: Any) -> Handler:
    """Answers with a task that has these fields."""

    async def handler(validator: HostileValidator, _: web.Request) -> web.StreamResponse:
        return _answer({"task": validator.new_task(**task), **(pull_fields or {})})

    return handler


async def _accepts(validator: HostileValidator, _: web.Request) -> web.StreamResponse:
    validator.accepted += 1
    feedback = {"task_fidelity_score": 0.7, "generations_within_the_window": validator.accepted}
    return _answer({"feedback": feedback, "cooldown_until": validator.cooldown_until()})


# --- on the way


async def _never(_: HostileValidator, __: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def _late(validator: HostileValidator, request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(LATE_S)
    return await _hands_out()(validator, request)


async def _drops(_: HostileValidator, request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"task": {"id": "1", "pro')
    assert request.transport is not None
    request.transport.abort()
    return response


async def _fails(_: HostileValidator, __: web.Request) -> web.StreamResponse:
    return web.json_response({"message": "\x1b[2JInternal\nServer Error " + "!" * 10_000}, status=500)


async def _stream(request: web.Request, chunk: bytes, size: int, **headers: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json", **headers})
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        for _ in range(size // len(chunk)):
            await response.write(chunk)
    return response


async def _floods(_: HostileValidator, request: web.Request) -> web.StreamResponse:
    return await _stream(request, b" " * (1 << 16), FLOOD_BYTES)


async def _trickles(_: HostileValidator, request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.1)
    return response


async def _heads_without_end(_: HostileValidator, request: web.Request) -> web.StreamResponse:
    transport = request.transport
    assert transport is not None
    transport.write(b"HTTP/1.1 200 OK\r\n")
    while not transport.is_closing():
        transport.write(b"".join(b"X-%d: %s\r\n" % (i, b"x" * 1000) for i in range(100)))
        await asyncio.sleep(0.001)
    raise ConnectionResetError


async def _sends_a_bomb(_: HostileValidator, __: web.Request) -> web.StreamResponse:
    # Half a gigabyte of spaces in 0.5 MB, as gzip files may follow one another.
    body = gzip.compress(b" " * (1 << 20)) * 512
    return web.Response(body=body, headers={"Content-Encoding": "gzip", "Content-Type": "application/json"})


async def _redirects(_: HostileValidator, request: web.Request) -> web.StreamResponse:
    # To another host, as a server on this machine sees it.
    raise web.HTTPTemporaryRedirect(f"http://localhost:{request.url.port}/elsewhere")


# --- content


async def _names_a_slow_codec(_: HostileValidator, __: web.Request) -> web.StreamResponse:
    # To decode this as punycode takes time that grows with the square of the length: hours.
    return web.Response(body=b"-" + b"a" * (8 << 20), headers={"Content-Type": "application/json; charset=punycode"})


async def _malformed(_: HostileValidator, __: web.Request) -> web.StreamResponse:
    return web.Response(text='{"task": {"id": "1", "prompt": "a cha', content_type="application/json")


async def _nests(_: HostileValidator, __: web.Request) -> web.StreamResponse:
    return web.Response(text='{"task":' + "[" * 1_000_000, content_type="application/json")


async def _lists(_: HostileValidator, __: web.Request) -> web.StreamResponse:
    return web.Response(body=b'{"list": [' + b"[]," * 5_000_000 + b"1]}", content_type="application/json")


async def _same_id(validator: HostileValidator, _: web.Request) -> web.StreamResponse:
    return _answer({"task": validator.new_task(id="always-this", prompt=f"object number {validator.tasks}")})


async def _feedback_is_nan(_: HostileValidator, __: web.Request) -> web.StreamResponse:
    values = {"task_fidelity_score": float("nan"), "current_miner_reward": float("inf")}
    return _answer({"feedback": values, "cooldown_until": float("nan")})


def _clock(offset: int) -> Habit:
    """Keeps the rules, by a clock that is off. As in a real axon, first requests from the past are refused."""
    known: set[str] = set()

    async def pull(validator: HostileValidator, request: web.Request) -> web.StreamResponse:
        now = time.time() + offset
        date = formatdate(now, usegmt=True)
        sent = int(request.headers["bt_header_dendrite_nonce"]) / 1e9
        sender = request.headers["bt_header_dendrite_uuid"]
        if sender not in known and sent < now - NONCE_AGE_S - float(request.headers["timeout"]):
            return web.json_response({"message": "Nonce is too old"}, status=401, headers={"Date": date})
        known.add(sender)
        validator.early_pulls += now < validator.free_at
        return _answer({"task": validator.new_task()}, Date=date)

    async def submit(validator: HostileValidator, request: web.Request) -> web.StreamResponse:
        validator.free_at = validator.cooldown_until() + offset
        fields = {"feedback": {"task_fidelity_score": 0.7}, "cooldown_until": validator.free_at}
        return _answer(fields, Date=formatdate(time.time() + offset, usegmt=True))

    return Habit(pull, submit)


def _cooldown(value: int) -> Habit:
    """Every other pull, and every submission, is answered with this `cooldown_until`."""

    async def pull(validator: HostileValidator, request: web.Request) -> web.StreamResponse:
        if validator.pulls % 2 == 0:
            return _answer({"task": None, "cooldown_until": value})
        return await _hands_out()(validator, request)

    return Habit(pull, _says(feedback={"task_fidelity_score": 0.7}, cooldown_until=value))


def _image_bomb() -> str:
    """Base64 of a PNG that claims 60,000 x 60,000 pixels: 3.6 GB in memory, a few hundred bytes here."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (60_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    pixels = zlib.compress(bytes(60_001) * 10)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return base64.b64encode(png).decode()


HABITS: dict[str, Habit] = {
    "never-answers": Habit(_never, _never),
    "answers-late": Habit(_late, _late),
    "drops-connection": Habit(_drops, _drops),
    "fails": Habit(_fails, _fails),
    "floods": Habit(_floods, _floods),
    "trickles": Habit(_trickles, _trickles),
    "endless-headers": Habit(_heads_without_end, _heads_without_end),
    "gzip-bomb": Habit(_sends_a_bomb, _sends_a_bomb),
    "redirects": Habit(_redirects, _redirects),
    "slow-codec": Habit(_names_a_slow_codec, _names_a_slow_codec),
    "malformed": Habit(_malformed, _malformed),
    "keeps-silent-on-results": Habit(_hands_out(), _never),
    "drops-results": Habit(_hands_out(), _drops),
    "fails-on-results": Habit(_hands_out(), _fails),
    "malformed-feedback": Habit(_hands_out(), _malformed),
    "nested": Habit(_nests, _nests),
    "many-values": Habit(_lists, _lists),
    "wrong-types": Habit(
        _says(task=3, cooldown_until="never", validation_threshold=[]), _says(feedback="good", cooldown_until={})
    ),
    "wrong-feedback": Habit(_hands_out(), _says(feedback="good", cooldown_until={})),
    "overwrites": Habit(
        _says(dendrite=None, axon=None, name=[], timeout="long"), _says(dendrite=None, results=3, signature=None)
    ),
    "cooldown-far": _cooldown(4_000_000_000),
    "cooldown-past": _cooldown(1),
    "cooldown-negative": _cooldown(-(10**9)),
    "cooldown-huge": _cooldown(10**300),
    "threshold-2": Habit(_hands_out({"validation_threshold": 2.0}), _accepts),
    "threshold-nan": Habit(_hands_out({"validation_threshold": float("nan")}), _accepts),
    "prompt-1mb": Habit(_hands_out(prompt="x" * (1 << 20)), _accepts),
    "prompt-escapes": Habit(
        _hands_out(prompt="a cube\r\nforged line \x1b[2J\x9b\u2028", id="\n\x1b]0;title"), _accepts
    ),
    "prompt-empty": Habit(_hands_out(prompt=""), _accepts),
    "prompt-surrogate": Habit(_hands_out(prompt="\ud800"), _accepts),
    "image-is-none": Habit(_hands_out(type="image", prompt=base64.b64encode(b"/etc/passwd").decode()), _accepts),
    "image-bomb": Habit(_hands_out(type="image", prompt=_image_bomb()), _accepts),
    "same-id": Habit(_same_id, _accepts),
    "feedback-nan": Habit(_hands_out(), _feedback_is_nan),
    "impostor": Habit(_hands_out(), _accepts),
    "clock-ahead": _clock(CLOCK_OFFSET_S),
    "clock-behind": _clock(-CLOCK_OFFSET_S),
}
