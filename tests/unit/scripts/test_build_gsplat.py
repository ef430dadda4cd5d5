"""Building gsplat's CUDA code, and giving the build to gsplat: all but the compiling, which takes ten minutes.

The slow test goes the whole way with a stand-in for the CUDA compiler and for gsplat's sources: one C++ file, which a
stand-in nvcc hands to g++. Real builds are made by scripts/ops/build_gsplat.py on a machine with a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import types
from pathlib import Path

import pytest

from generation.splats.rasterize import gsplat_build
from scripts.ops import build_gsplat

ROOT = Path(__file__).resolve().parents[3]

SOURCE = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "gsplat_cuda", nullptr, -1, nullptr};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit_gsplat_cuda() { return PyModule_Create(&module); }
"""
NVCC = """#!/bin/sh
[ "$1" != --version ] || { echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0; }
out= ; in=
while [ $# -gt 0 ]; do
    case $1 in -o) out=$2 ;; -c) in=$2 ;; esac
    shift
done
echo "$TORCH_CUDA_ARCH_LIST" >>"$(dirname "$0")/compiled"
exec g++ -x c++ -fPIC -c "$in" -o "$out"
"""
needs_gcc = pytest.mark.skipif(
    shutil.which("g++") is None or not Path(sysconfig.get_paths()["include"], "Python.h").exists(),
    reason="needs g++ and Python.h",
)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, an empty gsplat 1.5.3 before an installed one, and a compiler that is all there."""
    monkeypatch.setattr(gsplat_build, "CACHE", tmp_path / "cache")
    gsplat_build._load.cache_clear()
    for file in build_gsplat.TOOLKIT:
        write(tmp_path / "cu13" / file)
    write(tmp_path / "packages/gsplat/__init__.py")
    write(tmp_path / "packages/gsplat/cuda/ext.cpp", SOURCE)
    write(tmp_path / "packages/gsplat-1.5.3.dist-info/METADATA", "Name: gsplat\nVersion: 1.5.3\n")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    for name in ("gsplat", "gsplat.csrc"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))  # so that what it was comes back
        del sys.modules[name]
    actual = build_gsplat.package_folder
    monkeypatch.setattr(
        build_gsplat, "package_folder", lambda name: tmp_path / "cu13" if name == "nvidia.cu13" else actual(name)
    )
    monkeypatch.delenv("MAX_JOBS", raising=False)


def write(path: Path, content: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_a_build_is_found_by_the_cards_it_is_for() -> None:
    assert gsplat_build.find(["8.9"]) is None
    both = write(gsplat_build.folder(["8.9", "12.0"]) / "gsplat_cuda.so")
    assert gsplat_build.find(["8.9"]) == gsplat_build.find(["12.0"]) == gsplat_build.find(["8.9", "12.0"]) == both
    assert gsplat_build.find(["9.0"]) is None
    assert gsplat_build.find(["2.0"]) is None
    assert gsplat_build.find(["8.9", "9.0"]) is None


def test_builds_for_other_versions_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    write(gsplat_build.folder(["8.9"]) / "gsplat_cuda.so")
    monkeypatch.setattr(gsplat_build.torch, "__version__", "2.12.0+cu130")
    assert gsplat_build.find(["8.9"]) is None


def test_cards_that_are_too_old_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [(12, 0), (8, 9), (6, 1), (8, 9)]
    monkeypatch.setattr(gsplat_build.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gsplat_build.torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(gsplat_build.torch.cuda, "get_device_capability", lambda card: cards[card])
    assert gsplat_build.capabilities() == ["8.9", "12.0"]


def test_without_a_build_it_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gsplat_build, "capabilities", lambda: ["8.9", "12.0"])
    with pytest.raises(RuntimeError, match=r"8\.9, 12\.0.* run: \.venv/bin/python -m scripts\.ops\.build_gsplat"):
        gsplat_build.load()


@needs_gcc
def test_gsplat_gets_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gsplat_build, "capabilities", lambda: ["8.9"])
    library = write(gsplat_build.folder(["8.9"]) / "gsplat_cuda.so", "cut off")
    with pytest.raises(RuntimeError, match=rf"does not load: .*remove {re.escape(str(library.parent))}"):
        gsplat_build.load()
    source = write(tmp_path / "ext.cpp", SOURCE)
    include = sysconfig.get_paths()["include"]
    subprocess.run(["g++", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(library)], check=True)
    gsplat_build.load()
    from gsplat import csrc  # as gsplat looks for it before it would compile

    assert csrc.__file__ == str(library)


def test_progress_of_a_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["[1/12] /x/nvcc -O3 -c /x/csrc/AdamCUDA.cu -o AdamCUDA.cuda.o", "a warning", "[12/12] c++ a.o -o b.so"]
    with (tmp_path / "lock").open("w") as lock:
        command = [sys.executable, "-c", f"print({chr(10).join(lines)!r})"]
        assert build_gsplat.run(command, {}, tmp_path / "log", lock.fileno()) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split() for line in told] == [["[", "1/12]", "0:00", "AdamCUDA.cu"], ["[12/12]", "0:00", "linking"]]
    assert (tmp_path / "log").read_text().splitlines() == lines
    assert build_gsplat.progress("[2/9] nvcc -c a.cu", 125.4) == "  [2/9] 2:05  a.cu"


def test_an_interrupted_build_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(line: str, seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_gsplat, "progress", interrupt)
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    started = time.monotonic()
    with (tmp_path / "lock").open("w") as lock, pytest.raises(KeyboardInterrupt):
        build_gsplat.run([sys.executable, "-c", child], {}, tmp_path / "log", lock.fileno())
    assert time.monotonic() - started < 50
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "log").read_text()), 0)


@pytest.mark.slow
def test_a_closed_terminal_ends_a_build_and_its_compilers(tmp_path: Path) -> None:
    child = f"import os, time; open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    program = f"""
