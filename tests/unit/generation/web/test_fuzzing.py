"""The service answers as its OpenAPI description says, whatever a fuzzer that reads it sends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from generation.web import events, making
from tests.support.service_harness import serving

ROOT = Path(__file__).resolve().parents[4]
LIMIT_S = 120
SEED = 17


async def film(engine: Any, data: bytes, device: str, background: bool = False) -> bytes:
    return data


@pytest.mark.slow
def test_the_service_is_as_it_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around a stand-in pipeline, whose splats are none that could be filmed."""
    monkeypatch.setattr(making, "film", film)
    monkeypatch.setattr(events, "MAX_WAIT_S", 0.1)
    with serving(max_queue=64, max_batch=4) as service:
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
        options = ["--seed", str(SEED), "--max-examples", "50", "--no-color", "--max-failures", "100"]
        command += [f"{service.url}/openapi.json", *options]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr
        assert "Tested: 9" in result.stdout
        assert service.generate().status_code == 200
