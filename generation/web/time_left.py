"""Estimates of the remaining time of requests, from the times of earlier ones."""

from __future__ import annotations

from generation.schema.results import Request

_MILESTONES = 10  # in each stage
_WEIGHT = 0.25  # of the latest request in the moving average

Milestone = tuple[str, str, int]  # kind of request, stage, tenth of the stage


def kind_of(route: str, asked: Request) -> str:
    """The kind of a request: those of one kind take about the same time."""
    several = "" if asked.candidates == 1 else ", best of several"
    return f"{route} {'text' if asked.image is None else 'image'}{several}"


class TimeLeft:
    """Mean seconds from each milestone to the end. Requests are told apart by kind, such as text and image."""

    def __init__(self) -> None:
        self.means: dict[Milestone, float] = {}

    def begin(self, kind: str) -> RequestTimer:
        return RequestTimer(self.means, kind)


class RequestTimer:
    """One request in progress. All times are of one clock, in seconds."""

    def __init__(self, means: dict[Milestone, float], kind: str) -> None:
        self._means, self._kind = means, kind
        self._reached: dict[Milestone, float] = {}

    def reached(self, stage: str, fraction: float, now: float) -> float | None:
        """Estimated seconds left. None without an earlier request to compare with, or when this one is late."""
        milestone = self._kind, stage, int(fraction * _MILESTONES)
        since = now - self._reached.setdefault(milestone, now)
        mean = self._means.get(milestone)
        return None if mean is None or mean <= since else mean - since

    def delay(self, seconds: float) -> None:
        """Exclude a pause of so many seconds."""
        self._reached = {milestone: reached + seconds for milestone, reached in self._reached.items()}

    def finished(self, now: float) -> None:
        """The request finished all stages: its times enter the averages."""
        for milestone, reached in self._reached.items():
            mean = self._means.setdefault(milestone, now - reached)
            self._means[milestone] = mean + (now - reached - mean) * _WEIGHT
