"""The miner's state: a status file for scripts, and log lines when there is nothing to do or a clock is off."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neurons.chain import Neuron
from neurons.miner.generation.pool import GeneratorPool
from neurons.miner.records.metrics import Snapshot
from neurons.miner.tasks.task_manager import AsyncTaskManager
from neurons.miner.validators.clock import ValidatorClocks
from neurons.miner.validators.directory import ValidatorDirectory

IDLE_LOG_INTERVAL_S = 60.0
# Date headers are up to 2 s old. A validator refuses a first pull when its clock is 16 s ahead.
CLOCK_IS_OFF_S = 5.0
CLOCK_IS_RIGHT_S = 3.0

log = logging.getLogger(__name__)


def snapshot(
    directory: ValidatorDirectory,
    manager: AsyncTaskManager,
    pool: GeneratorPool,
    clocks: ValidatorClocks,
    ledger_backlog: int,
    status: str,
    registered: Neuron | None = None,
) -> Snapshot:
    """The miner at this moment, for the metrics. `registered`: what the chain has of it."""
    now = clocks.now()
    eligible = directory.eligible
    return Snapshot(
        queued=manager.queued,
        ages=[now - assignment.pulled_at for assignment in manager.held],
        cooldowns={eligible[key].uid: until - now for key, until in manager.cooldowns.items() if key in eligible},
        endpoints=pool.usable,
        ledger_backlog=ledger_backlog,
        clock_behind=clocks.machine_is_behind(),
        status=status,
        hotkeys={neuron.uid: hotkey for hotkey, neuron in eligible.items()},
        held=[(each.validator.uid, each.task.type, now - each.pulled_at) for each in manager.held],
        uid=None if registered is None else registered.uid,
        incentive=None if registered is None else registered.incentive,
    )


class StatusFile:
    """A JSON file at `path`, replaced atomically; nothing if `path` is None. An error is only logged, once."""

    def __init__(self, path: Path | None, network: str) -> None:
        self._path = path
        self._network = network
        self._problem: str | None = None

    def write(self, **fields: Any) -> None:
        """Replaces the file. To be called about every second."""
        if self._path is None:
            return
        content = {**fields, "network": self._network, "pid": os.getpid()}
        problem = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(json.dumps(content) + "\n")
            temporary.replace(self._path)
        except OSError as error:
            problem = error.strerror
            if problem != self._problem:
                log.error("Status file %s: %s", self._path, problem)
        self._problem = problem

    def remove(self) -> None:
        """Deletes the file, as the miner ends."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()


class IdleLog:
    """Logs once a minute that all validators are on cooldown or do not answer."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._logged_at = 0.0

    def update(self, manager: AsyncTaskManager, eligible: int) -> None:
        """To be called about every second. `eligible`: number of eligible validators."""
        now = self._now()
        cooldowns, silent = manager.cooldowns, manager.silent
        if not eligible or len(cooldowns) + silent < eligible or now - self._logged_at < IDLE_LOG_INTERVAL_S:
            return
        self._logged_at = now
        states = []
        if cooldowns:
            seconds = max(0.0, min(cooldowns.values()) - now)
            states.append(f"{len(cooldowns)} on cooldown, the next one for {seconds:.0f} s")
        if silent:
            states.append(f"{silent} not answering")
        log.info("No available validators: %s", ", ".join(states))


class ClockLog:
    """Logs once when this machine's clock differs from the validators', and once when it is right again."""

    def __init__(self) -> None:
        self._is_off = False

    def update(self, behind: float | None) -> None:
        """`behind`: seconds by which the validators' clocks are ahead of this machine's; None while unknown."""
        if behind is None:
            return
        if self._is_off and abs(behind) < CLOCK_IS_RIGHT_S:
            self._is_off = False
            log.info("This machine's clock agrees with the validators' again")
        elif not self._is_off and abs(behind) > CLOCK_IS_OFF_S:
            self._is_off = True
            side = "behind" if behind > 0 else "ahead of"
            log.warning("This machine's clock is %.0f s %s the validators' clocks: set it", abs(behind), side)
