"""Models of diffusers and transformers from a folder, exactly.

Their own ``from_pretrained`` fills what a file lacks with random numbers and says so in a log; here it is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from generation.weights.loading import remedy
from generation.weights.registry import Entry, WeightsError

#: messages of a plain RuntimeError that mean a failure of the GPU, its libraries or its memory
_DEVICE_MARKS = (
    "CUDA error", "CUDA driver error", "CUDA out of memory", "cuDNN", "CUDNN_", "CUBLAS_", "CUSOLVER_", "CUSPARSE_",
    "CUFFT_", "NVRTC_", "NCCL", "Triton Error", "NVIDIA driver", "no kernel image", "DefaultCPUAllocator",
)  # fmt: skip
#: what loaders raise for files that are damaged or of another kind
_OF_FILES = (
    OSError, ValueError, LookupError, TypeError, AttributeError, SyntaxError, RuntimeError, SafetensorError,
)  # fmt: skip


@contextmanager
def naming(entry: Entry) -> Iterator[None]:
    """Raise errors while an entry's files are loaded as WeightsError, which names the model and what to do.

    Errors of the device stay RuntimeError, or what torch raises for them.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except _OF_FILES as error:
        if (fault := _device_fault(error)) is not None:
            raise RuntimeError(f"{entry.name} can not be loaded, for the device failed: {fault}") from error
        reason = " ".join(str(error).split())
        raise WeightsError(f"{entry.name} can not be loaded: {reason}; {remedy(entry)}") from error


def _device_fault(error: BaseException | None) -> str | None:
    """The message of a device error in the chain of ``error``, else None."""
    while error is not None:
        special = isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError)
        if special or (type(error) is RuntimeError and any(mark in str(error) for mark in _DEVICE_MARKS)):
            return " ".join(str(error).split())
        error = error.__cause__ or error.__context__
    return None


def load_model(kind: type[Any], folder: Path, dtype: torch.dtype) -> Any:
    """An instance of ``kind`` with a folder's config and weights. Raises WeightsError naming folder and keys."""
    name = "torch_dtype" if issubclass(kind, diffusers.ModelMixin) else "dtype"
    try:
        model, about = kind.from_pretrained(folder, **{name: dtype}, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{folder}: not a usable {kind.__name__}: {error}") from error
    wrong = {key: sorted(map(str, about[key])) for key in ("missing_keys", "mismatched_keys") if about.get(key)}
    if wrong:
        key, names = next(iter(wrong.items()))
        raise WeightsError(f"{folder}: not the weights of its {kind.__name__}: {key}: {', '.join(names[:5])}")
    return model


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a diffusers folder by name, from safetensors or else from a pickle. Raises WeightsError."""
    safe, pickled = (folder / f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin"))
    try:
        if safe.exists() or not pickled.exists():
            return load_file(safe)
        return torch.load(pickled, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise WeightsError(f"{folder}: no usable weights: {error}") from error
