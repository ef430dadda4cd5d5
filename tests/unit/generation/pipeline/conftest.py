"""The pipeline around a generator that the tests steer."""

from typing import Any

import pytest

from generation.pipeline.pipeline import Pipeline
from generation.stages.self_check import views
from tests.support.sculptor import Sculptor
from tests.support.standins import Painter, WhiteIsBackground, colour_check


@pytest.fixture(autouse=True)
def small_views(monkeypatch):
    """A sixteenth of the validators' pixels: what is tested here does not depend on them."""
    monkeypatch.setattr(views, "VIEW_SIZE", 130)


@pytest.fixture
def sculptor() -> Sculptor:
    return Sculptor(iters=5)


@pytest.fixture
def pipeline(sculptor) -> Pipeline:
    painter: Any = Painter()
    matting: Any = WhiteIsBackground()
    return Pipeline(painter, matting, sculptor, sculptor, colour_check(), "cpu", [], 4)
