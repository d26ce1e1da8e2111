"""How the linears of a GPTQ checkpoint are stored, each by itself. Needs no torch.

A checkpoint where all linears are stored alike is the common case of a checkpoint where they differ: readers
ask for the format of a linear by its name, never for the format of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from lowmem.errors import SourceError

QUANT_PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""The stored tensors of a quantized linear, by the last part of their names."""


@dataclass(frozen=True)
class Layout:
    """How GPTQ's integers become words in a file: one `checkpoint_format` of the ecosystem."""

    name: str
    zeros_v2: bool
    """`qzeros` holds the zero-points themselves; otherwise each is stored less one."""


LAYOUTS = {
    layout.name: layout for layout in (Layout("gptq", zeros_v2=False), Layout("gptq_v2", zeros_v2=True))
}
"""The layouts that can be read, by name."""


@dataclass(frozen=True)
class LinearFormat:
    """How one quantized linear is stored."""

    bits: int
    """Bits of a weight: 8, 4, 3 or 2."""
    group_size: int
    """Input columns that share a scale; -1 is one group for the whole row."""
    sym: bool = True
    """Every zero-point is the middle of the range."""
    desc_act: bool = False
    """`g_idx` may assign columns to groups in any order."""
    layout: str = "gptq"
    """A key of LAYOUTS."""

    @property
    def label(self) -> str:
        """The name shown to users, such as "4-bit g128"."""
        return f"{self.bits}-bit g{self.group_size}"

    @property
    def zeros_v2(self) -> bool:
        """See Layout.zeros_v2."""
        return LAYOUTS[self.layout].zeros_v2


@dataclass(frozen=True)
class FormatException:
    """The linears that a regular expression names, and how they are stored: an entry of `dynamic`."""

    pattern: str
    """Matched at the beginning of a linear's name, as `re.match` does."""
    format: LinearFormat | None
    """None: these linears are not quantized."""

    @property
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

    @property
    def label(self) -> str:
        """The name shown to users: "4-bit g128", or "4/8-bit mixed" where linears differ."""
        if self.uniform:
            return self.default.label
        return "/".join(str(bits) for bits in sorted({f.bits for f in self.formats()})) + "-bit mixed"
