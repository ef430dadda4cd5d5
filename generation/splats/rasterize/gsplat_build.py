"""gsplat's compiled CUDA code: where a build for this machine's cards is kept, and how gsplat gets it.

Left to itself gsplat compiles on its first call, for minutes and in the middle of a request. It looks for a module
`gsplat.csrc` before that, so the service gives it the build that `python -m scripts.ops.build_gsplat` made, and needs
neither a compiler nor an environment variable to run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import threading
from functools import cache
from pathlib import Path

import torch

CACHE = Path(__file__).resolve().parents[3] / ".cache" / "gsplat"
MODULE = "gsplat_cuda"
BUILD_COMMAND = ".venv/bin/python -m scripts.ops.build_gsplat"
OLDEST = (7, 5)  # compute capability; the compiler of CUDA 13 and torch's builds for it know nothing older
_loading = threading.Lock()  # each GPU's engine has a thread, and the module can be made once only


def capabilities() -> list[str]:
    """Compute capabilities of the cards that torch can use here, each once and ascending: ["8.9", "12.0"]."""
    if not torch.cuda.is_available():
        return []
    cards = {torch.cuda.get_device_capability(card) for card in range(torch.cuda.device_count())}
    return [f"{major}.{minor}" for major, minor in sorted(cards) if (major, minor) >= OLDEST]


def folder(architectures: list[str]) -> Path:
    """Where a build for these compute capabilities is kept; of a name of its own for all that it depends on."""
    versions = f"{importlib.metadata.version('gsplat')}-torch{torch.__version__}-{sys.implementation.cache_tag}"
    return CACHE / f"{versions}-sm{'_'.join(architectures)}"


def find(architectures: list[str]) -> Path | None:
    """A finished build that has all these compute capabilities, among others perhaps; None when there is none."""
    for library in sorted(CACHE.glob(f"{folder(['*']).name}/{MODULE}.so")):
        if set(architectures) <= set(library.parent.name.rpartition("-sm")[2].split("_")):
            return library
    return None


def is_built() -> bool:
    """Whether gsplat is installed and built for the cards that are here."""
    try:
        return find(capabilities()) is not None
    except importlib.metadata.PackageNotFoundError:
        return False


def load() -> None:
    """Give gsplat its compiled code. Raises RuntimeError with the command to run when there is none for these cards."""
    with _loading:
        _load()


@cache
def _load() -> None:
    architectures = capabilities()
    library = find(architectures)
    if library is None:
        raise RuntimeError(
            f"gsplat's CUDA code is not built for the cards that are here (compute capability "
            f"{', '.join(architectures)}); run: {BUILD_COMMAND}"
        )
    spec = importlib.util.spec_from_file_location(MODULE, library)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise RuntimeError(
            f"gsplat's build does not load: {error}; remove {library.parent}, then run: {BUILD_COMMAND}"
        ) from error
    sys.modules["gsplat.csrc"] = module
