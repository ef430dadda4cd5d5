"""What a GPU's memory holds, as PyTorch's allocator counts it."""

from __future__ import annotations


def measure(device: str) -> dict[str, int] | None:
    """Bytes of ``device``: total of the card; used by tensors, now and at most; reserved from the driver for them.

    None on a CPU. Takes microseconds and does not wait for the GPU: to be called between ticks.
    """
    if not device.startswith("cuda"):
        return None
    import torch  # seconds to import, and never needed on a CPU

    if not torch.cuda.is_initialized():  # counting must not be what takes a GPU into use
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
    """What the card calls itself."""
    if not device.startswith("cuda"):
        return "CPU"
    import torch

    return torch.cuda.get_device_name(device)
