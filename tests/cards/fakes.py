"""Cards that are not in this machine: torch's functions for them, replaced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

GIB = 1 << 30


class FakeCards:
    """What a fake card was asked to do, by the name of torch's function."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.free = 11 * GIB
        self.allocated = 2 * GIB

    def noted(self, name: str, result: Any = None) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> Any:
            self.calls.append(name)
            return result

        return call


def no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without cards, whatever this one has."""
    monkeypatch.setattr(torch.version, "hip", None)
    for module in (torch.cuda, torch.xpu, torch.backends.mps):
        monkeypatch.setattr(module, "is_available", lambda: False)


def _discrete(monkeypatch: pytest.MonkeyPatch, module: Any, properties: Any, count: int) -> FakeCards:
    no_cards(monkeypatch)
    fake = FakeCards()

    class Graph:
        def pool(self) -> str:
            return "pool"

        def replay(self) -> None:
            fake.calls.append("replay")

    @contextlib.contextmanager
    def capture(graph: Graph, pool: Any = None) -> Any:
        fake.calls.append(f"capture {pool}")
        yield

    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "get_device_properties": lambda device: properties,
        "mem_get_info": lambda device: (fake.free, properties.total_memory),
        "memory_allocated": lambda device: fake.allocated,
        "max_memory_allocated": lambda device: 2 * fake.allocated,
        "reset_peak_memory_stats": fake.noted("reset_peak_memory_stats"),
        "synchronize": fake.noted("synchronize"),
        "empty_cache": fake.noted("empty_cache"),
        "is_bf16_supported": lambda including_emulation=True: True,
        "device": lambda device: contextlib.nullcontext(),
        "graph": capture,
        "CUDAGraph" if module is torch.cuda else "XPUGraph": Graph,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(module, name, value)
    return fake


def cuda(monkeypatch: pytest.MonkeyPatch, count: int = 1) -> FakeCards:
    """NVIDIA cards."""
    properties = SimpleNamespace(
        name="NVIDIA GeForce RTX 3060",
        major=8,
        minor=6,
        total_memory=12 * GIB,
        multi_processor_count=28,
        is_integrated=0,
    )
    return _discrete(monkeypatch, torch.cuda, properties, count)


def rocm(monkeypatch: pytest.MonkeyPatch, count: int = 1) -> FakeCards:
    """AMD cards, which torch calls cuda."""
    properties = SimpleNamespace(
        name="AMD Radeon RX 7800 XT",
        major=11,
        minor=0,
        gcnArchName="gfx1101:sramecc-:xnack-",
        total_memory=16 * GIB,
        multi_processor_count=30,
        is_integrated=0,
    )
    fake = _discrete(monkeypatch, torch.cuda, properties, count)
    monkeypatch.setattr(torch.version, "hip", "7.1.25424")
    monkeypatch.setattr(torch.version, "cuda", None)
    return fake


def xpu(
    monkeypatch: pytest.MonkeyPatch, count: int = 1, *, integrated: bool = False, float64: bool = True
) -> FakeCards:
    """Intel cards."""
    properties = SimpleNamespace(
        name="Intel(R) Arc(TM) B580 Graphics",
        total_memory=12 * GIB,
        gpu_subslice_count=20,
        max_compute_units=160,
        has_bfloat16_conversions=True,
        has_fp64=float64,
        is_integrated_gpu=integrated,
    )
    return _discrete(monkeypatch, torch.xpu, properties, count)


def mps(monkeypatch: pytest.MonkeyPatch, *, most: int = 12 * GIB, given: int = GIB) -> FakeCards:
    """An Apple GPU. most: bytes that Metal recommends to use; given: bytes that torch holds already."""
    no_cards(monkeypatch)
    fake = FakeCards()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: major <= 15)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M3", raising=False)
    replaced: dict[str, Any] = {
        "recommended_max_memory": lambda: most,
        "driver_allocated_memory": lambda: given,
        "current_allocated_memory": lambda: fake.allocated,
        "synchronize": fake.noted("synchronize"),
        "empty_cache": fake.noted("empty_cache"),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.mps, name, value)
    return fake