import sys
from pathlib import Path
from scripts.ops import build_gsplat
def build(_):
    with open({str(tmp_path / "lock")!r}, "w") as lock:
        build_gsplat.run([sys.executable, "-c", {child!r}], {{}}, Path({str(tmp_path / "log")!r}), lock.fileno())
build_gsplat.gsplat_build.find = lambda _: None
build_gsplat.build = build
sys.exit(build_gsplat.main(["--arch", "8.9"]))
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # whatever the tests were started with
    )
    pid = tmp_path / "child"
    try:
        until = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()):
            assert time.monotonic() < until
            assert parent.poll() is None
            time.sleep(0.02)
        parent.send_signal(signal.SIGHUP)
        assert parent.wait(50) == 128 + signal.SIGHUP
    finally:
        parent.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_build_holds_its_lock_as_long_as_it_lives(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as lock:
        child = f"import os; print(os.fstat({lock.fileno()}).st_ino)"
        build_gsplat.run([sys.executable, "-c", child], {}, tmp_path / "log", lock.fileno())
    assert int((tmp_path / "log").read_text()) == (tmp_path / "lock").stat().st_ino


def refused(capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    assert build_gsplat.main(["--arch", "8.9"]) == 1
    error = capsys.readouterr().err
    for part in ("build_gsplat: ", *parts):
        assert part in error


@pytest.mark.parametrize("file", build_gsplat.TOOLKIT)
def test_a_missing_package_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    (tmp_path / "cu13" / file).unlink()
    refused(capsys, file, build_gsplat.TOOLKIT[file], "scripts/install.sh gpu")


def test_what_else_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(build_gsplat.shutil, "which", lambda name, path=None: None)
        refused(capsys, "apt install g++")
        patch.setattr(build_gsplat.shutil, "which", lambda name, path=None: None if name == "ninja" else "/usr/bin/g++")
        patch.setattr(build_gsplat.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
        refused(capsys, "Python.h", f"apt install python3.{sys.version_info.minor}-dev")
        write(tmp_path / "Python.h")
        patch.setattr(build_gsplat.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**29))
        refused(capsys, "too little disk: 0.5 GB free")
        patch.setattr(build_gsplat.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**40))
        refused(capsys, "no ninja", "scripts/install.sh gpu")
        patch.setenv("MAX_JOBS", "many")
        refused(capsys, "MAX_JOBS=many")
    shutil.rmtree(tmp_path / "packages/gsplat-1.5.3.dist-info")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "gsplat").exists()])
    importlib.invalidate_caches()
    refused(capsys, "gsplat is not installed", "scripts/install.sh gpu")


