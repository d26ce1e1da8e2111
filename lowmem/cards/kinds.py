"""NVIDIA's, AMD's, Intel's and Apple's cards. Only this module asks torch.cuda, torch.xpu and
torch.mps, beside `kernels/card_timing.py`, which times with events and graphs of torch.cuda.

Importing it imports no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.cards.contract import Cards, Properties

if TYPE_CHECKING:
    import torch


class _CudaLike(Cards):
    """torch.cuda, and torch.xpu, which has the same functions."""

    graph_class: str

    @property
    def _module(self) -> Any:
        import torch

        return getattr(torch, self.type)

    def count(self) -> int:
        return int(self._module.device_count()) if self._module.is_available() else 0

    def memory(self, device: torch.device) -> tuple[int, int]:
        free, total = self._module.mem_get_info(device)
        return int(free), int(total)

    def synchronize(self, device: torch.device) -> None:
        self._module.synchronize(device)

    def empty_cache(self) -> None:
        self._module.empty_cache()

    def allocated(self, device: torch.device) -> int:
        return int(self._module.memory_allocated(device))

    def peak(self, device: torch.device) -> int:
        return int(self._module.max_memory_allocated(device))

    def reset_peak(self, device: torch.device) -> bool:
        self._module.reset_peak_memory_stats(device)
        return True

    def why_no_graph(self) -> str:
        return "" if hasattr(self._module, self.graph_class) else super().why_no_graph()

    @contextlib.contextmanager
    def capturing(self, device: torch.device, pool: Any) -> Iterator[Any]:
        graph = getattr(self._module, self.graph_class)()
        with self.using(device), self._module.graph(graph, pool=pool):
            yield graph

    def using(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        context: contextlib.AbstractContextManager[Any] = self._module.device(device)
        return context


class CudaCards(_CudaLike):
    """NVIDIA's."""

    type = "cuda"
    label = "CUDA"
    maker = "NVIDIA"
    triton = "nvidia"
    graph_class = "CUDAGraph"
    timed = True
    visibility = "Check the output of nvidia-smi, and $CUDA_VISIBLE_DEVICES"

    def build(self) -> str:
        import torch

        return f"CUDA {torch.version.cuda}" if torch.version.cuda else ""

    def driver_present(self) -> bool:
        return _loads("libcuda.so.1", "nvcuda.dll")

    def properties(self, device: torch.device) -> Properties:
        found = self._module.get_device_properties(device)
        with self.using(device):
            bfloat16 = bool(self._module.is_bf16_supported(including_emulation=False))
        return Properties(
            found.name,
            int(found.total_memory),
            self._capability(found),
            int(found.multi_processor_count),
            bfloat16,
            float64=True,
            shares_memory=bool(getattr(found, "is_integrated", False)),
        )

    def _capability(self, found: Any) -> str:
        return f"{found.major}.{found.minor}"


class RocmCards(CudaCards):
    """AMD's. torch calls them "cuda" and maps its functions to HIP's."""

    label = "ROCm"
    maker = "AMD"
    triton = "amd"
    visibility = "Check the output of rocminfo, and $HIP_VISIBLE_DEVICES"

    def build(self) -> str:
        import torch

        return f"ROCm {torch.version.hip}" if torch.version.hip else ""

    def driver_present(self) -> bool:
        """The kernel's driver is enough, as torch brings HIP along."""
        return _exists("/dev/kfd") or _loads("libamdhip64.so", "amdhip64_7.dll", "amdhip64_6.dll")

    def _capability(self, found: Any) -> str:
        """As "gfx1100", without the features that follow a colon."""
        return str(getattr(found, "gcnArchName", "")).partition(":")[0]


class XpuCards(_CudaLike):
    """Intel's."""

    type = "xpu"
    label = "XPU"
    maker = "Intel"
    triton = "intel"
    graph_class = "XPUGraph"
    visibility = "Check the output of xpu-smi discovery, and $ZE_AFFINITY_MASK"

    def build(self) -> str:
        import torch

        return "XPU" if getattr(torch.version, "xpu", None) else ""

    def driver_present(self) -> bool:
        return _loads("libze_intel_gpu.so.1", "libze_loader.so.1", "ze_loader.dll")

    def properties(self, device: torch.device) -> Properties:
        found = self._module.get_device_properties(device)
        cores = getattr(found, "gpu_subslice_count", 0) or getattr(found, "max_compute_units", 1)
        return Properties(
            found.name,
            int(found.total_memory),
            "",
            int(cores),
            bfloat16=bool(getattr(found, "has_bfloat16_conversions", False)),
            float64=bool(getattr(found, "has_fp64", False)),
            shares_memory=bool(getattr(found, "is_integrated_gpu", False)),
        )


class MpsCards(Cards):
    """Apple's GPU, of which a machine has one. Its memory is the host's."""

    type = "mps"
    label = "MPS"
    maker = "Apple"
    triton = ""
    pins = False
    visibility = "torch needs macOS 14 or later"

    def build(self) -> str:
        import torch

        return "MPS" if torch.backends.mps.is_built() else ""

    def driver_present(self) -> bool:
        return sys.platform == "darwin" and platform.machine() == "arm64"

    def count(self) -> int:
        import torch

        return int(torch.backends.mps.is_available())

    def properties(self, device: torch.device) -> Properties:
        import torch

        name = getattr(torch.backends.mps, "get_name", lambda: "Apple GPU")()
        bfloat16 = bool(torch.backends.mps.is_macos_or_newer(14, 0))
        return Properties(name, self.memory(device)[1], "", 1, bfloat16, float64=False, shares_memory=True)

    def memory(self, device: torch.device) -> tuple[int, int]:
        """total: what Metal recommends to use at most. free: what is left, and what the host has."""
        import psutil
        import torch

        most = int(torch.mps.recommended_max_memory())
        left = most - int(torch.mps.driver_allocated_memory())
        return max(0, min(left, int(psutil.virtual_memory().available))), most

    def synchronize(self, device: torch.device) -> None:
        import torch

        torch.mps.synchronize()

    def empty_cache(self) -> None:
        import torch

        torch.mps.empty_cache()

    def allocated(self, device: torch.device) -> int:
        import torch

        return int(torch.mps.current_allocated_memory())

    def peak(self, device: torch.device) -> int:
        """torch counts no peak. What Metal has given to it includes what was freed."""
        import torch

        return int(torch.mps.driver_allocated_memory())

    def reset_peak(self, device: torch.device) -> bool:
        return False


CUDA, ROCM, XPU, MPS = CudaCards(), RocmCards(), XpuCards(), MpsCards()
KINDS: tuple[Cards, ...] = (CUDA, ROCM, XPU, MPS)


def _exists(path: str) -> bool:
    return Path(path).exists()


def _loads(*libraries: str) -> bool:
    """Whether one of the shared libraries can be loaded."""
    for name in libraries:
        with contextlib.suppress(OSError):
            ctypes.CDLL(name)
            return True
    return False
