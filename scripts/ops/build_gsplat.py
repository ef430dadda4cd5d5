"""Compile gsplat's CUDA code for the cards of this machine, once: python -m scripts.ops.build_gsplat [--arch 8.9 ...]

The compiler comes from the registry's packages in the `gpu` extra, beside torch's own CUDA runtime, so no CUDA toolkit
need be on the machine, and one that is there is not used. The result is kept in .cache/gsplat, where the service looks
for it. A build that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import torch

from generation.splats.rasterize import gsplat_build

ROOT = Path(__file__).resolve().parents[2]
JOB_GB = 2  # for each file compiled at once: the largest, ext.cpp, was measured at 1.9
DISK_GB = 1
LINES = 12  # of a failed build that are shown
#: The file of each package that the compiler needs, in the folder that they share.
TOOLKIT = {
    "bin/nvcc": "nvidia-cuda-nvcc",
    "nvvm/bin/cicc": "nvidia-nvvm",
    "include/crt/host_config.h": "nvidia-cuda-crt",
    "include/cccl": "nvidia-cuda-cccl",
    "lib/libcudart.so.13": "nvidia-cuda-runtime",
}
INSTALL = "scripts/install.sh gpu"


class BuildError(Exception):
    """Why there is no build, and what to do about it."""


def package_folder(name: str) -> Path:
    """Where a package is installed, found without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # its parent
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(f"the package {name} is not installed; run: {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


def toolkit() -> Path:
    """The folder of the compiler's packages."""
    home = package_folder("nvidia.cu13")
    for file, package in TOOLKIT.items():
        if not (home / file).exists():
            raise BuildError(f"{home / file} is missing: it belongs to {package}; run: {INSTALL}")
    return home


def check_machine() -> None:
    """What pip can not install."""
    if shutil.which("g++") is None:
        raise BuildError("no C++ compiler; on Debian and Ubuntu: apt install g++")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise BuildError(f"no {header}; on Debian and Ubuntu: apt install python{version}-dev")
    free = shutil.disk_usage(ROOT).free
    if free < DISK_GB * 1024**3:
        raise BuildError(f"too little disk: {free / 1024**3:.1f} GB free in {ROOT}, the build needs {DISK_GB} GB")


def free_memory() -> int:
    """Bytes that may still be used, by the machine or by the container's limit."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(free, limit - int(stat["anon"]))  # the rest is mostly cache, which makes room
    except (OSError, ValueError, KeyError):  # no container, or none with a limit
        return free


def jobs() -> int:
    """Files compiled at once: MAX_JOBS where it is set, else one for each core, and fewer where memory is short."""
    given = os.environ.get("MAX_JOBS", "")
    if given:
        if not given.isdecimal() or int(given) < 1:
            raise BuildError(f"MAX_JOBS={given}: must be a whole number of 1 or more")
        return int(given)
    return max(1, min(len(os.sched_getaffinity(0)), free_memory() // (JOB_GB * 1024**3)))


def environment(home: Path, architectures: list[str], links: Path) -> dict[str, str]:
    """What torch's build reads. ``links`` gets a libcudart.so: linking asks for it without the version in its name."""
    links.mkdir(parents=True, exist_ok=True)
    link = links / "libcudart.so"
    link.unlink(missing_ok=True)
    link.symlink_to(home / "lib" / "libcudart.so.13")
    tools = [str(home / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]  # nvcc, ninja, the host's
    libraries = [str(links), *filter(None, [os.environ.get("LIBRARY_PATH")])]
    return {
        **os.environ,
        "CUDA_HOME": str(home),
        "PATH": os.pathsep.join(tools),
        "LIBRARY_PATH": os.pathsep.join(libraries),
        "TORCH_CUDA_ARCH_LIST": ";".join(architectures),
        "MAX_JOBS": str(jobs()),
        "PYTHONUNBUFFERED": "1",
    }


def compile_sources(folder: str) -> None:
    """Runs in a process of its own, in that environment: gsplat's sources with the flags that gsplat gives them."""
    from torch.utils.cpp_extension import load

    cuda = package_folder("gsplat") / "cuda"
    sources = [*sorted(cuda.glob("csrc/*.cu")), *sorted(cuda.glob("csrc/*.cpp")), cuda / "ext.cpp"]
    load(
        name=gsplat_build.MODULE,
        sources=[str(source) for source in sources],
        extra_cflags=["-O3", "-Wno-attributes"],
        extra_cuda_cflags=["-O3", "-use_fast_math"],
        extra_include_paths=[str(cuda / "include"), str(cuda / "csrc/third_party/glm")],
        build_directory=folder,
        verbose=True,
    )


def progress(line: str, seconds: float) -> str | None:
    """ninja's ``[3/27] command`` in short; None for any other line of the output."""
    found = re.match(r"\[(\d+)/(\d+)\] (.*)", line)
    if found is None:
        return None
    source = re.search(r" -c (\S+)", found[3])
    what = Path(source[1]).name if source else "linking"
    return f"  [{found[1]:>{len(found[2])}}/{found[2]}] {seconds // 60:.0f}:{seconds % 60:02.0f}  {what}"


def run(command: list[str], variables: dict[str, str], log: Path, lock: int) -> int:
    """Run the build with its output in ``log`` and its progress on the terminal; its exit status.

    It holds the file descriptor ``lock``, too: no other begins while it lives, whatever becomes of this process.
    """
    started = time.monotonic()
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True, pass_fds=[lock],
        ) as child,
    ):  # fmt: skip
        assert child.stdout is not None
        try:
            for line in child.stdout:
                file.write(line)
                told = progress(line, time.monotonic() - started)
                if told:
                    print(told, flush=True)
        except BaseException:  # interrupted: ninja ends its compilers and removes their halves
            os.killpg(child.pid, signal.SIGINT)
            raise
    return child.returncode


