"""What `lowmem.benchmarks.experiments.peers.command` compares, and what it found, as values: the contents of results/peers.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowmem.benchmarks.common.processes import Usage
from lowmem.benchmarks.common.records import Origin, Repeated, Subject, TextQuality

Peer = Literal["lowmem", "GPTQModel", "AutoRound", "bitsandbytes", "llama.cpp", "none"]
WIDTHS = ((8, 128), (4, 128), (3, 64), (2, 32))
"""(bits, group size) of everything in GPTQ's format: lowmem's own groups for each width."""
LLAMA_PLAIN = (
    "BF16", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_0", "Q3_K_M", "Q2_K",
)  # fmt: skip
LLAMA_IMPORTANCE = ("Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q4_0", "Q3_K_M", "IQ3_S", "IQ3_XXS",
                    "Q2_K", "IQ2_S")  # fmt: skip
SPEED_LLAMA = ("BF16", "Q8_0", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")


@dataclass(frozen=True)
class Form:
    """One form of the model. key: its name among the files of a run. kind: "8-bit g128" (bits and
    group_size), "bfloat16", "int8", "NF4", or one of llama.cpp's. importance: llama.cpp weighs the error of
    each input by its mean square on the calibration rows."""

    key: str
    peer: Peer
    kind: str
    bits: int = 0
    group_size: int = 0
    importance: bool = False

    @property
    def label(self) -> str:
        """For tables: unique."""
        name = self.kind if self.peer == "none" else f"{self.peer} {self.kind}"
        return f"{name} + importance" if self.importance else name


@dataclass(frozen=True)
class FormResult:
    """A form's figures. recipe: what was asked of its maker. conversion: of the process that made it; None
    for what is quantized while it is loaded. failure: why there are no figures, else empty. In `subject`
    weight_bytes counts what is stored of the whole model."""

    peer: str
    subject: Subject
    recipe: str
    conversion: Usage | None
    texts: tuple[TextQuality, ...]
    failure: str


@dataclass(frozen=True)
class RuntimeSpeed:
    """A form in the runtime that is its own. kernel: what multiplies. prefill: tokens/s of the whole prompt.
    decode: seconds a token, median of each round. load_averages: of the machine, before each round."""

    peer: str
    label: str
    kernel: str
    load_seconds: float
    peak_bytes: int
    prefill: Repeated | None
    decode: Repeated | None
    load_averages: tuple[float, ...]
    failure: str


@dataclass(frozen=True)
class SpeedTable:
    """One model in all runtimes, in turns: each round measures every runtime once. most_seconds: a round's
    decoding stops after so long, with fewer tokens."""

    model: str
    prompt_tokens: int
    new_tokens: int
    threads: int
    rounds: int
    most_seconds: float
    runtimes: tuple[RuntimeSpeed, ...]


@dataclass(frozen=True)
class PeersRecord:
    """`peers.json`. calibration: the rows that every converter got. left_out: peers that are not here."""

    origin: Origin
    calibration: str
    autoround_iterations: int
    peer_versions: tuple[tuple[str, str], ...]
    left_out: tuple[str, ...]
    forms: tuple[FormResult, ...]
    speed: tuple[SpeedTable, ...]
    format: int = 1


def quality_forms(peers: frozenset[str], dtype: str) -> tuple[Form, ...]:
    """All forms of the peers that are here, lowmem's and the unquantized model (in `dtype`) always."""
    found = [Form("dense", "none", f"{dtype} arithmetic")]
    for peer in ("lowmem", "GPTQModel", "AutoRound"):
        if peer in peers or peer == "lowmem":
            found += gptq_forms(peer)
    if "bitsandbytes" in peers:
        found += [Form("bnb-int8", "bitsandbytes", "int8"), Form("bnb-nf4", "bitsandbytes", "NF4")]
    if "llama.cpp" in peers:
        found += [Form(f"llama-{kind}", "llama.cpp", kind) for kind in LLAMA_PLAIN]
        found += [
            Form(f"llama-{kind}-importance", "llama.cpp", kind, importance=True) for kind in LLAMA_IMPORTANCE
        ]
    return tuple(found)


def gptq_forms(peer: str) -> list[Form]:
    """The widths that are written in GPTQ's format."""
    name: Peer = {"lowmem": "lowmem", "GPTQModel": "GPTQModel", "AutoRound": "AutoRound"}[peer]  # type: ignore[assignment]
    return [
        Form(f"{peer.lower()}-{bits}", name, f"{bits}-bit g{group}", bits, group) for bits, group in WIDTHS
    ]


def speed_forms(peers: frozenset[str], dtype: str) -> tuple[Form, ...]:
    """Those that are timed: AutoRound's are GPTQ's format and run as GPTQModel's do."""
    return tuple(
        form
        for form in quality_forms(peers, dtype)
        if form.peer != "AutoRound"
        and not form.importance
        and (form.peer != "llama.cpp" or form.kind in SPEED_LLAMA)
    )
