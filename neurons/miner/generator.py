"""HTTP client of one generation service."""

from __future__ import annotations

import base64
import binascii
import json
import math
import unicodedata
from dataclasses import dataclass

import aiohttp

from neurons.logging_setup import quoted
from neurons.protocol import ImageTask, Task

MAX_PROMPT_CHARACTERS = 1024
MAX_PLY_BYTES = 512 << 20
MAX_HEALTH_BYTES = 1 << 20
REQUEST_TIMEOUT_S = 900.0
CONNECT_TIMEOUT_S = 10.0
HEALTH_TIMEOUT_S = 5.0
MAX_RETRY_AFTER_S = 60.0
DEFAULT_RETRY_AFTER_S = 5.0


class GenerationFailed(Exception):
    """This task can not be generated; another attempt would end the same way."""


class AttemptFailed(Exception):
    """The service failed at this task; another attempt, or another service, may do better."""


class EndpointUnavailable(Exception):
    """The service is not there, or (with `seconds`) asks to be left alone that long. The task itself is fine."""

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.seconds = seconds


@dataclass(frozen=True)
class Generated:
    """The service's answer: a PLY, or b"" when its own checks reject the result."""

    ply: bytes
    score: float | None
    seed: str
    rejected: str
    endpoint: str = ""


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
        self.endpoint = endpoint.rstrip("/")
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> GenerationService:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
        self._session = aiohttp.ClientSession(timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def health(self) -> str | None:
        """What the service's /health says, "ready" when it can work; None when it is there but answers late.

        Raises EndpointUnavailable.
        """
        assert self._session is not None
        try:
            timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
            async with self._session.get(f"{self.endpoint}/health", timeout=timeout) as response:
                body = json.loads(await _read(response, MAX_HEALTH_BYTES, "health"))
                return str(body["status"])[:40]
        except TimeoutError:
            return None
        except (aiohttp.ClientError, GenerationFailed, ValueError, KeyError, TypeError) as error:
            raise EndpointUnavailable(f"not reachable ({type(error).__name__})") from error

    async def generate(self, task: Task, seed: int) -> Generated:
        """The splat of one task. Raises GenerationFailed, AttemptFailed or EndpointUnavailable."""
        assert self._session is not None
        form = _form(task, seed)
        try:
            async with self._session.post(f"{self.endpoint}/generate/", data=form) as response:
                if response.status == 503:
                    raise EndpointUnavailable("busy (503)", _retry_after(response))
                if response.status != 200:
                    message = (await response.content.read(500)).decode(errors="replace")
                    failure = AttemptFailed if response.status >= 500 else GenerationFailed
                    raise failure(f"service answered {response.status}: {quoted(message)}")
                ply = await _read(response, MAX_PLY_BYTES, "PLY")
                headers = response.headers
                return Generated(
                    ply,
                    _score(headers.get("X-Score")),
                    headers.get("X-Seed", "?"),
                    headers.get("X-Rejected", ""),
                    self.endpoint,
                )
        except TimeoutError as error:
            raise AttemptFailed(f"no answer within {REQUEST_TIMEOUT_S:.0f} s") from error
        except aiohttp.ClientError as error:
            raise EndpointUnavailable(f"not reachable ({type(error).__name__})") from error


def _form(task: Task, seed: int) -> aiohttp.FormData:
    form = aiohttp.FormData({"seed": str(seed)})
    if isinstance(task, ImageTask):
        try:
            image = base64.b64decode(task.prompt, validate=True)
        except (binascii.Error, ValueError) as error:
            raise GenerationFailed(f"image prompt is not base64 ({error})") from error
        form.add_field("prompt_image_file", image, filename="prompt", content_type="application/octet-stream")
        return form
    problem = prompt_problem(task.prompt)
    if problem is not None:
        raise GenerationFailed(f"prompt {problem}")
    form.add_field("prompt", task.prompt)
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


def _score(header: str | None) -> float | None:
    try:
        score = float(header) if header is not None else math.nan
    except ValueError:
        return None
    return score if math.isfinite(score) else None
