"""Client of the scoring endpoints that validators use: POST /validate_txt_to_3d_ply/ and /validate_img_to_3d_ply/."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Any, Protocol

import aiohttp

from common.log_lines import quoted
from neurons.protocol import COMPRESSION_SPZ, ImageTask, Task
from neurons.rehearsal.checks import Unacceptable, check_results

# aiohttp's default, which the public validator keeps.
SCORING_LIMIT_S = 300.0
# This service is busy with the miner's tasks as well, which a real validator's is not.
BUSY = (429, 503)
RETRY_S = 3.0
PRIORITY = {"X-Priority": "background"}  # as the tasks that are scored: who asks in person goes first

log = logging.getLogger(__name__)


class Scoring(Protocol):
    """Who scores results: a service, or a fixed answer."""

    async def score(self, task: Task, results: str) -> float | None:
        """Final score of `results` (base64 of `.spz`); None when there is no answer."""


class ScoringService:
    """The scoring service over HTTP, as the public validator calls it."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint.rstrip("/")

    async def score(self, task: Task, results: str) -> float | None:
        """0 for what can not be read or is rejected outright: an exception inside the subnet's service gives that, too.
        None for no answer: no connection, a time-out, or another status than 200.
        """
        try:
            await asyncio.to_thread(check_results, results)
        except Unacceptable as error:
            log.info("Score 0: %s", quoted(str(error)))
            return 0.0
        problem = "busy"
        try:
            async with asyncio.timeout(SCORING_LIMIT_S), aiohttp.ClientSession() as session:
                while True:
                    async with session.post(self._url(task), json=_body(task, results), headers=PRIORITY) as response:
                        if response.status == 200:
                            return _score(await response.json())
                        problem = f"{response.status} {quoted(await response.text())}"
                    if response.status not in BUSY:
                        break
                    await asyncio.sleep(RETRY_S)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            problem = f"{type(error).__name__} {error}, {problem} before"
        log.error("No score: %s", problem)
        return None

    def _url(self, task: Task) -> str:
        return f"{self._endpoint}/validate_{'img' if isinstance(task, ImageTask) else 'txt'}_to_3d_ply/"


class FixedScores:
    """Says the same of everything."""

    def __init__(self, score: float | None) -> None:
        self._score = score

    async def score(self, task: Task, results: str) -> float | None:
        """Always the same."""
        return self._score


def _body(task: Task, results: str) -> dict[str, object]:
    return {
        "prompt_image" if isinstance(task, ImageTask) else "prompt": task.prompt,
        "data": results,
        "compression": COMPRESSION_SPZ,
        "generate_single_preview": False,
        "generate_grid_preview": False,
        "preview_score_threshold": 0.5,
    }


def _score(answer: Any) -> float:
    """Raises ValueError."""
    score = answer.get("score") if isinstance(answer, dict) else None
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(f"the answer has no score: {quoted(answer)}")
    return float(score)
