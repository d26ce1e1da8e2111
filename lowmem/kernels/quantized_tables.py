"""Embeddings and heads in 8 bits, rounded while a checkpoint is read, whose files keep them in 16.

A table [rows, columns] has a row for each token. `columns` is the model's hidden size, cut into groups with a
float16 scale each. A tied embedding and head share one table: the embedding looks up the very values that the
head multiplies by. On a CPU with our kernels the table is a GPTQ weight in their tiled layout; elsewhere rows
are stored one after the other.
"""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from lowmem.config import SLICE_WEIGHTS
from lowmem.errors import SourceError
from lowmem.kernels import dispatch
from lowmem.kernels.native import linear as native_linear
from lowmem.kernels.native.header import LmPacked
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.kernels.table_format import TILE_ROWS, table_group

_BITS = 8
_ZERO = 1 << (_BITS - 1)
_BLOCK_VALUES = 1 << 19
"""Values rounded at a time: 2 MiB of float32 stay in a core's cache."""
_ADVICE = "Use --head-bits 16"


def round_groups(values: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round values, float32 [rows, columns], to -128..127 times a scale for each group of columns.

    Returns codes int8 [rows, columns] and scales float16 [rows, columns / group]. The value with the largest
    magnitude becomes -128, then the scale becomes the least-squares one for the codes, and all are rounded
    again. Raises ValueError for values that are not finite, or too large for a float16 scale.
    """
    grouped = values.view(len(values), -1, group)
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    scales = (torch.where(-low > high, low, high) / -_ZERO).half()
    codes = _codes(grouped, scales)
    products, squares = (grouped * codes).sum(-1, keepdim=True), codes.square().sum(-1, keepdim=True)
    first, scales = scales, (products / squares.clamp_min(1)).half()
    if not bool((first.isfinite() & scales.isfinite()).all()):
        raise ValueError("has values that are not finite, or too large for 8 bits")
    codes = _codes(grouped, scales)
    return codes.view(values.shape).to(torch.int8), scales[..., 0]


def _codes(grouped: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[rows, groups, group] over scales [rows, groups, 1], rounded, as floats; 0 where the scale is 0."""
    inverse = scales.float().reciprocal().nan_to_num_(posinf=0.0, neginf=0.0)
    return (grouped * inverse).round_().clamp_(-_ZERO, _ZERO - 1)


class QuantizedTable(nn.Module):
    """A table [rows, columns] in 8 bits, with its rows padded to whole tiles. Filled by `fill`."""

    def __init__(self, rows: int, columns: int) -> None:
        """Raises ValueError for columns that are not a multiple of 32."""
        super().__init__()
        group = table_group(columns)
        if group is None:
            raise ValueError(f"rows of {columns} values are not a multiple of 32")
        self.rows, self.columns, self.group = rows, columns, group
        self.tiles = -(-rows // TILE_ROWS)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the table is."""

    def fill(self, first: int, values: torch.Tensor) -> None:
        """Round and store rows [count, columns] of any float dtype from row `first` on, which begins a tile.

        Every call but the last gives whole tiles. Raises ValueError as `round_groups` does.
        """
        step = max(1, _BLOCK_VALUES // (TILE_ROWS * self.columns)) * TILE_ROWS
        for start in range(0, len(values), step):
            part = values[start : start + step].to(self.device).float()
            missing = -len(part) % TILE_ROWS
            if missing:
                part = torch.cat((part, part.new_zeros(missing, self.columns)))
            self._store((first + start) // TILE_ROWS, *round_groups(part, self.group))

    @abstractmethod
    def _store(self, tile: int, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Store codes [tiles * TILE_ROWS, columns] with their scales [..., groups] from a tile on."""

    @abstractmethod
    def _stored(self, rows: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes int8 [count, columns], scales float16 [count, groups]) of some rows."""

    def _values(self, rows: torch.Tensor | slice, dtype: torch.dtype) -> torch.Tensor:
        """Rows in float16 or float32, [count, columns]. Each is rounded once at most."""
        codes, scales = self._stored(rows)
        values = codes.view(len(codes), -1, self.group) * scales.to(dtype)[..., None]
        return values.view(codes.shape)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] → float32 [..., columns]."""
        return self._values(ids.reshape(-1), torch.float32).view(*ids.shape, self.columns)

    def dequantize(self) -> torch.Tensor:
        """The whole table, float32 [rows, columns]."""
        return self._values(slice(0, self.rows), torch.float32)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., columns] → [..., rows] in x's dtype, a slice of the table at a time."""
        step = max(TILE_ROWS, SLICE_WEIGHTS // self.columns)
        dtype = torch.float16 if x.dtype is torch.float16 else torch.float32
        parts = []
        for first in range(0, self.rows, step):
            rows = slice(first, min(first + step, self.rows))
            own = None if bias is None else bias[rows]
            parts.append(nn.functional.linear(x, self._values(rows, dtype).to(x.dtype), own))
        return torch.cat(parts, dim=-1)

    def extra_repr(self) -> str:
        """Sizes, as nn.Embedding prints its own."""
        return f"{self.rows}, {self.columns}, bits={_BITS}, group_size={self.group}"


class RowTable(QuantizedTable):
    """One row after the other, on any device."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        super().__init__(rows, columns)
        padded = self.tiles * TILE_ROWS
        self.register_buffer("codes", torch.empty(padded, columns, dtype=torch.int8, device=device))
        scales = torch.empty(padded, columns // self.group, dtype=torch.float16, device=device)
        self.register_buffer("scales", scales)

    @property
    def device(self) -> torch.device:
        """See QuantizedTable."""
        return self.codes.device

    def _store(self, tile: int, codes: torch.Tensor, scales: torch.Tensor) -> None:
        rows = slice(tile * TILE_ROWS, tile * TILE_ROWS + len(codes))
        self.codes[rows], self.scales[rows] = codes, scales

    def _stored(self, rows: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
        return self.codes[rows], self.scales[rows]


class TiledTable(QuantizedTable):
    """A GPTQ weight in the tiled layout of our kernels (csrc/linear/linear.h), on the CPU.

    qweight: int32 [tiles, columns / 4, 64], a word of four columns for each row. scales: float16
    [tiles, groups, 64].
    """

    qweight: torch.Tensor
    scales: torch.Tensor

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns)
        words, groups = columns * _BITS // 32, columns // self.group
        self.register_buffer("qweight", torch.empty(self.tiles, words, TILE_ROWS, dtype=torch.int32))
        self.register_buffer("scales", torch.empty(self.tiles, groups, TILE_ROWS, dtype=torch.float16))

    @property
    def device(self) -> torch.device:
        """See QuantizedTable."""
        return self.qweight.device

    def _store(self, tile: int, codes: torch.Tensor, scales: torch.Tensor) -> None:
        words = (codes.view(torch.uint8) ^ _ZERO).view(torch.int32)
        count = len(codes) // TILE_ROWS
        self.qweight[tile : tile + count] = words.view(count, TILE_ROWS, -1).transpose(1, 2)
        self.scales[tile : tile + count] = scales.view(count, TILE_ROWS, -1).transpose(1, 2)

    def _stored(self, rows: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=self.device)
        tile, lane = rows // TILE_ROWS, rows % TILE_ROWS
        words = self.qweight[tile, :, lane].contiguous()
        # Flipping the highest bit of a byte subtracts 128 and makes it signed.
        return (words.view(torch.uint8) ^ _ZERO).view(torch.int8), self.scales[tile, :, lane]


class TiledWeight(native_linear.Packed):
    """A TiledTable as the library reads it. bias: [rows] or None."""

    def __init__(self, table: TiledTable, bias: torch.Tensor | None) -> None:
        if bias is not None:
            native_linear._check("bias", bias, (table.rows,), *native_linear.TYPES)
        self.in_features, self.out_features = table.columns, table.rows
        self.bits, self.group = _BITS, table.group
        self.planes = native_linear.planes_of(16)  # fewer cost quality: see activation_bits
        self._tensors = (table.qweight, table.scales, None, bias)
        self._next = []
        self.struct = LmPacked(
            bits=_BITS,
            group=table.group,
            inputs=table.columns,
            outputs=table.rows,
            qweight=table.qweight.data_ptr(),
            scales=table.scales.data_ptr(),
            zeros=None,
            bias=None if bias is None else bias.data_ptr(),
            scales_type=native_linear.TYPES[table.scales.dtype],
            bias_type=native_linear.TYPES[torch.float32 if bias is None else bias.dtype],
            tiled=1,
        )
        self.address = ctypes.addressof(self.struct)


class QuantizedEmbedding(nn.Embedding):
    """ids → rows of a table in the dtype `activations`.

    A subclass of nn.Embedding keeps its own forward, such as Gemma 3's, which scales the rows.
    """

    def __init__(self, embedding: nn.Embedding, table: QuantizedTable, activations: torch.dtype) -> None:
        super().__init__(table.rows, table.columns, padding_idx=embedding.padding_idx, device="meta")
        del self.weight
        self.table = table
        self.activations = activations
        self.own: nn.Embedding | None = None
        """The subclass, which is given the looked-up rows as its weight."""
        if type(embedding) is not nn.Embedding:
            del embedding.weight
            embedding.padding_idx = None  # it would have to be a row of that weight
            self.own = embedding

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """ids [...] → [..., embedding_dim]."""
        rows = self.table.lookup(input).to(self.activations)
        if self.own is None:
            return rows
        self.own.weight = rows.view(-1, self.embedding_dim)  # type: ignore[assignment]
        try:
            result: torch.Tensor = self.own(torch.arange(input.numel(), device=rows.device).view(input.shape))
        finally:
            del self.own.weight
        return result


class QuantizedHead(nn.Linear):
    """x [..., in] → [..., out] in x's dtype, by a table in 8 bits."""

    def __init__(self, linear: nn.Linear, table: QuantizedTable) -> None:
        super().__init__(table.columns, table.rows, bias=False, device="meta")
        del self.weight
        self.table = table
        self.register_parameter("bias", linear.bias)
        self._packed: TiledWeight | None = None

    @property
    def packed(self) -> TiledWeight | None:
        """The weight as our own kernels read it; None where they cannot."""
        table = self.table
        if not isinstance(table, TiledTable) or table.device.type != "cpu":
            return None
        tensors = (table.qweight, table.scales, None, self.bias)
        if self._packed is None or any(
            a is not b for a, b in zip(self._packed._tensors, tensors, strict=True)
        ):
            self._packed = TiledWeight(table, self.bias)
        return self._packed

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out]."""
        if native_linear.takes(input) and (packed := self.packed) is not None:
            return native_linear.linear(packed, input)
        return self.table.multiply(input, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        """Without the pointers, which are wrong in a copy."""
        return {**self.__dict__, "_packed": None}


def quantize_tables(model: nn.Module, device: torch.device, activations: torch.dtype) -> None:
    """Replace the token embedding and the head of a model by ones in 8 bits, which are still to be filled.

    model: on the meta device, with tied weights tied; a tied pair gets one table. A head that the checkpoint
    stores packed stays. device: of the tables. Raises SourceError for an embedding or a head that computes
    something of its own, or whose size does not fit.
    """
    any_model: Any = model
    embedding, head = any_model.get_input_embeddings(), any_model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        raise SourceError(f"an embedding of {type(embedding).__name__} cannot be held in 8 bits", _ADVICE)
    if not isinstance(head, QuantLinear) and type(head) is not nn.Linear:
        raise SourceError(f"a head of {type(head).__name__} cannot be held in 8 bits", _ADVICE)
    names = {id(module): name for name, module in model.named_modules()}
    weight = embedding.weight
    table = _table(embedding.num_embeddings, embedding.embedding_dim, device)
    _replace(model, names[id(embedding)], QuantizedEmbedding(embedding, table, activations))
    replaced = {f"{names[id(embedding)]}.weight"}
    if type(head) is nn.Linear:
        if head.weight is not weight:
            table = _table(head.out_features, head.in_features, device)
        _replace(model, names[id(head)], QuantizedHead(head, table))
        replaced.add(f"{names[id(head)]}.weight")
    _forget_tied(model, replaced)


def _table(rows: int, columns: int, device: torch.device) -> QuantizedTable:
    try:
        if device.type == "cpu" and not dispatch.why_not_native():
            return TiledTable(rows, columns)
        return RowTable(rows, columns, device)
    except ValueError as error:
        raise SourceError(f"the embedding or the head cannot be held in 8 bits: {error}", _ADVICE) from None


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    old = model.get_submodule(name)
    setattr(model.get_submodule(parent), child, module.train(old.training))


def _forget_tied(model: nn.Module, names: set[str]) -> None:
    """Take weights that no longer exist out of what transformers' `tie_weights` ties."""
    for prefix, module in model.named_modules():
        tied = getattr(module, "_tied_weights_keys", None)
        if isinstance(tied, dict):
            start = f"{prefix}." if prefix else ""
            kept = {a: b for a, b in tied.items() if not names & {start + a, start + b}}
            module._tied_weights_keys = kept  # type: ignore[assignment]
