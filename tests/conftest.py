"""Fixtures that more than one test file uses."""

import logging
import signal
from pathlib import Path

import pytest

# Whoever runs the tests in the background ignores SIGINT, and so would every process that they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def loggers_speak() -> None:
    """bittensor's import, whichever test does it first, sets every logger of the process to CRITICAL."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("generation", "neurons")):
            logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def mini_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models file that names random mini checkpoints of the true layouts."""
    from tests.support.mini_checkpoints import build

    return build(tmp_path_factory.mktemp("mini"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to connect fails the test, whatever the environment says about being offline."""

    def refuse(self: object, address: object) -> None:
        raise AssertionError(f"something tried to connect to {address}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.socket.connect_ex", refuse)
