"""GPU memory in use, as counted by PyTorch's allocator."""

from __future__ import annotations


def measure(device: str) -> dict[str, int] | None:
    """Bytes of ``device``: total, used by tensors now and at peak, reserved from the driver. None on a CPU.

    Takes microseconds and does not synchronise with the GPU.
    """
    if not device.startswith("cuda"):
        return None
    import torch  # takes seconds to import, and is not needed on a CPU

    if not torch.cuda.is_initialized():  # counting must not initialise CUDA
        return None
    counts = torch.cuda.memory_stats_as_nested_dict(device)  # one call; memory_allocated() and the like flatten it
    used, reserved = counts["allocated_bytes"]["all"], counts["reserved_bytes"]["all"]
    return {
        "total_bytes": torch.cuda.get_device_properties(device).total_memory,
        "used_bytes": used["current"],
        "peak_bytes": used["peak"],
        "reserved_bytes": reserved["current"],
    }


def device_name(device: str) -> str:
    """The card's name, or "CPU"."""
    if not device.startswith("cuda"):
        return "CPU"
    import torch

    return torch.cuda.get_device_name(device)
