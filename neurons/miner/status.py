"""What the miner says about itself: a status file for scripts, and a log line when there is nothing to do."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from neurons.miner.clock import steady_time
from neurons.miner.generators import GeneratorPool
from neurons.miner.metrics import Snapshot
from neurons.miner.task_manager import AsyncTaskManager
from neurons.miner.validators import ValidatorDirectory

IDLE_LOG_INTERVAL_S = 60.0

log = logging.getLogger(__name__)


def snapshot(
    directory: ValidatorDirectory, manager: AsyncTaskManager, pool: GeneratorPool, ledger_backlog: int
) -> Snapshot:
    """The miner at this moment, for the metrics."""
    now = steady_time()
    eligible = directory.eligible
    return Snapshot(
        queued=manager.queued,
        ages=[now - assignment.pulled_at for assignment in manager.held],
        cooldowns={eligible[key].uid: until - now for key, until in manager.cooldowns.items() if key in eligible},
        endpoints=pool.usable,
        ledger_backlog=ledger_backlog,
    )


class StatusFile:
    """JSON at `path`, whole at any moment; nowhere when that is None."""

    def __init__(self, path: Path | None, network: str) -> None:
        self._path = path
        self._network = network

    def write(self, **fields: Any) -> None:
        if self._path is None:
            return
        content = {**fields, "network": self._network, "pid": os.getpid()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(json.dumps(content) + "\n")
            temporary.replace(self._path)
        except OSError as error:
            log.error("Status file %s: %s", self._path, error)

    def remove(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class IdleLog:
    """Says, once a minute, that all validators are on cooldown or do not answer."""

    def __init__(self) -> None:
        self._logged_at = 0.0

    def update(self, manager: AsyncTaskManager, eligible: int) -> None:
        now = steady_time()
        cooldowns, silent = manager.cooldowns, manager.silent
        if not eligible or len(cooldowns) + silent < eligible or now - self._logged_at < IDLE_LOG_INTERVAL_S:
            return
        self._logged_at = now
        seconds = max(0.0, min(cooldowns.values(), default=now) - now)
        log.info(
            "No available validators: %d on cooldown, the next one for %.0f s, %d not answering",
            len(cooldowns),
            seconds,
            silent,
        )
