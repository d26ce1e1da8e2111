"""What `curve` measures and what it found: the contents of results/curve.json."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.benchmarks.common.records import Origin

MIXED, UNIFORM = "lowmem mixed", "lowmem uniform"
K_QUANT, I_QUANT, AUTOSCHEME = "K-quant", "I-quant", "AutoScheme"
"""The families of versions."""
PEERS = (K_QUANT, I_QUANT, AUTOSCHEME)
AVERAGES = (2.2, 2.4, 2.7, 3.2, 3.5, 3.75, 4.6, 5.2, 6.2)
"""Stored bits per weight of the mixed versions."""
WIDTHS = (2, 3, 4, 5, 6, 8)
"""Of the uniform versions, in groups of GROUP_SIZE."""
GROUP_SIZE = 128
K_QUANTS = (
    "Q2_K_S", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K",
)  # fmt: skip
I_QUANTS = (
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_XS", "IQ4_NL",
)  # fmt: skip
NEEDS_IMPORTANCE = frozenset({"Q2_K_S", *I_QUANTS}) - {"IQ4_XS", "IQ4_NL", "IQ3_S", "IQ3_M"}
"""Types that llama.cpp makes with an importance matrix only, or recommends only with one."""


@dataclass(frozen=True)
class Version:
    """One version of the model."""

    key: str
    """Its name among the files of a run."""
    family: str
    """MIXED, UNIFORM, or one of PEERS."""
    kind: str
    """llama.cpp's name of the type; "" for other families."""
    target: float = 0.0
    """Wanted bits: the width of a uniform version, the average of a mixed one; 0 for llama.cpp's."""
    importance: bool = False
    """llama.cpp weights the error of each input by its mean square on the calibration rows."""

    @property
    def label(self) -> str:
        """For tables: unique."""
        if self.kind:
            return f"{self.kind} + importance" if self.importance else self.kind
        if self.family == UNIFORM:
            return f"{self.target:.0f}-bit g{GROUP_SIZE}"
        return f"{self.family} {self.target:g}"


@dataclass(frozen=True)
class Divergence:
    """The KL divergence of a version on one text."""

    text: str
    tokens: int
    kld: float
    """Mean over all positions, in nats."""
    standard_error: float


@dataclass(frozen=True)
class Point:
    """The figures of a version."""

    label: str
    family: str
    target: float
    """See Version.target."""
    bits: float
    """Stored bits per weight of the decoder layers' linears."""
    widths: tuple[tuple[str, int], ...]
    """(how linears are stored, their number)."""
    texts: tuple[Divergence, ...]
    failure: str = ""
    """Why figures are missing, else empty."""

    def kld(self, text: str) -> float:
        """The mean KL divergence on a text. Raises StopIteration for an unknown one."""
        return next(found.kld for found in self.texts if found.text == text)


@dataclass(frozen=True)
class CurveRecord:
    """`curve.json`."""

    origin: Origin
    calibration: str
    """The rows that every converter got."""
    autoround_iterations: int
    peer_versions: tuple[tuple[str, str], ...]
    left_out: tuple[str, ...]
    """A line for each peer that was not installed."""
    points: tuple[Point, ...]
    kept: Origin | None = None
    """Of the earlier record from which the points of other versions are kept."""

    def of(self, *families: str) -> list[Point]:
        """The measured versions of some families, by their bits."""
        found = [p for p in self.points if p.family in families and not p.failure]
        return sorted(found, key=lambda p: p.bits)

    def texts(self) -> list[str]:
        """The names of the texts."""
        return list(dict.fromkeys(found.text for point in self.points for found in point.texts))


def all_versions(peers: frozenset[str]) -> tuple[Version, ...]:
    """Every version of lowmem and of the installed peers ("llama.cpp", "AutoRound")."""
    found = [Version(f"uniform-{bits}", UNIFORM, "", bits) for bits in WIDTHS]
    found += [Version(f"mixed-{average:g}", MIXED, "", average) for average in AVERAGES]
    if "llama.cpp" in peers:
        for family, kinds in ((K_QUANT, K_QUANTS), (I_QUANT, I_QUANTS)):
            for kind in kinds:
                found.append(Version(f"llama-{kind}-importance", family, kind, importance=True))
                if kind not in NEEDS_IMPORTANCE:
                    found.append(Version(f"llama-{kind}", family, kind))
    if "AutoRound" in peers:
        found += [Version(f"autoscheme-{a:g}", AUTOSCHEME, "", a) for a in AVERAGES]
    return tuple(found)
