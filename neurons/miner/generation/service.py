"""HTTP client of one generation service."""

from __future__ import annotations

import base64
import binascii
import json
import math
import string
import time
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

import aiohttp

from common.log_lines import SCORE_PARTS, quoted
from neurons.miner.assignment import USEFUL_AGE_S
from neurons.protocol import ImageTask, Task

MAX_PROMPT_CHARACTERS = 1024
MAX_PLY_BYTES = 512 << 20
MAX_HEALTH_BYTES = 1 << 20
# Upper limit: the pool gives up earlier on a task that was pulled some time ago.
REQUEST_TIMEOUT_S = USEFUL_AGE_S
CONNECT_TIMEOUT_S = 10.0
# The miner's requests are paused while people use the service.
PRIORITY = {"X-Priority": "background"}
HEALTH_TIMEOUT_S = 5.0
HEALTH_CONNECT_TIMEOUT_S = 3.0
# Less than the service's 5 s: a POST on a connection that it is just closing would be lost.
KEEP_ALIVE_S = 4.0
MAX_RETRY_AFTER_S = 60.0
DEFAULT_RETRY_AFTER_S = 5.0
# Statuses that depend on the task, so another attempt would get the same. Others below 500 come from a proxy.
OF_THE_TASK = (400, 413, 415, 422)
BUSY = (429, 503)
NO_CONNECTION = "not reachable (no connection in time)"


class GenerationFailed(Exception):
    """This task cannot be generated: another attempt would end the same way."""


class AttemptFailed(Exception):
    """The service failed at this task. Another attempt, or another service, may succeed.

    `endpoint`: which service, and `seconds`: how long it had the task.
    """

    def __init__(self, reason: str, endpoint: str = "", seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.endpoint = endpoint
        self.seconds = seconds


class EndpointUnavailable(Exception):
    """The service cannot be reached, or is busy for `seconds`. It is not the task's fault."""

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.seconds = seconds


@dataclass(frozen=True)
class Generated:
    """The service's answer: a PLY, or b"" when its own checks reject the result.

    `score`: the final score, computed as validators do; `parts`: its parts ("alignment", "iqa", "ssim", "lpips").
    `endpoint`: which service, and `seconds`: how long it had the task.
    """

    ply: bytes
    score: float | None
    seed: str
    rejected: str
    endpoint: str = ""
    seconds: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    scores: tuple[float | None, ...] = ()  # of several candidates; the requested seed's comes first

    @property
    def candidates(self) -> int:
        """The number of candidates of which this is the best."""
        return max(len(self.scores), 1)

    @property
    def first_score(self) -> float | None:
        """The score of the requested seed."""
        return self.scores[0] if self.scores else self.score


def prompt_problem(prompt: str) -> str | None:
    """Why a text prompt cannot be generated; None if it can."""
    if not 1 <= len(prompt) <= MAX_PROMPT_CHARACTERS:
        return f"{len(prompt)} characters, 1 to {MAX_PROMPT_CHARACTERS} are allowed"
    # Cc: control characters. Cs: lone surrogates, which have no UTF-8.
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in prompt):
        return "contains control characters"
    return None


