"""What the programs that load a checkpoint beside lowmem support, linear by linear. Needs no torch.

`lowmem convert --for` refuses what the named program does not load. tests/compat/vllm_forms.py and
tests/kernels/test_interop_gptqmodel.py run the programs themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from lowmem.checkpoint.formats import LinearFormat
from lowmem.errors import RecipeError


@dataclass(frozen=True)
class Reader:
    """A program that loads checkpoints."""

    name: str
    """As `--for` takes it."""
    title: str
    """In messages."""
    bits: tuple[int, ...]
    """The widths that it loads."""
    asymmetric: bool
    """It loads zero-points other than the middle."""
    group_sizes: tuple[int, ...] = ()
    """The group sizes that it loads; empty: -1 and every multiple of 32."""
    layouts: tuple[str, ...] = ("gptq", "gptq_v2")
    """The layouts that it loads, by their names in formats.LAYOUTS."""
    joins: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Linears that it joins into one, which must be stored alike: (name of the joined one, their names), each
    the last part of a full name."""

    def allows(self, format: LinearFormat | None) -> str:
        """The reason why it does not load a linear; "" if it does. format: None for a linear in 16 bits."""
        if format is None:
            return ""
        if format.bits not in self.bits:
            return f"{self.title} loads {listed(self.bits)} bits, not {format.bits}"
        if not format.sym and not self.asymmetric:
            return f"{self.title} loads symmetric linears only"
        if self.group_sizes and format.group_size not in self.group_sizes:
            return f"{self.title} does not load groups of {format.group_size}"
        if format.layout not in self.layouts:
            return f"{self.title} does not load the layout {format.layout}"
        return ""

    def must_match(self, linears: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The linears, of these full names, that it joins: two or more each, by the full joined name."""
        names = list(linears)
        there, found = set(names), {}
        for name in names:
            parent, _, leaf = name.rpartition(".")
            for joined, parts in self.joins:
                if leaf == parts[0]:
                    members = tuple(f"{parent}.{part}" for part in parts if f"{parent}.{part}" in there)
                    found[f"{parent}.{joined}"] = members
        return {joined: members for joined, members in found.items() if len(members) > 1}

    def check(self, formats: Mapping[str, LinearFormat | None]) -> None:
        """Raise RecipeError unless it loads a checkpoint with these linears, given by full name."""
        for name, format in formats.items():
            if problem := self.allows(format):
                raise RecipeError(
                    f"{name}: {problem}",
                    f"Choose other bits, groups or symmetry, or leave out --for {self.name}",
                )
        for members in self.must_match(formats).values():
            if len({formats[name] for name in members}) > 1:
                raise RecipeError(
                    f"{self.title} joins {listed(members)} into one linear, and they are stored differently",
                    f"Give them the same settings, or leave out --for {self.name}",
                )

    def with_joined(self, formats: Mapping[str, LinearFormat | None]) -> dict[str, LinearFormat | None]:
        """The formats with those of the joined linears, whose names vLLM looks for in `dynamic`.

        formats: of the linears that differ from the default, after `check`.
        """
        joined = {name: formats[members[0]] for name, members in self.must_match(formats).items()}
        return {**formats, **joined}


def listed(values: Collection[object]) -> str:
    """As "8, 5 and 4"."""
    *rest, last = (str(value) for value in values)
    return f"{', '.join(rest)} and {last}" if rest else last


READERS = {
    reader.name: reader
    for reader in (
        Reader(
            "gptqmodel",
            "GPTQModel",
            bits=(8, 7, 6, 5, 4, 3, 2),
            asymmetric=True,
            group_sizes=(-1, 32, 64, 128, 256, 512, 1024),
            layouts=("gptq", "gptq_v2", "gptq_p"),
        ),
        Reader(
            "vllm",
            "vLLM",
            bits=(8, 4),
            asymmetric=False,
            group_sizes=(-1, 32, 64, 128),
            joins=(("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))),
        ),
        Reader(
            "gguf",
            "GGUF",
            bits=(8, 5, 4),
            asymmetric=False,
            layouts=("gptq", "gptq_v2", "gptq_p"),
        ),
    )
}
"""By name. vLLM: as tests/compat/vllm_forms.py found, without its Humming kernels. GGUF: the linears that
`lowmem export` writes without loss in blocks of their own width (Q8_0, Q5_0 and Q4_0)."""
