"""Which validators are worth the generators' time, judged by what they accepted."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from neurons.miner.records.standings import Standing

# Each validator starts as if it had accepted 3 of 4 tasks, so that bad luck alone gets none skipped. Two bad results
# leave it at one half.
PRIOR_ACCEPTED = 3.0
PRIOR_TASKS = 4.0
# A validator that is skipped is tried again this long after its last task.
EXPLORATION_INTERVAL_S = 3600.0


class Policy:
    """Skips validators whose expected reward per GPU second is under `least_reward`; with 0 it skips none.

    A miner's reward at a validator is its accepted results of the last four hours x its rating there. The rating moves
    with duels and not with a single task, so what a task is expected to earn is the probability that its result is
    accepted, and what it costs is the generators' time. `least_reward` is in accepted results per GPU second: 0.04 is
    eight accepted of ten at 20 s each. Skipping pays where generators are what is short.
    """

    def __init__(self, least_reward: float) -> None:
        self._least_reward = least_reward
        self._standings: Mapping[str, Standing] = {}
        self._typical_s: float | None = None

    def update(self, standings: Mapping[str, Standing]) -> None:
        """Takes new standings, by hotkey. To be called every now and then."""
        self._standings = standings
        self._typical_s = _gpu_s_per_task(standings.values())

    def ask_at(self, hotkey: str) -> float:
        """The unix time from which it is worth asking the validator for a task; 0 for right away."""
        standing = self._standings.get(hotkey)
        if standing is None or standing.last_task_at is None:
            return 0.0
        expected = self.expected_reward(hotkey)
        if expected is None or expected >= self._least_reward:
            return 0.0
        return standing.last_task_at + EXPLORATION_INTERVAL_S

    def expected_reward(self, hotkey: str) -> float | None:
        """Accepted results per GPU second of the validator's next task; None while no task's cost is known."""
        standing = self._standings.get(hotkey)
        if self._typical_s is None:
            return None
        if standing is None:
            return PRIOR_ACCEPTED / PRIOR_TASKS / self._typical_s
        probability = (PRIOR_ACCEPTED + standing.accepted) / (PRIOR_TASKS + standing.submitted)
        # By tasks worked on, not by those submitted: the newest has cost its time already and is not submitted yet.
        seconds = (PRIOR_TASKS * self._typical_s + _needed_gpu_s(standing)) / (PRIOR_TASKS + _tasks(standing))
        return probability / seconds


def _gpu_s_per_task(standings: Collection[Standing]) -> float | None:
    """Over all validators together."""
    seconds, tasks = sum(_needed_gpu_s(each) for each in standings), sum(_tasks(each) for each in standings)
    return seconds / tasks if seconds and tasks else None


def _needed_gpu_s(standing: Standing) -> float:
    """One candidate of each task. Further ones are made only in time that nothing else needs."""
    return standing.gpu_s / max(standing.candidates or 1.0, 1.0)


def _tasks(standing: Standing) -> int:
    """Tasks that cost GPU time. Their ids come from the validator, and may repeat: hence the larger of the two."""
    return max(standing.attempted, standing.submitted)