def test_no_card(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gsplat_build, "capabilities", lambda: [])
    assert build_gsplat.main([]) == 1
    assert "can use no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["sm_89", "89", "6.1", "8.9+PTX", ""])
def test_what_is_no_compute_capability(capsys: pytest.CaptureFixture[str], arch: str) -> None:
    with pytest.raises(SystemExit):
        build_gsplat.main(["--arch", arch])
    assert "no compute capability" in capsys.readouterr().err


def test_memory_limits_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_gsplat.os, "sched_getaffinity", lambda pid: set(range(16)))
    for gigabytes, expected in ((64, 16), (9, 4), (1, 1)):
        monkeypatch.setattr(build_gsplat, "free_memory", lambda free=gigabytes: free * 2**30)
        assert build_gsplat.jobs() == expected
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build_gsplat.jobs() == 3


def test_a_compiler_without_memory(tmp_path: Path) -> None:
    log = write(tmp_path / "log", "nvcc error : 'cicc' died due to signal 9 (Kill signal)\n")
    assert "MAX_JOBS=1" in build_gsplat.reason(log, "8")
    assert "MAX_JOBS" not in build_gsplat.reason(write(log, "error: expected ';'\n"), "8")


@needs_gcc
@pytest.mark.slow
def test_from_sources_to_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ninja")
    write(tmp_path / "cu13/bin/nvcc", NVCC).chmod(0o755)
    (tmp_path / "cu13/lib/libcudart.so.13").unlink()
    (tmp_path / "cu13/lib/libcudart.so.13").symlink_to(cudart())
    broken = write(tmp_path / "packages/gsplat/cuda/csrc/Broken.cu", "int f() { return 1 }\n")
    good = write(tmp_path / "packages/gsplat/cuda/csrc/A.cu", "int g() { return 1; }\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("CUDA_HOME", "/a/toolkit/that/is/not/used")
    monkeypatch.setenv("MAX_JOBS", "1")

    refused(capsys, "Broken.cu:1:19: error: expected", "build.log")
    assert gsplat_build.find(["8.9"]) is None
    write(gsplat_build.folder(["8.9"]) / "build/lock")  # as a killed build leaves it
    write(broken, "int f() { return 1; }\n")
    assert build_gsplat.main(["--arch", "8.9"]) == 0
    told = capsys.readouterr().out
    assert "Broken.cu" in told
    assert "linking" in told
    assert "gsplat is built" in told
    assert (tmp_path / "cu13/bin/compiled").read_text().split() == ["8.9"] * 3  # A once, Broken twice

    assert good.exists()
    assert gsplat_build.find(["8.9"]) is not None
    assert not (gsplat_build.folder(["8.9"]) / "build").exists()
    assert build_gsplat.main(["--arch", "8.9"]) == 0
    assert "built already" in capsys.readouterr().out
    monkeypatch.setattr(gsplat_build, "capabilities", lambda: ["8.9"])
    gsplat_build.load()
    assert sys.modules["gsplat.csrc"].__file__ == str(gsplat_build.find(["8.9"]))


def cudart() -> Path:
    spec = importlib.util.find_spec("nvidia.cu13")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "lib/libcudart.so.13"
