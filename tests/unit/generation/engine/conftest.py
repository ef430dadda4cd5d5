"""An engine without a service around it."""

from __future__ import annotations

from typing import Any

import pytest

from generation.engine.engine import Engine
from tests.support.service_harness import PATIENCE_S, StandInPipeline, wait_until


@pytest.fixture
def ready_engine() -> Any:
    pipeline = StandInPipeline()
    engine = Engine(lambda progress: pipeline, max_queue=4, max_batch=1)
    engine.start()
    wait_until(lambda: engine.status == "ready")
    yield engine, pipeline
    pipeline.go.set()
    engine.stop(PATIENCE_S)
