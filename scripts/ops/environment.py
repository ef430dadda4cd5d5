"""Makes .venv and installs the locked packages: ``scripts/install.sh``, and first of all ``deploy_competitive.sh``.

uv installs, from requirements/EXTRA.txt with
their hashes; pip fetches uv, and does the work itself where uv can not. Standard library only: this runs before
anything is installed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv/bin/python"
UV = ROOT / ".venv/bin/uv"
LOG = ROOT / ".venv/install.log"
PLAIN = ("miner", "service")
INSTALL_GB = 10  # free space that a fresh install needs: 6 for the environment, the rest for downloads
LOG_LINES = 15  # of a failed install that are shown
# Where systems keep the certificates that they trust. Recent pip trusts them too.
SYSTEM_CERTIFICATES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")

_MIB = {"KiB": 1 / 1024, "MiB": 1.0, "GiB": 1024.0}


class InstallError(Exception):
    """Why there is no environment, and what to do about it."""


def ensure(extras: Sequence[str] = PLAIN, hashes: bool = True) -> None:
    """Install these optional dependencies unless they are there. Raises InstallError."""
    inside = PYTHON.parent.exists() and Path(sys.executable).parent.samefile(PYTHON.parent)
    if inside and all(_installed(extra) == _key() for extra in extras):
        return
    try:
        if not inside:
            _make()
        _install(extras, hashes)
        for extra in extras:
            _mark(extra).write_text(_key() + "\n")
    except OSError as error:
        raise InstallError(f"{error.filename or ROOT / '.venv'}: {error.strerror}") from error


def hardware_extras() -> list[str]:
    """What this machine's hardware asks for. Raises InstallError for what no package can bring."""
    if not has_gpu():
        return []
    if shutil.which("g++") is None:
        raise InstallError(
            "no C++ compiler: gsplat needs one for the GPU found here; on Debian and Ubuntu: apt install g++"
        )
    python = PYTHON if PYTHON.exists() else Path(sys.executable)
    ask = "import sysconfig; print(sysconfig.get_paths()['include'] + '/Python.h')"
    header = Path(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    if not header.exists():
        raise InstallError(
            f"no {header}: gsplat and torch.compile need it for the GPU found here; "
            f"on Debian and Ubuntu: apt install {header.parent.name}-dev"
        )
    return ["gpu"]


def has_gpu() -> bool:
    try:
        return "GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:
        return False


def _key() -> str:
    """What an installed environment depends on. The place counts too: an environment does not survive being moved."""
    files = [ROOT / "pyproject.toml", ROOT / "constraints.txt", *sorted((ROOT / "requirements").glob("*.txt"))]
    content = b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(content + f"{sys.version_info[:3]} {ROOT}".encode()).hexdigest()


def _mark(extra: str) -> Path:
    return ROOT / f".venv/.installed-{extra}"


def _installed(extra: str) -> str:
    try:
        return _mark(extra).read_text().strip()
    except OSError:
        return ""


def _make() -> None:
    free = shutil.disk_usage(ROOT).free / 1024**3
    if free < INSTALL_GB:
        raise InstallError(f"too little disk: {free:.1f} GB free in {ROOT}, the install needs {INSTALL_GB} GB")
    _say(f"Making the environment in .venv with Python {'.'.join(map(str, sys.version_info[:3]))} ...")
    if subprocess.run([sys.executable, "-m", "venv", "--clear", ROOT / ".venv"]).returncode != 0:
        raise InstallError(f"could not make the environment in {ROOT}/.venv")


def _install(extras: Sequence[str], hashes: bool) -> None:
    locks = [f"requirements/{extra}.txt" for extra in extras]
    project = f".[{','.join(extras)}]"
    if hashes:
        steps = [
            ["--require-hashes", "--no-deps", *(word for lock in locks for word in ("-r", lock))],
            ["--no-deps", "--no-build-isolation", "-e", "."],
        ]
    else:
        steps = [["-c", "constraints.txt", "-e", project]]
    count = len({line for lock in locks for line in (ROOT / lock).read_text().splitlines() if "==" in line})
    LOG.write_text("")
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    fetch_uv = ["--require-hashes", "-r", "requirements/bootstrap.txt"] if hashes else ["uv"]
    variables = {**os.environ, **uv_variables(_pip_settings())}
    uv = [str(UV), "pip", "install", "--python", str(PYTHON)]
    _say(f"Installing {count} packages ...")
    if _run([*pip, *fetch_uv], os.environ, None) and UV.exists():
        if all(_run([*uv, *step], variables, _UvProgress()) for step in steps):
            return
        _refuse_what_pip_can_not_mend()
        _say(f"uv could not install them (its reason is in {LOG}); pip, which takes minutes, tries:")
    if not all(_run([*pip, "--progress-bar", "off", *step], os.environ, _PipProgress(count)) for step in steps):
        _refuse_what_pip_can_not_mend()
        print("\n".join(LOG.read_text(errors="replace").splitlines()[-LOG_LINES:]), file=sys.stderr)
        raise InstallError(
            "pip could not install the packages: its reason is above (is there a connection to the internet, and to "
            "what pip config list names?). Running this again goes on from here."
        )


def _refuse_what_pip_can_not_mend() -> None:
    text = LOG.read_text(errors="replace")
    if re.search(r"No space left on device|os error 28", text):
        raise InstallError(f"no space left on the disk while the packages were installed: see {LOG}")
    found = re.search(r"Hash mismatch for `?([^`\s]+)|DO NOT MATCH THE HASHES[^\n]*\n\s*(\S+)", text)
    if found:
        raise InstallError(
            f"{found[1] or found[2]} is not the file that the lock names: it was changed on its way, or your registry "
            "packs files anew. Only if you trust that registry: scripts/install.sh --no-hashes, then this again"
        )


# ---- uv, told what pip is told ----


def _pip_settings() -> dict[str, str]:
    """pip's settings from its files and its environment, as ``pip config list`` tells them: ``{"index-url": …}``."""
    answer = subprocess.run([PYTHON, "-m", "pip", "config", "list"], cwd=ROOT, capture_output=True, text=True)
    return parse_pip_settings(answer.stdout)


def parse_pip_settings(listed: str) -> dict[str, str]:
    """``section.key='value'`` lines; what is for ``install`` goes before ``global``, the environment before both."""
    found: dict[int, dict[str, str]] = {0: {}, 1: {}, 2: {}}
    ranks = {"global": 0, "install": 1, ":env:": 2}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.partition(".")
        if section in ranks and value:
            found[ranks[section]][key.removeprefix("default-")] = str(ast.literal_eval(value))
    return {**found[0], **found[1], **found[2]}


def uv_variables(pip: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment variables that make uv use pip's indexes, proxy and certificates. What uv is told already stays."""
    # Packages may be in any of several indexes, as pip has it. Their hashes are given, so none can be foisted on us.
    found = {"UV_INDEX_STRATEGY": "unsafe-best-match", "UV_NO_PROGRESS": "1"}
    names = {
        "index-url": "UV_DEFAULT_INDEX",
        "extra-index-url": "UV_INDEX",
        "trusted-host": "UV_INSECURE_HOST",
        "timeout": "UV_HTTP_TIMEOUT",
        "keyring-provider": "UV_KEYRING_PROVIDER",
        "cert": "SSL_CERT_FILE",
        "client-cert": "SSL_CLIENT_CERT",
    }
    found |= {names[key]: " ".join(value.split()) for key, value in pip.items() if key in names}
    if found.get("UV_KEYRING_PROVIDER") not in ("disabled", "subprocess"):
        found.pop("UV_KEYRING_PROVIDER", None)
    # pip only warns of a folder that is not there.
    if links := [each for each in pip.get("find-links", "").split() if "://" in each or os.path.exists(each)]:
        found["UV_FIND_LINKS"] = ",".join(links)
    if pip.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        found["UV_NO_INDEX"] = "1"
    if "proxy" in pip:
        found |= {name: pip["proxy"] for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")}
    bundle = environment.get("REQUESTS_CA_BUNDLE") or environment.get("CURL_CA_BUNDLE")
    if bundle and "SSL_CERT_FILE" not in found:
        found["SSL_CERT_FILE"] = bundle
    if "SSL_CERT_FILE" not in {**environment, **found} and any(map(os.path.exists, SYSTEM_CERTIFICATES)):
        found["UV_SYSTEM_CERTS"] = "true"
    cache = Path(environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME") or "/nowhere") / ".cache")
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        found["UV_CACHE_DIR"] = str(ROOT / ".cache/uv")
    return {name: value for name, value in found.items() if name not in environment or not name.startswith("UV_")}


# ---- one line of progress ----


class _UvProgress:
    """From uv's lines ``Downloading torch (506.0MiB)`` and `` Downloaded torch``, which it writes for large files."""

    def __init__(self) -> None:
        self._sizes: dict[str, float] = {}
        self._done = 0.0

    def read(self, line: str) -> None:
        begun = re.match(r"\s*Downloading (\S+) \(([\d.]+)(\w+)\)", line)
        ended = re.match(r"\s*Downloaded (\S+)", line)
        if begun:
            self._sizes[begun[1]] = float(begun[2]) * _MIB.get(begun[3], 0.0)
        elif ended:
            self._done += self._sizes.get(ended[1], 0.0)

    def shown(self) -> tuple[float, str]:
        total = sum(self._sizes.values())
        return (self._done / total, f"{self._done:,.0f} of {total:,.0f} MB") if total else (0.0, "from the cache")


class _PipProgress:
    """From pip's lines ``Collecting torch==2.11.0``."""

    def __init__(self, count: int) -> None:
        self._count, self._begun = count, 0

    def read(self, line: str) -> None:
        self._begun += line.lstrip().startswith(("Collecting ", "Requirement already satisfied"))

    def shown(self) -> tuple[float, str]:
        begun = min(self._begun, self._count)
        return begun / self._count, f"{begun} of {self._count} packages"


def _run(command: Sequence[str], variables: Mapping[str, str], progress: _UvProgress | _PipProgress | None) -> bool:
    """Run it with its output in the log and one line of progress, on a terminal. True for exit status 0."""
    began = time.monotonic()
    with (
        LOG.open("a") as log,
        subprocess.Popen(
            command, cwd=ROOT, env=dict(variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace",
        ) as child,
    ):  # fmt: skip
        log.write(f"$ {' '.join(command)}\n")

        def read() -> None:
            assert child.stdout is not None
            for line in child.stdout:
                log.write(line)
                if progress is not None:
                    progress.read(line)

        reader = threading.Thread(target=read)
        reader.start()
        live = progress is not None and sys.stdout.isatty()
        try:
            while reader.is_alive():
                reader.join(0.2)
                if live and progress is not None:
                    share, text = progress.shown()
                    bar = "#" * round(30 * share)
                    print(f"\r  [{bar:30}] {text}, {time.monotonic() - began:.0f} s ", end="", flush=True)
        except BaseException:  # told to end
            child.terminate()
            raise
        succeeded = child.wait() == 0
    if live:
        print("\r\033[K", end="")
    if succeeded and progress is not None and "-r" in command:
        _say(f"  installed in {time.monotonic() - began:.0f} s")
    return succeeded


def _say(text: str) -> None:
    print(text, flush=True)


def main(arguments: Sequence[str]) -> int:
    known = sorted(path.stem for path in (ROOT / "requirements").glob("*.txt") if path.stem != "bootstrap")
    parser = argparse.ArgumentParser(prog="install.sh", description="Make .venv and install the locked packages.")
    what = "optional dependencies of pyproject.toml (default: miner, service, and gpu where there is one)"
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help=f"{what}: {', '.join(known)}")
    parser.add_argument("--dev", action="store_true", help="with what the tests need")
    parser.add_argument("--no-hashes", action="store_true", help="for a registry that packs files anew")
    given = parser.parse_args(arguments)
    if wrong := sorted({*given.extras} - {*known}):
        parser.error(f"{wrong[0]}: is none of {', '.join(known)}")
    try:
        extras = given.extras or [*PLAIN, *hardware_extras()]
        ensure([*extras, *(["dev"] if given.dev else [])], hashes=not given.no_hashes)
    except InstallError as error:
        print(f"install.sh: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
