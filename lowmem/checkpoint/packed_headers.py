"""Whether the tensors of packed linears agree with each other and with their config, by shapes and dtypes.

Needs no torch: plan asks before anything is loaded, and every reader afterwards. packed_values.py compares
the values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from lowmem.checkpoint.foreign import HINT, foreign_tensors
from lowmem.checkpoint.formats import QUANT_PARTS, LinearFormat, QuantizationFormat
from lowmem.config import BITS
from lowmem.errors import ForeignError, SourceError

MISMATCH = "The quantization_config and the tensors are not of the same checkpoint"
_FLOATS = ("float16", "bfloat16", "float32")
_WORD = 32


class Stored(Protocol):
    """What a header says of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def file(self) -> str: ...


@dataclass(frozen=True)
class PackedFault:
    """What is wrong with a tensor of a packed linear."""

    tensor: str
    what: str
    """Follows the tensor's name in a message."""
    hint: str = MISMATCH
    file: str = ""

    def error(self) -> SourceError:
        """The fault as an error in one line."""
        where = f"{self.file}: " if self.file else ""
        return SourceError(f"{where}tensor {self.tensor!r} {self.what}", self.hint)


def packed_linears(
    stored: Mapping[str, Stored], format: QuantizationFormat | None
) -> dict[str, LinearFormat]:
    """The format of each packed linear by its name; the shapes and dtypes of its tensors are checked.

    Raises SourceError naming the first tensor that is missing, contradicts the others or its config, or is of
    a method other than GPTQ; also for packed linears without a config.
    """
    linears = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    if format is None:
        if linears:
            raise ForeignError(
                f"{stored[linears[0] + '.qweight'].file} holds GPTQ tensors, but no config describes them",
                f"Write quantize_config.json beside it: {_guess(stored, linears[0])}",
            )
        if foreign := foreign_tensors(stored):
            raise foreign.error(next(iter(stored.values())).file)
        return {}
    found = {}
    for linear in linears:
        found[linear] = format.of_packed(linear)
        for fault in header_faults(linear, stored, found[linear]):
            raise fault.error()
    return found


def header_faults(linear: str, stored: Mapping[str, Stored], format: LinearFormat) -> Iterator[PackedFault]:
    """What is wrong with the tensors of a packed linear; g_idx may be missing if groups are in order."""
    parts = {part: stored.get(f"{linear}.{part}") for part in QUANT_PARTS}
    file = next((tensor.file for tensor in parts.values() if tensor), "")
    found = list(_misshapen(parts))
    for part, what, *hint in found or _contradictions(parts, format):
        yield PackedFault(f"{linear}.{part}", what, hint[0] if hint else MISMATCH, file)


_Fault = tuple[str, str] | tuple[str, str, str]
"""(part, what is wrong with it), with a hint of its own or without."""


def _misshapen(parts: Mapping[str, Stored | None]) -> Iterator[_Fault]:
    """Parts that are missing, or of another kind."""
    for part, tensor in parts.items():
        dimensions, dtypes = {"scales": (2, _FLOATS), "g_idx": (1, ("int32",))}.get(part, (2, ("int32",)))
        if tensor is None:
            if part != "g_idx":
                yield part, "is missing", "Download the checkpoint again, or use another version"
        elif len(tensor.shape) != dimensions:
            count = "one dimension" if dimensions == 1 else "two dimensions"
            yield part, f"must have {count}; its shape is {list(tensor.shape)}"
        elif tensor.dtype not in dtypes:
            needed = "a matrix of floats" if part == "scales" else "int32 words"
            yield part, f"is {tensor.dtype} of shape {list(tensor.shape)}, not {needed}"


def _contradictions(parts: Mapping[str, Stored | None], format: LinearFormat) -> Iterator[_Fault]:
    """How whole parts contradict each other, or the config."""
    qweight, qzeros, scales, g_idx = (parts[part] for part in QUANT_PARTS)
    assert qweight and qzeros and scales
    outputs, groups, bits = qweight.shape[1], scales.shape[0], format.bits
    inputs, rest = divmod(qweight.shape[0] * _WORD, bits)
    wanted = 1 if format.group_size == -1 else -(-inputs // format.group_size)
    if outputs * 8 == scales.shape[1] and qzeros.shape[1] == outputs:
        yield (
            "qweight",
            f"of shape {list(qweight.shape)} is in AWQ's layout, which lowmem does not read",
            HINT,
        )
    elif scales.shape[1] != outputs:
        yield "scales", f"is of {scales.shape[1]} outputs, and qweight of {outputs}"
    elif qzeros.shape[0] != groups:
        yield "qzeros", f"is of {qzeros.shape[0]} groups, and scales is of {groups}"
    elif outputs * bits != qzeros.shape[1] * _WORD or outputs % format.unit:
        stored = _bits(qzeros, outputs)
        what = f"is of {stored} bits" if stored else f"has shape {list(qzeros.shape)}, of no width"
        yield "qzeros", f"{what}, and the config says {bits} bits"
    elif rest or inputs % format.unit:
        yield "qweight", f"of shape {list(qweight.shape)} does not hold whole numbers of {bits} bits"
    elif g_idx and g_idx.shape[0] != inputs:
        what = f"of shape {list(qweight.shape)} holds {inputs} inputs of {bits} bits"
        yield "qweight", f"{what}, and g_idx is of {g_idx.shape[0]}"
    elif groups != wanted:
        even = f" of {inputs // groups} inputs" if groups and inputs % groups == 0 else ""
        yield "scales", f"is of {groups} groups{even}, and the config says group_size {format.group_size}"
    elif g_idx is None and format.desc_act and groups > 1:
        yield (
            "g_idx",
            "is missing, and desc_act is true",
            "The order of its groups is lost: use another version",
        )


def _bits(qzeros: Stored, outputs: int) -> int | None:
    """The width that the zero-points are packed in."""
    bits, rest = divmod(qzeros.shape[1] * _WORD, max(1, outputs))
    return bits if not rest and bits in BITS else None


def _guess(stored: Mapping[str, Stored], linear: str) -> str:
    """The settings that the tensors of a linear look like, as JSON to write."""
    qweight, qzeros, scales = (stored.get(f"{linear}.{part}") for part in QUANT_PARTS[:3])
    bits = _bits(qzeros, qweight.shape[1]) if qweight and qzeros and len(qzeros.shape) == 2 else None
    groups = scales.shape[0] if scales and len(scales.shape) == 2 else 0
    if not bits or not qweight or not groups:
        return '{"bits": 4, "group_size": 128, "desc_act": false}, with its own values'
    inputs = qweight.shape[0] * _WORD // bits
    size = -1 if groups == 1 else -(-inputs // groups)
    return f'{{"bits": {bits}, "group_size": {size}, "desc_act": false}}, or true if its columns were sorted'
