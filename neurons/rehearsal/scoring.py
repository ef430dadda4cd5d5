"""Client of the scoring endpoint that validators use: POST /validate_txt_to_3d_ply/."""

from __future__ import annotations

import asyncio
import math

import aiohttp

from neurons.logging_setup import quoted
from neurons.protocol import COMPRESSION_SPZ
from neurons.rehearsal.checks import Unacceptable

# Within the 300 s that a miner waits for the answer to a submission.
SCORING_LIMIT_S = 240.0
RETRY_S = 3.0
PRIORITY = {"X-Priority": "background"}  # as the tasks that are scored: who asks in person goes first


class ScoringUnavailable(Exception):
    """The scoring service did not answer in time; says nothing about the submission."""


class ScoringService:
    def __init__(self, endpoint: str) -> None:
        self._url = f"{endpoint.rstrip('/')}/validate_txt_to_3d_ply/"

    async def score(self, prompt: str, results: str) -> float:
        """Final score, 0 to 1, of `results` (base64 of `.spz`). Raises Unacceptable or ScoringUnavailable."""
        body = {
            "prompt": prompt,
            "data": results,
            "compression": COMPRESSION_SPZ,
            "generate_single_preview": False,
            "generate_grid_preview": False,
            "preview_score_threshold": 0.8,
        }
        problem = "not asked"
        try:
            async with asyncio.timeout(SCORING_LIMIT_S), aiohttp.ClientSession() as session:
                while True:
                    try:
                        async with session.post(self._url, json=body, headers=PRIORITY) as response:
                            if response.status == 200:
                                return _score(await response.json())
                            problem = f"{response.status} {quoted(await response.text())}"
                            if response.status in (400, 413, 422):
                                raise Unacceptable(f"the scoring service answered {problem}")
                    except aiohttp.ClientError as error:
                        problem = f"{type(error).__name__}: {error}"
                    await asyncio.sleep(RETRY_S)
        except TimeoutError as error:
            raise ScoringUnavailable(f"no score in {SCORING_LIMIT_S:.0f} s, last: {problem}") from error


def _score(answer: dict[str, object]) -> float:
    score = answer.get("score")
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise ScoringUnavailable(f"the answer has no score: {quoted(answer)}")
    return float(score)
