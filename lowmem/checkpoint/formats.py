"""How the linears of a GPTQ checkpoint are stored, each by itself. Needs no torch.

A checkpoint where all linears are stored alike is the common case of a checkpoint where they differ: readers
ask for the format of a linear by its name, never for the format of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from lowmem.errors import SourceError

QUANT_PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""The stored tensors of a quantized linear, by the last part of their names."""
_WORD = 32


@dataclass(frozen=True)
class Layout:
    """How GPTQ's integers become words in a file: one `checkpoint_format` of the ecosystem."""

    name: str
    bits: tuple[int, ...]
    """The widths that it can store."""
    zeros_v2: bool
    """`qzeros` holds the zero-points themselves; otherwise each is stored less one."""
    planar: bool = False
    """Integers whose width does not divide 32 are stored in planes; otherwise as one stream of bits."""


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("gptq", (8, 4, 3, 2), zeros_v2=False),
        Layout("gptq_v2", (8, 4, 3, 2), zeros_v2=True),
        Layout("gptq_p", (8, 7, 6, 5, 4, 3, 2), zeros_v2=True, planar=True),
    )
}
"""The layouts that can be read, by name: the most widely read one first."""


def layout_for(bits: Iterable[int]) -> str:
    """The layout in which lowmem writes a checkpoint with linears of these widths.

    Raises ValueError when no layout stores them all.
    """
    wanted = set(bits)
    for layout in LAYOUTS.values():
        if wanted <= set(layout.bits):
            return layout.name
    raise ValueError(f"no layout stores {sorted(wanted)} bits")


@dataclass(frozen=True)
class LinearFormat:
    """How one quantized linear is stored."""

    bits: int
    """Bits of a weight, one of config.BITS."""
    group_size: int
    """Input columns that share a scale; -1 is one group for the whole row."""
    sym: bool = True
    """Every zero-point is the middle of the range."""
    desc_act: bool = False
    """`g_idx` may assign columns to groups in any order."""
    layout: str = ""
    """A key of LAYOUTS; by default the one that lowmem writes where all linears have this width."""

    def __post_init__(self) -> None:
        if not self.layout:
            object.__setattr__(self, "layout", layout_for((self.bits,)))

    @property
    def label(self) -> str:
        """The name shown to users, such as "4-bit g128"."""
        return f"{self.bits}-bit g{self.group_size}"

    def bits_per_weight(self, inputs: int) -> float:
        """Stored bits of a weight of a linear, with its share of scale and zero-point."""
        return self.bits + (16 + self.bits) / (inputs if self.group_size == -1 else self.group_size)

    @property
    def zeros_v2(self) -> bool:
        """See Layout.zeros_v2."""
        return LAYOUTS[self.layout].zeros_v2

    @property
    def planar(self) -> bool:
        """Whether its integers are stored in planes, of which each holds some of their bits."""
        return LAYOUTS[self.layout].planar and _WORD % self.bits != 0

    @property
    def unit(self) -> int:
        """The fewest values that fill whole words: inputs and outputs are multiples of it."""
        return _WORD if _WORD % self.bits else _WORD // self.bits


