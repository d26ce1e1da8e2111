"""What a day at a card found: the contents of gpu_day.json."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.benchmarks.common.records import Origin


@dataclass(frozen=True)
class Step:
    """One step of the day."""

    name: str
    status: str
    """"ok", "failed" or "skipped"."""
    seconds: float
    text: str
    """What it printed last, or why it failed or was skipped."""


@dataclass(frozen=True)
class Product:
    """One linear multiplied by one kernel."""

    kernel: str
    version: str
    """How the weight is stored, as "4-bit g128" or "bfloat16"."""
    inputs: int
    outputs: int
    rows: int
    seconds: float
    """Of a product; 0 where it failed."""
    nbytes: int
    """Of the weight with its scales and zero-points."""
    problem: str = ""
    """Why there is no time."""

    @property
    def rate(self) -> float:
        """Bytes of the weight a second."""
        return self.nbytes / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class ModelRun:
    """A made-up model of StarChat Alpha's layers in one version: its memory, and its pace."""

    version: str
    kernel: str
    layers: int
    context: int
    planned: int
    """Bytes on the device by the plan: weights, KV cache and workspace."""
    peak: int
    """Bytes that torch allocated at the peak of loading, a prefill of the whole context and decode."""
    decode: float
    """Tokens a second."""
    prefill: float
    """Tokens a second."""


@dataclass(frozen=True)
class GpuDay:
    """`gpu_day.json`."""

    origin: Origin
    device: str
    """Its name and memory."""
    bandwidth: float
    """Bytes a second that a copy reads and writes."""
    steps: tuple[Step, ...]
    products: tuple[Product, ...]
    models: tuple[ModelRun, ...]