def build(architectures: list[str]) -> Path:
    """Compile for these compute capabilities; the path of the library. Raises BuildError."""
    home = toolkit()
    package_folder("gsplat")
    check_machine()
    folder = gsplat_build.folder(architectures)
    work = folder / "build"
    work.mkdir(parents=True, exist_ok=True)
    with (folder / "in_progress").open("w") as ours:
        try:
            fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BuildError(f"another build is at work in {folder}") from error
        (work / "lock").unlink(missing_ok=True)  # torch waits for ever for a lock that a killed build has left
        variables = environment(home, architectures, work / "links")
        if shutil.which("ninja", path=variables["PATH"]) is None:
            raise BuildError("no ninja; run: scripts/install.sh gpu")
        print(
            f"Compiling gsplat's CUDA code for compute capability {', '.join(architectures)}, "
            f"{variables['MAX_JOBS']} files at once ({folder / 'build.log'}) ...",
            flush=True,
        )
        started = time.monotonic()
        call = "import sys; from scripts.ops.build_gsplat import compile_sources; compile_sources(sys.argv[1])"
        if run([sys.executable, "-c", call, str(work)], variables, folder / "build.log", ours.fileno()) != 0:
            raise BuildError(reason(folder / "build.log", variables["MAX_JOBS"]))
        library = folder / f"{gsplat_build.MODULE}.so"
        os.replace(work / library.name, library)  # only a whole one, which has been imported, is ever there
        shutil.rmtree(work)
        print(f"gsplat is built: {library}, {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
    return library


def reason(log: Path, given_jobs: str) -> str:
    """What a failed build says, from the file that failed on, and what helps when it was memory."""
    text = log.read_text()
    lines = text.splitlines()
    failed = next((number for number, line in enumerate(lines) if line.startswith("FAILED:")), -LINES)
    said = "\n".join(line[:200] for line in lines[failed:][:LINES])
    if re.search(r"signal 9|Killed|[Oo]ut of memory|Cannot allocate memory", text):
        fewer = f"MAX_JOBS=1 {gsplat_build.BUILD_COMMAND}"
        return f"out of memory with {given_jobs} files at once; with fewer: {fewer}\n{said}"
    return f"the compiler failed, its whole output is in {log}\n{said}"


def compute_capability(text: str) -> str:
    if re.fullmatch(r"[1-9]\d?\.\d", text) is None or tuple(map(int, text.split("."))) < gsplat_build.OLDEST:
        raise argparse.ArgumentTypeError(f"{text!r} is no compute capability from 7.5 on, such as 8.9")
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="build_gsplat", description="Compile gsplat's CUDA code, unless it is there.")
    parser.add_argument(
        "--arch",
        type=compute_capability,
        nargs="+",
        metavar="X.Y",
        help="compute capabilities to compile for (default: those of the cards that are here)",
    )
    arguments = parser.parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal, too, must not leave compilers behind
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        if arguments.arch:
            architectures = sorted(set(arguments.arch), key=float)
        elif not (architectures := gsplat_build.capabilities()):
            raise BuildError(
                f"torch {torch.__version__} can use no GPU here: it needs compute capability 7.5 and a driver for CUDA "
                f"{torch.version.cuda} (580 or newer). For another machine's card: --arch 8.9"
            )
        library = gsplat_build.find(architectures)
        if library is None:
            build(architectures)
        else:
            print(f"gsplat is built already: {library}")
    except importlib.metadata.PackageNotFoundError:
        print(f"build_gsplat: gsplat is not installed; run: {INSTALL}", file=sys.stderr)
        return 1
    except BuildError as error:
        print(f"build_gsplat: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
