"""Bytes that a model needs to run: pure integers, from its shape.

Weights and KV cache are exact. The workspace is what a prefill chunk, the sampler and the kernels hold beside
them. benchmarks/experiments compares the sum with the memory that processes take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowmem.config import PREFILL_CHUNK, QUANTIZED_SLICE_BYTES, SLICE_BYTES, SLICE_WEIGHTS
from lowmem.kernels.registry import USUAL_SUPPORT, KernelSupport, planned
from lowmem.kernels.table_format import table_bytes, table_group
from lowmem.plan.shape import ModelShape, Tensor

Method = Literal["dense", "gptq", "int8", "nf4"]
ON_THE_FLY = {"int8": "int8 bnb", "nf4": "NF4 bnb"}
"""bitsandbytes' methods, and their names for users."""
HEAD_BITS = (16, 8)
"""Bits in which a head and a token embedding can be held. 16 stands for the dtype of the activations."""
_POSITIONS = ("wpe.weight", "embed_positions.weight", "position_embeddings.weight")
"""Tables of positions, which may have as many rows as there are tokens."""
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
SLACK = 24 << 20
"""Small buffers of the libraries and the allocator's rounding (measured: 13 to 30 MiB)."""
RETURNED = 1 << 20
"""Freed blocks of this size or more return to the system at once when int8 runs on a CPU (see loader.py)."""
CUDA_CONTEXT = 512 << 20
"""An allowance for a process's own CUDA context, its kernels and cuBLAS' workspace, on cards that are only
named. The free memory that a card reports already excludes them."""
HOST_CONTEXT = 800 << 20
"""Memory of a lowmem process before it loads a model: Python, torch and transformers. 330 MiB of it is code
that the system could drop and read again (measured: 760 to 811 MiB)."""


@dataclass(frozen=True)
class Need:
    """Bytes on one device."""

    weights: int
    kv_cache: int
    workspace: int
    """The most that is allocated beside weights and KV cache at one moment."""
    context: int = 0
    """Of the process itself: the CUDA context on a card, Python and its libraries on a host."""

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.kv_cache + self.workspace + self.context


@dataclass(frozen=True)
class Form:
    """How a model is held in memory."""

    method: Method
    """How the linears of the decoder layers are stored."""
    dtype: str
    """Of activations and dense weights, as "bfloat16"."""
    head_bits: int = 16
    """Of the head and the token embedding: one of HEAD_BITS."""

    @property
    def itemsize(self) -> int:
        """Bytes of one activation."""
        return ITEMSIZE[self.dtype]


def with_head(label: str, head_bits: int) -> str:
    """The name of a version, such as "4-bit g128", with the bits of its head where they are not 16."""
    return label if head_bits == 16 else f"{label}, {head_bits}-bit head"


def head_tables(shape: ModelShape) -> tuple[Tensor, ...]:
    """The token embedding and, unless it is tied or packed, the head: matrices with a row for each token."""
    return tuple(
        t
        for t in shape.tensors
        if t.layer < 0
        and len(t.shape) == 2
        and t.shape[0] == shape.vocab
        and not t.packed
        and not t.name.endswith(_POSITIONS)
    )


def takes_8bit_head(shape: ModelShape) -> bool:
    """Whether the head and the embedding can be held in 8 bits, as far as headers tell."""
    tables = head_tables(shape)
    return bool(tables) and all(table_group(table.shape[1]) for table in tables)


def head_bytes(shape: ModelShape, head_bits: int, itemsize: int = 2) -> int:
    """Bytes of the head and the token embedding in memory; a tied pair counts once.

    head_bits: one of HEAD_BITS. itemsize: bytes of one activation, and so of a value that is not in 8 bits.
    Raises ValueError for 8 bits unless `takes_8bit_head`.
    """
    tables = head_tables(shape)
    if head_bits == 16:
        return sum(table.numel for table in tables) * itemsize
    return sum(table_bytes(*table.shape) for table in tables)


def weights_bytes(shape: ModelShape, form: Form, layers: range | None = None, outside: bool = True) -> int:
    """Bytes of weights in memory.

    layers: the decoder layers to count (None: all). outside: count embeddings, head and final norm.
    """
    total = 0
    for tensor in shape.tensors:
        wanted = outside if tensor.layer < 0 else layers is None or tensor.layer in layers
        total += _held(tensor, form) if wanted else 0
    if outside and form.head_bits == 8:
        total += head_bytes(shape, 8) - head_bytes(shape, 16, form.itemsize)
    return total


