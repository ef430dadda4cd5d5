"""scripts.ops.environment: what uv is told of pip's settings, and what is refused before anything is installed."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from scripts.ops import environment

ROOT = Path(__file__).resolve().parents[3]
LISTED = """:env:.default-timeout='60'
:env:.index-url='https://me:secret@index.example/simple'
global.cert='/etc/ssl/company.pem'
global.extra-index-url='https://one.example/simple\\nhttps://two.example/simple'
global.find-links='/proc /no/such/folder'
global.index-url='https://old.example/simple'
global.proxy='http://proxy.example:3128'
install.trusted-host='index.example'
download.index-url='https://not.for.install/'
"""


def packages(name: str) -> dict[str, str]:
    """Name -> version of one lock."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / f"requirements/{name}.txt").read_text(), re.MULTILINE))


def test_uv_is_told_pips_indexes_proxy_and_certificates() -> None:
    settings = environment.parse_pip_settings(LISTED)
    assert environment.uv_variables(settings, {"HOME": "/"}) == {
        "UV_DEFAULT_INDEX": "https://me:secret@index.example/simple",  # the environment goes before the file
        "UV_INDEX": "https://one.example/simple https://two.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",  # as pip has it; hashes say which file it must be
        "UV_FIND_LINKS": "/proc",
        "UV_INSECURE_HOST": "index.example",
        "UV_HTTP_TIMEOUT": "60",
        "UV_NO_PROGRESS": "1",
        "SSL_CERT_FILE": "/etc/ssl/company.pem",
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://proxy.example:3128"),
    }


def test_what_uv_is_told_already_stays() -> None:
    told = environment.uv_variables(
        {"index-url": "https://pip/simple"}, {"HOME": "/", "UV_DEFAULT_INDEX": "https://uv"}
    )
    assert "UV_DEFAULT_INDEX" not in told


def test_certificates_that_only_requests_is_told_of() -> None:
    assert environment.uv_variables({}, {"HOME": "/", "REQUESTS_CA_BUNDLE": "/ca.pem"})["SSL_CERT_FILE"] == "/ca.pem"


def test_a_home_that_can_not_be_written_to_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    told = environment.uv_variables({}, {"HOME": str(tmp_path)})
    assert told["UV_CACHE_DIR"] == str(environment.ROOT / ".cache/uv")
    assert "UV_CACHE_DIR" not in environment.uv_variables({}, {"HOME": str(tmp_path / "..")})


def test_too_little_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 3 * 1024**3))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))  # not that of .venv
    with pytest.raises(environment.InstallError, match=r"too little disk: 3\.0 GB free in .*, the install needs 10 GB"):
        environment.ensure()


def test_each_extra_has_a_lock_and_brings_what_the_other_process_needs_not() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {path.stem for path in (ROOT / "requirements").glob("*.txt")} == {*extras, "bootstrap"}
    assert "bittensor" in packages("miner")
    assert not {"torch", "diffusers", "fastapi-cli"} & packages("miner").keys()
    assert "torch" in packages("service")
    assert not {"bittensor", "aiohttp"} & packages("service").keys()


def test_the_locks_agree_and_fit_pyproject() -> None:
    """A dependency that was added without ``python -m scripts.ops.lock`` is missing here."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, needed in project["optional-dependencies"].items():
        locked = packages(extra)
        assert {name: pinned[name] for name in locked} == locked
        for requirement in [*project["dependencies"], *needed]:
            name = re.split(r"[<>=!~;\[ ]", requirement)[0].lower().replace("_", "-")
            assert name in locked, f"{extra}: {requirement}"


def test_progress_is_counted_in_what_uv_tells() -> None:
    progress = environment._UvProgress()
    for line in ("Downloading torch (500.0MiB)", "Downloading timm (1024.0KiB)", " Downloaded timm"):
        progress.read(line)
    share, text = progress.shown()
    assert text == "1 of 501 MB"
    assert share == pytest.approx(1 / 501)


def test_an_install_that_is_ended_ends_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "LOG", tmp_path / "log")

    class Ended(environment._UvProgress):
        def read(self, line: str) -> None:
            signal.raise_signal(signal.SIGTERM)

    def end(*_: object) -> None:
        raise SystemExit(130)

    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(SystemExit):
            environment._run([sys.executable, "-uc", "import time; print(1); time.sleep(100)"], os.environ, Ended())
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_uv_installs_from_pips_private_index_with_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that asks for a password, which only pip's settings name."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert uv is not None, "scripts/install.sh fetches it"
    wheel = tmp_path / "tinything-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tinything.py", "VALUE = 7\n")
        file.writestr("tinything-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinything\nVersion: 1.0\n")
        file.writestr("tinything-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("tinything-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    password = "Basic " + base64.b64encode(b"me:secret").decode()

    class Index(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Authorization") != password:
                self.send_response(401)
                self.send_header("WWW-Authenticate", "Basic")
                self.end_headers()
                return
            link = f'<a href="/{wheel.name}#sha256={digest}">{wheel.name}</a>'
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/octet-stream")
            self.end_headers()
            self.wfile.write(link.encode() if self.path.endswith("/") else wheel.read_bytes())

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        settings = {"index-url": f"http://me:secret@127.0.0.1:{server.server_port}/simple"}
        lock = tmp_path / "lock.txt"
        variables = {**os.environ, **environment.uv_variables(settings), "UV_CACHE_DIR": str(tmp_path / "cache")}
        variables = {name: value for name, value in variables.items() if not name.lower().endswith("_proxy")}

        def install(sha256: str) -> subprocess.CompletedProcess[str]:
            lock.write_text(f"tinything==1.0 --hash=sha256:{sha256}\n")
            target = ["--target", str(tmp_path / "site"), "--python", sys.executable]
            command = [uv, "pip", "install", *target, "--require-hashes", "--no-deps", "-r", str(lock)]
            return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)

        other = install("0" * 64)
        assert other.returncode != 0
        assert "Hash mismatch for `tinything==1.0`" in other.stderr
        good = install(digest)
        assert good.returncode == 0, good.stderr
        assert (tmp_path / "site/tinything.py").exists()
    finally:
        server.shutdown()
        server.server_close()
