"""What `peers` compares and what it found: the contents of results/peers.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowmem.benchmarks.common.records import Origin, Subject, TextQuality
from lowmem.benchmarks.experiments.processes import Usage
from lowmem.benchmarks.experiments.starchat.dimensions import WIDTHS

Peer = Literal["lowmem", "GPTQModel", "AutoRound", "bitsandbytes", "llama.cpp", "none"]
LLAMA_PLAIN = ["BF16", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_0", "Q3_K_M", "Q2_K"]
LLAMA_IMPORTANCE = (
    "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q4_0", "Q3_K_M", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S",
)  # fmt: skip


@dataclass(frozen=True)
class Version:
    """One version of the model."""

    key: str
    """Its name among the files of a run."""
    peer: Peer
    kind: str
    """ "8-bit g128" (with bits and group_size), "bfloat16 arithmetic", "int8", "NF4", or llama.cpp's name."""
    bits: int = 0
    group_size: int = 0
    importance: bool = False
    """llama.cpp weights the error of each input by its mean square on the calibration rows."""
    of: str = ""
    """The key of the version that this one is exported from, or whose file it reads; see `exported`."""

    @property
    def label(self) -> str:
        """For tables: unique."""
        name = self.kind if self.peer == "none" or self.of else f"{self.peer} {self.kind}"
        return f"{name} + importance" if self.importance else name

    @property
    def method(self) -> str:
        """How it is loaded: dense, gptq, int8, nf4, gguf, or unpacked: a GGUF's weights in float32."""
        if self.peer == "none":
            return "unpacked" if self.of else "dense"
        return "gguf" if self.peer == "llama.cpp" else {"int8": "int8", "NF4": "nf4"}.get(self.kind, "gptq")


@dataclass(frozen=True)
class VersionResult:
    """The figures of a version."""

    peer: str
    subject: Subject
    """weight_bytes: the stored bytes of the whole model."""
    recipe: str
    """The settings of its converter, as JSON."""
    conversion: Usage | None
    """Of the process that made it; None for what is quantized while it is loaded."""
    texts: tuple[TextQuality, ...]
    failure: str
    """Why figures are missing, else empty."""


@dataclass(frozen=True)
class PeersRecord:
    """`peers.json`."""

    origin: Origin
    calibration: str
    """The rows that every converter got."""
    autoround_iterations: int
    peer_versions: tuple[tuple[str, str], ...]
    left_out: tuple[str, ...]
    """A line for each peer that was not installed."""
    versions: tuple[VersionResult, ...]


def all_versions(peers: frozenset[str], dtype: str) -> tuple[Version, ...]:
    """Every version of the installed peers, lowmem's, and the unquantized model computed in `dtype`."""
    found = [Version("dense", "none", f"{dtype} arithmetic")]
    gptq: tuple[Peer, ...] = ("lowmem", "GPTQModel", "AutoRound")
    for peer in gptq:
        if peer in peers or peer == "lowmem":
            found += [Version(f"{peer.lower()}-{b}", peer, f"{b}-bit g{g}", b, g) for b, g in WIDTHS]
    if "bitsandbytes" in peers:
        found += [Version("bnb-int8", "bitsandbytes", "int8"), Version("bnb-nf4", "bitsandbytes", "NF4")]
    if "llama.cpp" in peers:
        found += [Version(f"llama-{kind}", "llama.cpp", kind) for kind in LLAMA_PLAIN]
        found += [
            Version(f"llama-{kind}-importance", "llama.cpp", kind, importance=True)
            for kind in LLAMA_IMPORTANCE
        ]
    return tuple(found)