def _held(tensor: Tensor, form: Form) -> int:
    """Bytes of one tensor in memory."""
    if tensor.packed:
        return tensor.nbytes
    if tensor.linear and form.method == "int8":
        return tensor.numel + 4 * tensor.shape[0]  # a float32 scale a row
    if tensor.linear and form.method == "nf4":
        return -(-tensor.numel // 2) + 4 * -(-tensor.numel // 64)  # a float32 scale in 64
    return tensor.numel * form.itemsize


def kv_cache_bytes(shape: ModelShape, form: Form, context: int, layers: int | None = None) -> int:
    """Bytes of keys and values of `context` tokens in a number of decoder layers (None: all)."""
    count = shape.layers if layers is None else layers
    return shape.kv_values * count // shape.layers * form.itemsize * context


def workspace_bytes(
    shape: ModelShape, form: Form, context: int, *, cuda: bool, support: KernelSupport = USUAL_SUPPORT
) -> int:
    """The most bytes held beside weights and KV cache at one moment, while loading or running."""
    return (
        SLACK
        + (0 if cuda else _holes(shape, form))
        + max(
            _loading(shape, form),
            _activations(shape, form, context) + _kernel(shape, form, cuda, support),
            _sampling(shape),
            _head(shape, form, cuda=cuda),
        )
    )


def _loading(shape: ModelShape, form: Form) -> int:
    """A slice of the largest stored tensor and its copies; bitsandbytes casts it to float32 and makes more.

    A GGUF is read a whole tensor at a time and dequantized to float32. Weights that are loaded later reuse
    part of that memory. The experts of a layer are merged: they, their stacks and the merged tensors are in
    memory at once, and gate and up are two thirds of them. A linear that is transposed is in memory twice.
    """
    largest = max(tensor.numel for tensor in shape.tensors)
    if shape.whole_reads:
        return largest * 3
    if shape.experts:
        of_layer: dict[int, int] = {}
        for tensor in shape.tensors:
            of_layer[tensor.layer] = of_layer.get(tensor.layer, 0) + tensor.nbytes
        return 2 * max(of_layer.values())
    cast = 2 * min(SLICE_BYTES, 4 * largest)
    quantized = min(QUANTIZED_SLICE_BYTES, 4 * largest)
    if shape.transposed:
        cast = max(cast, 2 * max(tensor.nbytes for tensor in shape.tensors if tensor.linear))
    return max(cast, quantized * {"dense": 0, "gptq": 0, "int8": 5, "nf4": 9}[form.method])


def _activations(shape: ModelShape, form: Form, context: int) -> int:
    """Activations of one prefill chunk inside one decoder layer.

    The MLP holds its widest activation before and after the non-linearity, the residual stream, the normed
    input and the output. Attention holds queries, keys, output and the mask.
    """
    tokens = min(PREFILL_CHUNK, context)
    mlp = tokens * (2 * shape.widest + 3 * shape.hidden) * form.itemsize
    heads = shape.heads * shape.head_dim
    attention = tokens * (3 * heads + 2 * shape.hidden) * form.itemsize + 2 * tokens * context
    return max(mlp, attention)


def _kernel(shape: ModelShape, form: Form, cuda: bool, support: KernelSupport) -> int:
    """The most that a kernel which may be used takes for one linear and one prefill chunk."""
    kernels = planned(form.method, cuda=cuda, support=support)
    needs = [k.workspace(linear, PREFILL_CHUNK, form.itemsize) for k in kernels for linear in shape.linears]
    return max(needs, default=0)


def _head(shape: ModelShape, form: Form, *, cuda: bool) -> int:
    """The product with an 8-bit head on a card: a slice of it as float32, again with scales, and in 16 bits.

    On a CPU our kernels take less than for a linear of the layers.
    """
    return SLICE_WEIGHTS * (4 + 4 + form.itemsize) if cuda and form.head_bits == 8 else 0


def _holes(shape: ModelShape, form: Form) -> int:
    """Small blocks that malloc keeps after bitsandbytes' products on a CPU: about one int8 input per linear.

    Measured on SmolLM2: 30 to 90 MiB.
    """
    if form.method not in ON_THE_FLY:
        return 0
    inputs = (PREFILL_CHUNK * tensor.shape[1] for tensor in shape.tensors if tensor.linear)
    return sum(nbytes for nbytes in inputs if nbytes < RETURNED)


def _sampling(shape: ModelShape) -> int:
    """Logits in float32, scaled, sorted with their indices, and as probabilities, for a few draft tokens."""
    return shape.vocab * 4 * 24


def need_on_device(
    shape: ModelShape,
    form: Form,
    context: int,
    *,
    cuda: bool,
    support: KernelSupport = USUAL_SUPPORT,
    own_context: int = 0,
) -> Need:
    """The whole model on one device."""
    return Need(
        weights_bytes(shape, form) - (0 if cuda else _never_looked_up(shape, form, context)),
        kv_cache_bytes(shape, form, context),
        workspace_bytes(shape, form, context, cuda=cuda, support=support),
        own_context,
    )


def _never_looked_up(shape: ModelShape, form: Form, context: int) -> int:
    """Bytes of position embeddings past the context, which never come into memory.

    With packed weights and bfloat16 activations a float16 table stays mapped from its file, and only pages
    that are looked up are read (see stored_embeddings.py).
    """
    if (form.method, form.dtype, shape.stored) != ("gptq", "bfloat16", "float16"):
        return 0
    return max(0, shape.learned_positions - context) * shape.hidden * form.itemsize


def need_of_split(
    shape: ModelShape,
    form: Form,
    context: int,
    split: int,
    *,
    support: KernelSupport = USUAL_SUPPORT,
    own_context: int = 0,
) -> tuple[Need, Need]:
    """(card, host), with the first `split` decoder layers on a card and the others on the CPU."""
    card = Need(
        weights_bytes(shape, form, range(split)),
        kv_cache_bytes(shape, form, context, split),
        workspace_bytes(shape, form, context, cuda=True, support=support),
        own_context,
    )
    host = Need(
        weights_bytes(shape, form, range(split, shape.layers), outside=False),
        kv_cache_bytes(shape, form, context, shape.layers - split),
        workspace_bytes(shape, form, context, cuda=False, support=support),
        HOST_CONTEXT,
    )
    return card, host


def bytes_read_a_token(
    shape: ModelShape, form: Form, layers: range | None = None, outside: bool = True
) -> int:
    """Bytes of weights that one decode step reads: all but the embedding tables, of which it reads a row."""
    total = weights_bytes(shape, form, layers, outside)
    if outside:
        total -= shape.learned_positions * shape.hidden * form.itemsize
        tables = head_tables(shape)
        if len(tables) > 1:  # the embedding is as large as the head
            total -= head_bytes(shape, form.head_bits, form.itemsize) // len(tables)
    return total