class GenerationService:
    """One generation service at `url` (http://host:port). To be used as an async context manager.

    `endpoint` is its name in logs: the URL without user and password.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        parts = urlsplit(self._url)
        self.endpoint = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> GenerationService:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
        connector = aiohttp.TCPConnector(keepalive_timeout=KEEP_ALIVE_S)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def health(self) -> str | None:
        """The status in the service's /health, such as "ready"; None if it is reachable but answers late.

        Raises EndpointUnavailable.
        """
        assert self._session is not None
        try:
            timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S, sock_connect=HEALTH_CONNECT_TIMEOUT_S)
            async with self._session.get(f"{self._url}/health", timeout=timeout) as response:
                if response.status in (403, 421):  # the answer says why, and which flag would let us in
                    message = (await response.content.read(500)).decode(errors="replace")
                    raise EndpointUnavailable(f"refuses to answer ({response.status}): {quoted(message)}")
                body = json.loads(await _read(response, MAX_HEALTH_BYTES, "health"))
                return str(body["status"])[:40]
        except aiohttp.ConnectionTimeoutError as error:
            raise EndpointUnavailable(NO_CONNECTION) from error
        except TimeoutError:
            return None
        except (aiohttp.ClientError, GenerationFailed, ValueError, KeyError, TypeError, RecursionError) as error:
            raise EndpointUnavailable(f"not reachable ({type(error).__name__})") from error

    async def generate(self, task: Task, seed: int, candidates: int = 1, budget: float | None = None) -> Generated:
        """The splat of one task: the best of at most `candidates` that the service makes within `budget` seconds.

        Raises GenerationFailed, AttemptFailed or EndpointUnavailable.
        """
        assert self._session is not None
        form, started = _form(task, seed), time.monotonic()
        if candidates > 1:
            form.add_field("candidates", str(candidates))
            if budget is not None:
                form.add_field("budget_seconds", f"{budget:.3f}")

        def failed(reason: str) -> AttemptFailed:
            return AttemptFailed(reason, self.endpoint, time.monotonic() - started)

        try:
            async with self._session.post(f"{self._url}/generate/", data=form, headers=PRIORITY) as response:
                if response.status in BUSY:
                    raise EndpointUnavailable(f"busy ({response.status})", _retry_after(response))
                if response.status != 200:
                    message = (await response.content.read(500)).decode(errors="replace")
                    reason = f"service answered {response.status}: {quoted(message)}"
                    if response.status in OF_THE_TASK:
                        raise GenerationFailed(reason)
                    if response.status >= 500 or response.status == 408:
                        raise failed(reason)
                    raise EndpointUnavailable(reason)  # from a proxy in front of the service
                ply = await _read(response, MAX_PLY_BYTES, "PLY")
                headers = response.headers
                if not ply and headers.get("X-Hopeless") == "1":
                    raise GenerationFailed(quoted(headers.get("X-Rejected", "no seed gives a splat")))
                return Generated(
                    ply,
                    _score(headers.get("X-Score")),
                    headers.get("X-Seed", "?"),
                    headers.get("X-Rejected", ""),
                    self.endpoint,
                    time.monotonic() - started,
                    _parts(headers.get("X-Score-Parts")),
                    _scores(headers.get("X-Scores"))[:candidates],
                )
        except aiohttp.ConnectionTimeoutError as error:
            raise EndpointUnavailable(NO_CONNECTION) from error
        except TimeoutError as error:
            raise failed(f"no answer within {REQUEST_TIMEOUT_S:.0f} s") from error
        except aiohttp.ClientError as error:
            raise EndpointUnavailable(f"not reachable ({type(error).__name__})") from error


def _form(task: Task, seed: int) -> aiohttp.FormData:
    form = aiohttp.FormData({"seed": str(seed)})
    if isinstance(task, ImageTask):
        try:
            encoded = task.prompt.encode().translate(None, string.whitespace.encode())  # MIME breaks base64 into lines
            image = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise GenerationFailed(f"image prompt is not base64 ({error})") from error
        form.add_field("prompt_image_file", image, filename="prompt", content_type="application/octet-stream")
        return form
    prompt = " ".join(task.prompt.split())  # the service refuses line breaks
    problem = prompt_problem(prompt)
    if problem is not None:
        raise GenerationFailed(f"prompt {problem}")
    form.add_field("prompt", prompt)
    return form


async def _read(response: aiohttp.ClientResponse, limit: int, what: str) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_chunked(1 << 20):
        body += chunk
        if len(body) > limit:
            raise GenerationFailed(f"{what} is larger than {limit} bytes")
    return bytes(body)


def _retry_after(response: aiohttp.ClientResponse) -> float:
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return DEFAULT_RETRY_AFTER_S
    return min(max(seconds, 0.1), MAX_RETRY_AFTER_S) if math.isfinite(seconds) else DEFAULT_RETRY_AFTER_S


def _parts(header: str | None) -> dict[str, float]:
    """The measured parts of the score; values that are not numbers are left out."""
    try:
        values = json.loads(header or "{}")
        return {part: number for part in SCORE_PARTS if (number := _score(str(values.get(part)))) is not None}
    except (ValueError, AttributeError, RecursionError):
        return {}


def _scores(header: str | None) -> tuple[float | None, ...]:
    try:
        return tuple(_score(str(score)) for _, score in json.loads(header or "[]"))
    except (ValueError, TypeError, RecursionError):
        return ()


def _score(header: str | None) -> float | None:
    try:
        score = float(header) if header is not None else math.nan
    except ValueError:
        return None
    return score if math.isfinite(score) else None
