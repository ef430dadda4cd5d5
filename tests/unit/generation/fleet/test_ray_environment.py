"""What Ray's processes are started with, and which token files are refused."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from generation.fleet import ray_environment
from generation.fleet.ray_environment import ROOT, check_token_file, environment

TOKEN = "0123456789abcdef" * 4


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "cluster_token"
    path.touch(mode=0o600)
    path.write_text(f"{TOKEN}\n")
    return path


def test_the_variables(file: Path) -> None:
    given = {"PATH": "/bin", "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "inherited" * 9, "PYTHONPATH": "/mine"}
    variables = environment(file, given)
    assert variables["RAY_AUTH_MODE"] == "token"
    assert variables["RAY_AUTH_TOKEN_PATH"] == str(file)
    assert "RAY_AUTH_TOKEN" not in variables  # Ray takes it before the file
    assert variables["RAY_USAGE_STATS_ENABLED"] == "0"
    assert variables["PYTHONPATH"] == f"{ROOT}:/mine"
    assert environment(file, variables)["PYTHONPATH"] == f"{ROOT}:/mine"
    assert TOKEN not in str(variables)


def test_ray_knows_all_of_them() -> None:
    """By its own code: a setting that is misspelt is ignored without a word."""
    found = find_spec("ray")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent
    names = ("_raylet.so", "_common/usage/usage_constants.py", "_private/ray_constants.py")
    known = b"".join(path.read_bytes() for path in map(folder.joinpath, names))
    for name in ray_environment._SETTINGS:
        assert name.encode() in known or name.removeprefix("RAY_").encode() + b"\0" in known, name


def test_a_token_in_the_environment_counts_where_there_is_no_file(tmp_path: Path) -> None:
    variables = environment(tmp_path / "none", {"RAY_AUTH_TOKEN": TOKEN})
    assert variables["RAY_AUTH_TOKEN"] == TOKEN
    assert "RAY_AUTH_TOKEN_PATH" not in variables
    with pytest.raises(ValueError, match="at least 32 characters"):
        environment(tmp_path / "none", {"RAY_AUTH_TOKEN": "short"})


@pytest.mark.parametrize(
    ("mode", "text", "words"),
    [
        (0o640, TOKEN, "others can read or write it .mode 0640.: chmod 600"),
        (0o602, TOKEN, "others can"),
        (0o600, "", "32 to 4096"),
        (0o600, "a" * 31, "32 to 4096"),
        (0o600, f"{TOKEN}\n{TOKEN}", "one line"),
        (0o600, "a" * 5000, "32 to 4096"),
    ],
)
def test_a_file_that_is_not_fit_is_refused(file: Path, mode: int, text: str, words: str) -> None:
    file.write_text(text)
    file.chmod(mode)
    with pytest.raises(ValueError, match=words) as refused:
        environment(file, {})
    assert "\n" not in str(refused.value)
    assert TOKEN not in str(refused.value)


def test_what_is_no_plain_file_of_ours_is_refused(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, fifo = tmp_path / "link", tmp_path / "fifo"
    link.symlink_to(file)
    os.mkfifo(fifo, 0o600)
    for path, words in [(tmp_path / "no", "No such file"), (link, "symbolic"), (fifo, "plain"), (tmp_path, "plain")]:
        with pytest.raises(ValueError, match=words):
            check_token_file(path)
    check_token_file(file)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ValueError, match="belong to the user"):
        check_token_file(file)
