"""What is told about a GPU's memory. There is none here, so PyTorch's own counters are stood in for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from generation.engine import gpu_memory


def test_a_cpu_has_a_name_and_no_memory_of_its_own() -> None:
    assert gpu_memory.device_name("cpu") == "CPU"
    assert gpu_memory.measure("cpu") is None


def test_the_allocators_counters_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {
        "allocated_bytes": {"all": {"current": 5, "peak": 9}, "small_pool": {"current": 1, "peak": 1}},
        "reserved_bytes": {"all": {"current": 12, "peak": 13}},
    }
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: counts)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=24))
    assert gpu_memory.measure("cuda:0") == {"total_bytes": 24, "used_bytes": 5, "peak_bytes": 9, "reserved_bytes": 12}


def test_counting_takes_no_gpu_into_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert gpu_memory.measure("cuda:0") is None