def packed_bytes(inputs: int, outputs: int, format: LinearFormat) -> int:
    """Bytes of a packed linear's tensors: words, zero-points, float16 scales, and g_idx."""
    groups = 1 if format.group_size == -1 else -(-inputs // format.group_size)
    words = inputs * format.bits // 32 * outputs + groups * (-(-outputs * format.bits // 32)) + inputs
    return 4 * words + 2 * groups * outputs


@dataclass(frozen=True)
class FormatException:
    """The linears that a regular expression names, and how they are stored: an entry of `dynamic`."""

    pattern: str
    """Matched at the beginning of a linear's name, as `re.match` does."""
    format: LinearFormat | None
    """None: these linears are not quantized."""

    @cached_property
    def is_supported(self) -> bool:
        """Whether the pattern is simple enough to be evaluated (see `covers`)."""
        few = self.pattern.count("(") <= _MOST_GROUPS  # alternatives may match one text in several ways
        return few and all(_PIECE.fullmatch(piece) for piece in self.pattern.split(".*"))

    def covers(self, linear: str) -> bool:
        """Whether the pattern matches the name of a linear.

        A pattern comes from a file that is not trusted, and some regular expressions take forever. So only
        literals, character classes, plain groups of alternatives and `.*` are evaluated, each piece between
        two `.*` at the first place where it matches. An unsupported pattern matches nothing.
        """
        if not self.is_supported:
            return False
        first, *rest = self.pattern.split(".*")
        match = re.match(first, linear)
        for piece in rest:
            match = match and re.compile(piece).search(linear, match.end())
        return match is not None


def exceptions_for(formats: Mapping[str, LinearFormat | None]) -> tuple[FormatException, ...]:
    """The exceptions that cover exactly these linears, given by full name.

    Those that are not quantized come first: GPTQModel puts them there whatever their place in the file.
    Linears of one format whose names differ in the first number, that of their layer, share a pattern.
    """
    layers: dict[tuple[LinearFormat | None, str, str], list[int]] = {}
    for name, format in formats.items():
        match = _NUMBER.fullmatch(name)
        before, number, after = match.groups() if match else ("", None, name)
        key = (format, re.escape(before), re.escape(after))
        layers.setdefault(key, []).append(-1 if number is None else int(number))
    found = []
    for (format, before, after), numbers in layers.items():
        choices = "|".join(str(number) for number in sorted(numbers) if number >= 0)
        between = f"(?:{choices})" if len(numbers) > 1 else choices
        found.append(FormatException(f"^{before}{between}{after}$", format))
    return tuple(sorted(found, key=lambda exception: exception.format is not None))


def mixed_label(bits: float) -> str:
    """The name shown to users of a version whose linears differ, by their average bits: "3.5-bit mixed"."""
    return f"{bits:.1f}-bit mixed"


# What precedes the first number in a dotted name, the number, and the rest.
_NUMBER = re.compile(r"((?:[^\d.][^.]*\.)*)(?:(0|[1-9]\d*)(?=\.))?(.*)", re.ASCII)
# Literals, `.`, classes, `\d+` before a dot or the end, (a|b) without quantifiers: little to backtrack.
_MOST_GROUPS = 8
_PIECE = re.compile(
    r"(?:[\w-]|\\[.d-]|\\d\+(?=\\\.|$)|\.|\[[\w-]+\]|\((?:\?:)?(?:[\w|-]|\\[.d-]|\[[\w-]+\])+\)|\^|\$)*",
    re.ASCII,
)


@dataclass(frozen=True)
class QuantizationFormat:
    """How the linears of a GPTQ checkpoint are stored: a default, and the linears that differ from it."""

    default: LinearFormat
    """Of every linear that no exception covers."""
    exceptions: tuple[FormatException, ...] = ()
    """The first one that covers a linear decides."""
    quantizer: tuple[str, ...] = ()
    """"name:version" of each tool that wrote the checkpoint."""
    origin: str = field(default="quantization_config", compare=False)
    """The file that says so, for messages."""

    def of(self, linear: str) -> LinearFormat | None:
        """The format of a linear by its dotted name; None where it is left in 16 bits."""
        return next((e.format for e in self.exceptions if e.covers(linear)), self.default)

    def of_packed(self, linear: str) -> LinearFormat:
        """The format of a linear whose tensors are packed; SourceError where the config says it is not."""
        found = self.of(linear)
        if found is None:
            raise SourceError(
                f"{linear} is quantized, but quantization_config excludes it (dynamic)",
                "The config.json and the weights are not of the same model",
            )
        return found

    def formats(self) -> Iterator[LinearFormat]:
        """Each distinct format, the default first."""
        yield from dict.fromkeys((self.default, *(e.format for e in self.exceptions if e.format)))

    @property
    def uniform(self) -> bool:
        """Whether all quantized linears have the same format."""
        return len(list(self.formats())) == 1

    @classmethod
    def mixture(
        cls, default: LinearFormat, linears: Mapping[str, LinearFormat | None] | None = None
    ) -> QuantizationFormat:
        """The format of a checkpoint whose linears are stored as `default`, but for those in `linears`.

        linears: by full name; None for one that is not quantized.
        """
        return cls(default, exceptions_for(linears or {}))

    @property
    def label(self) -> str:
        """The name shown to users: "4-bit g128", or "4/8-bit mixed" where linears differ."""
        return self.default.label if self.uniform else f"{self.widths}-bit mixed"

    @property
    def widths(self) -> str:
        """The widths in a word, as "4", "4/8", or "2 to 8" where they are many."""
        found = sorted({format.bits for format in self.formats()})
        return "/".join(str(bits) for bits in found) if len(found) < 4 else f"{found[0]} to {found[-1]}"
