"""HTTP client of the generation service."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import math
import unicodedata
from dataclasses import dataclass

import aiohttp

from neurons.logging_setup import quoted
from neurons.protocol import ImageTask, Task

MAX_PROMPT_CHARACTERS = 1024
MAX_PLY_BYTES = 512 << 20
REQUEST_TIMEOUT_S = 900.0
HEALTH_TIMEOUT_S = 5.0
HEALTH_INTERVAL_S = 5.0
# How long one task waits for a service that is busy or gone before the task is let go.
UNAVAILABLE_LIMIT_S = 600.0
MAX_RETRY_AFTER_S = 60.0
DEFAULT_RETRY_AFTER_S = 5.0

log = logging.getLogger(__name__)


class GenerationFailed(Exception):
    """This task can not be generated; another attempt would end the same way."""


class ServiceUnavailable(Exception):
    """The service was busy or not there for too long; the task itself is fine."""


@dataclass(frozen=True)
class Generated:
    """The service's answer: a PLY, or b"" when its own checks reject the result."""

    ply: bytes
    score: float | None
    seed: str
    rejected: str


def prompt_problem(prompt: str) -> str | None:
    """What makes a text prompt unfit for generation; None when nothing does."""
    if not 1 <= len(prompt) <= MAX_PROMPT_CHARACTERS:
        return f"{len(prompt)} characters, 1 to {MAX_PROMPT_CHARACTERS} are allowed"
    # Cc: control characters. Cs: lone surrogates, which have no UTF-8.
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in prompt):
        return "contains control characters"
    return None


class GenerationService:
    """One generation service at `endpoint` (http://host:port). To be used as an async context manager."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._session: aiohttp.ClientSession | None = None
        self._stopping = False
        self.ready = asyncio.Event()

    async def __aenter__(self) -> GenerationService:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, sock_connect=10)
        self._session = aiohttp.ClientSession(timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    def stop_waiting(self) -> None:
        """From now on a service that is busy or gone raises ServiceUnavailable at once."""
        self._stopping = True

    async def watch(self) -> None:
        """Keeps `ready` as the service's /health says, for as long as it runs."""
        last = ""
        while True:
            status = await self._health()
            if status == "ready":
                self.ready.set()
            else:
                self.ready.clear()
            if status != last:
                level = logging.INFO if status == "ready" else logging.WARNING
                log.log(level, "Generation service at %s: %s", self._endpoint, status)
                last = status
            await asyncio.sleep(HEALTH_INTERVAL_S)

    async def _health(self) -> str:
        assert self._session is not None
        try:
            timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
            async with self._session.get(f"{self._endpoint}/health", timeout=timeout) as response:
                body = await response.json()
                return str(body["status"])[:40]
        except TimeoutError:
            # A service deep in its work answers late, and is there all the same.
            return "ready" if self.ready.is_set() else "not answering"
        except (aiohttp.ClientError, ValueError, KeyError, TypeError) as error:
            return f"not reachable ({type(error).__name__})"

    async def generate(self, task: Task) -> Generated:
        """The splat of one task. Waits out a busy or restarting service, up to UNAVAILABLE_LIMIT_S.

        Raises GenerationFailed or ServiceUnavailable.
        """
        deadline = asyncio.get_running_loop().time() + UNAVAILABLE_LIMIT_S
        while True:
            try:
                return await self._request(task)
            except _TryLater as busy:
                left = deadline - asyncio.get_running_loop().time()
                if self._stopping or busy.seconds > left:
                    raise ServiceUnavailable(str(busy)) from busy
                log.warning("Generation service: %s; next attempt in %.0f s", busy, busy.seconds)
                await asyncio.sleep(busy.seconds)

    async def _request(self, task: Task) -> Generated:
        assert self._session is not None
        try:
            async with self._session.post(f"{self._endpoint}/generate/", data=_form(task)) as response:
                if response.status == 503:
                    raise _TryLater("busy (503)", _retry_after(response))
                if response.status != 200:
                    message = (await response.content.read(500)).decode(errors="replace")
                    raise GenerationFailed(f"service answered {response.status}: {quoted(message)}")
                ply = await _read(response)
                headers = response.headers
                return Generated(
                    ply, _score(headers.get("X-Score")), headers.get("X-Seed", "?"), headers.get("X-Rejected", "")
                )
        except TimeoutError as error:
            raise GenerationFailed(f"no answer within {REQUEST_TIMEOUT_S:.0f} s") from error
        except aiohttp.ClientError as error:
            raise _TryLater(f"not reachable ({type(error).__name__})", DEFAULT_RETRY_AFTER_S) from error


class _TryLater(Exception):
    def __init__(self, reason: str, seconds: float) -> None:
        super().__init__(reason)
        self.seconds = seconds


def _form(task: Task) -> aiohttp.FormData:
    if isinstance(task, ImageTask):
        try:
            image = base64.b64decode(task.prompt, validate=True)
        except (binascii.Error, ValueError) as error:
            raise GenerationFailed(f"image prompt is not base64 ({error})") from error
        form = aiohttp.FormData()
        form.add_field("prompt_image_file", image, filename="prompt", content_type="application/octet-stream")
        return form
    problem = prompt_problem(task.prompt)
    if problem is not None:
        raise GenerationFailed(f"prompt {problem}")
    return aiohttp.FormData({"prompt": task.prompt})


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_chunked(1 << 20):
        body += chunk
        if len(body) > MAX_PLY_BYTES:
            raise GenerationFailed(f"PLY is larger than {MAX_PLY_BYTES} bytes")
    return bytes(body)


def _retry_after(response: aiohttp.ClientResponse) -> float:
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return DEFAULT_RETRY_AFTER_S
    return min(max(seconds, 0.1), MAX_RETRY_AFTER_S) if math.isfinite(seconds) else DEFAULT_RETRY_AFTER_S


def _score(header: str | None) -> float | None:
    try:
        score = float(header) if header is not None else math.nan
    except ValueError:
        return None
    return score if math.isfinite(score) else None
