"""The sizes that a model's memory depends on, read from headers and config.json without torch or weights.

No model family is known by name, only several spellings of the same few config keys. Tensors of one decoder
layer share the first number in their names (`transformer.h.7.`, `model.layers.7.`, `blk.7.`); a linear is
a matrix in a decoder layer. tests/plan/test_shape.py holds the result equal to models/architecture.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from lowmem.checkpoint.files.home import typed_path
from lowmem.checkpoint.foreign import refuse_foreign
from lowmem.checkpoint.formats import LinearFormat, QuantizationFormat, packed_bytes
from lowmem.checkpoint.headers.config import text_settings
from lowmem.checkpoint.headers.folder import TensorHeader, gguf_metadata, read_config_json, tensor_headers
from lowmem.checkpoint.headers.heads import EMBEDDINGS, HEADS, own_heads
from lowmem.checkpoint.headers.santacoder import has_first_names, joined_headers
from lowmem.checkpoint.manifest import find_quantization
from lowmem.checkpoint.packed_headers import packed_linears
from lowmem.checkpoint.source.text_names import is_left_out, text_name
from lowmem.config import GROUP_SIZES
from lowmem.errors import SourceError
from lowmem.kernels.contract import LinearSpec
from lowmem.models.experts import is_expert, refuse_experts
from lowmem.models.layer_state import check_checkpoint, check_layer_state, has_second_inputs
from lowmem.models.positions import longest_sequence
from lowmem.plan.kv_values import kv_values

_LAYER = re.compile(r"^(.*?\.)?(\d{1,9})\.")
# Masks and rotary tables of old checkpoints, which current models compute.
_LEGACY = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", "rope_freqs.weight")
_ROUTERS = (".gate.weight", ".router.weight", ".router.layer.weight")
"""What chooses among experts is a parameter of transformers' models, not a linear."""
_PACKED = (".qweight", ".qzeros", ".scales", ".g_idx")


@dataclass(frozen=True)
class Tensor:
    """A tensor of the model."""

    name: str
    shape: tuple[int, ...]
    nbytes: int
    """Of its stored data."""
    layer: int
    """Its decoder layer, or -1 outside of them."""
    packed: bool
    """It is part of a quantized linear and keeps its stored bytes; else it is cast to the run's dtype."""
    linear: bool
    """It is the weight [out, in] of a decoder layer's linear."""

    @property
    def numel(self) -> int:
        """How many values."""
        return prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """The sizes that a plan is computed from."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int | None
    """The longest context; None for a model without a limit."""
    stored: str
    """The dtype that the config names, or else the dtype of most weights."""
    tensors: tuple[Tensor, ...]
    """All tensors of the model; a tied head counts once."""
    linears: tuple[LinearSpec, ...]
    """Every distinct linear of the decoder layers."""
    format: QuantizationFormat | None
    """How quantized linears are stored; None for a model in 16 or 32 bits."""
    kv_values: int
    """Numbers that the KV cache of all layers keeps for one token."""
    learned_positions: int
    """Rows of the table of position embeddings; 0 without one."""
    whole_reads: bool = False
    """Tensors are read whole, as from a GGUF, not in slices."""
    experts: bool = False
    """It is a mixture of experts, which runs in 16 or 32 bits only."""
    second_inputs: bool = False
    """Its layers take a second input for each token, which the converter does not provide."""
    conv1d: bool = False
    """Its layers hold GPT-2's Conv1D, with weights [in, out], which runs in 16 or 32 bits only."""
    transposed: bool = False
    """Its linears are stored [in, out] and transposed when they are read, as SantaCoder's first layout."""

    @property
    def quantizable(self) -> bool:
        """Whether its layers' linears can be quantized at all, by the converter or on the fly."""
        return not (self.experts or self.conv1d)

    @property
    def convertible(self) -> bool:
        """Whether `lowmem convert` has a recipe for it, and GPTQ's words can hold every linear."""
        sizes = [size for pair in self.linear_sizes for size in pair]
        return self.quantizable and not (self.second_inputs or any(size % 32 for size in sizes))

    @property
    def linear_weights(self) -> int:
        """Number of weights of all linears in decoder layers, quantized or not."""
        return sum(self._weights(tensor) for tensor in self.tensors)

    @property
    def bits(self) -> float:
        """Bits of a linear's weight; where linears differ, the average, with scales and zero-points."""
        if self.format is None:
            return 32 if self.stored == "float32" else 16
        if self.format.uniform:
            return self.format.default.bits
        stored = sum(self._weights(t) * self._stored_bits(t) for t in self.tensors)
        return round(stored / max(1, self.linear_weights), 2)

    def _weights(self, tensor: Tensor) -> int:
        """How many weights of a decoder layer's linear a tensor holds."""
        if tensor.linear:
            return tensor.numel
        if not tensor.packed or tensor.layer < 0 or not tensor.name.endswith(".qweight"):
            return 0
        return tensor.numel * 32 // self._format(tensor).bits

    def _stored_bits(self, tensor: Tensor) -> float:
        """Bits of a weight, with scales and zero-points, of the linear that a tensor holds."""
        if not tensor.packed or not tensor.name.endswith(".qweight"):
            return 16
        format = self._format(tensor)
        return format.bits_per_weight(tensor.shape[0] * 32 // format.bits)

    def _format(self, tensor: Tensor) -> LinearFormat:
        """How a packed linear is stored, by its tensor."""
        assert self.format is not None
        return self.format.of_packed(tensor.name.rpartition(".")[0])

    @property
    def linear_sizes(self) -> frozenset[tuple[int, int]]:
        """(in, out) of the linears."""
        return frozenset((linear.in_features, linear.out_features) for linear in self.linears)

    @property
    def widest(self) -> int:
        """The most inputs or outputs of a linear."""
        return max((linear.widest for linear in self.linears), default=self.hidden)

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for two versions of one model, whatever their bits."""
        counts = (self.layers, self.hidden, self.heads, self.kv_heads, self.vocab, self.positions)
        return (*counts, self.linear_sizes)


def read_shape(path: Path) -> ModelShape:
    """The shape of the checkpoint at `path`: a folder, or a .safetensors or .gguf file.

    Raises SourceError for a checkpoint that is damaged, or whose config lacks sizes.
    """
    folder = path.parent if path.is_file() else path
    if (folder / "config.json").is_file():  # before headers, whose dtypes may be those of another method
        refuse_foreign(path, read_config_json(path))
    headers = tensor_headers(path)
    if any(header.file.endswith(".gguf") for header in headers.values()):
        config = _gguf_config(gguf_metadata(path))
        format = None
    else:
        config = read_config_json(path)
        format = find_quantization(path)
        packed_linears(headers, format)
    nested = isinstance(config.get("text_config"), dict)
    config = text_settings(config)
    check_layer_state(config)
    own = own_heads(folder, headers)
    if first := has_first_names(config, headers):
        headers = joined_headers(headers)
    if nested or "vision_config" in config:
        headers = {name: header for name, header in headers.items() if not is_left_out(name)}
    return replace(_shape(path, headers, config, format, own), transposed=first)


def check_convertible(source: str) -> None:
    """Raise ArchitectureError for a checkpoint on this machine that convert has no recipe for.

    Needs no torch. Other faults of the checkpoint are left to the converter.
    """
    path = typed_path(source)
    check_checkpoint(path)
    try:
        headers = tensor_headers(path)
    except SourceError:  # not there, or damaged: the converter says so
        return
    refuse_experts(source, headers)


def as_converted(source: ModelShape, bits: int) -> ModelShape:
    """The shape that `lowmem convert --bits` gives a 16-bit model, with the group size that it chooses."""
    group = next((g for g in GROUP_SIZES if all(s.in_features % g == 0 for s in source.linears)), -1)
    return as_stored(source, LinearFormat(bits, group))


def as_stored(
    source: ModelShape, default: LinearFormat, linears: Mapping[str, LinearFormat | None] | None = None
) -> ModelShape:
    """The shape of a 16-bit model once its linears are stored as `default`, but for those in `linears`.

    linears: by full name, as the source's tensors have it; None for one that stays in 16 bits. Per quantized
    linear: qweight and qzeros in 32-bit words, float16 scales, and the group of each input in 32 bits.
    """
    others, names = linears or {}, {tensor.name for tensor in source.tensors}
    tensors: list[Tensor] = []
    found: dict[LinearSpec, None] = {}
    for tensor in source.tensors:
        base = tensor.name.removesuffix(".weight")
        format = others.get(base, default) if tensor.linear else None
        if tensor.linear:
            out, columns = tensor.shape
            found[LinearSpec(columns, out, f"{base}.bias" in names, format)] = None
        if format is None:
            tensors.append(tensor)
            continue
        packed = (columns * format.bits // 32, out)
        nbytes = packed_bytes(columns, out, format)
        tensors.append(Tensor(f"{base}.qweight", packed, nbytes, tensor.layer, True, False))
    return replace(
        source,
        tensors=tuple(tensors),
        linears=tuple(found),
        format=QuantizationFormat.mixture(default, others),
        whole_reads=False,
        transposed=False,
        stored="float16",
    )


def _shape(
    path: Path,
    headers: Mapping[str, TensorHeader],
    config: Mapping[str, object],
    format: QuantizationFormat | None,
    own_heads: set[str],
) -> ModelShape:
    """own_heads: the heads that are stored with values of their own, whatever the config says."""
    tied = config.get("tie_word_embeddings") is not False and any(n.endswith(EMBEDDINGS) for n in headers)
    tensors: list[Tensor] = []
    linears: dict[LinearSpec, None] = {}
    prefix = _layers_prefix([text_name(name) for name in headers])
    experts, conv1d = any(is_expert(name) for name in headers), False
    for stored, header in headers.items():
        if stored.endswith(_LEGACY) or (tied and stored.endswith(HEADS) and stored not in own_heads):
            continue
        name = text_name(stored)
        match = _LAYER.match(name)
        layer = int(match[2]) if match and match[1] == prefix else -1
        packed = format is not None and name.endswith(_PACKED)
        matrix = layer >= 0 and len(header.shape) == 2 and name.endswith(".weight")
        matrix = matrix and not name.endswith("norm.weight")  # a row for each head
        linear = matrix and not packed and not (experts and (is_expert(name) or name.endswith(_ROUTERS)))
        if linear:
            bias = headers.get(f"{stored.removesuffix('.weight')}.bias")
            linears[LinearSpec(header.shape[1], header.shape[0], bias is not None)] = None
            conv1d |= bias is not None and bias.shape == header.shape[1:] != header.shape[:1]
        if packed and name.endswith(".qweight") and format is not None:
            base = stored.removesuffix(".qweight")
            own = format.of_packed(base)
            inputs = header.shape[0] * 32 // own.bits
            linears[LinearSpec(inputs, header.shape[1], f"{base}.bias" in headers, own)] = None
            if f"{base}.g_idx" not in headers:  # some tools omit it; it is in memory all the same
                tensors.append(Tensor(f"{base}.g_idx", (inputs,), 4 * inputs, layer, True, False))
        tensors.append(Tensor(name, header.shape, header.nbytes, layer, packed, linear))
    layers = 1 + max((tensor.layer for tensor in tensors), default=-1)
    if layers > len(tensors):
        raise SourceError(
            f"{path} names a decoder layer {layers - 1}, and holds {len(tensors)} tensors",
            "Download or copy it again",
        )
    hidden = _int(config, path, "hidden_size", "n_embd", "d_model")
    heads = _int(config, path, "num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads")
    if not layers or not linears:
        raise SourceError(f"{path} holds no decoder layers", "Give a decoder-only model")
    if config.get("new_decoder_architecture") is True:  # Falcon repeats its KV heads before it keeps them
        kv_heads = heads
    elif config.get("multi_query", config.get("model_type") == "gpt_bigcode"):
        kv_heads = 1
    else:
        kv_heads = _optional(config, "num_key_value_heads") or heads
    head_dim = _optional(config, "head_dim", "kv_channels") or hidden // heads
    embedding = next((t for t in tensors if t.name.endswith(EMBEDDINGS)), None)
    table = next((t for t in tensors if t.layer < 0 and t.name.endswith("wpe.weight")), None)
    return ModelShape(
        model_type=str(config.get("model_type", "")),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=embedding.shape[0] if embedding else _int(config, path, "vocab_size"),
        positions=longest_sequence(config),
        stored=_dtype(config, headers),
        tensors=tuple(tensors),
        linears=tuple(linears),
        format=format,
        kv_values=kv_values(config, layers, kv_heads, head_dim),
        learned_positions=table.shape[0] if table else 0,
        whole_reads=any(header.file.endswith(".gguf") for header in headers.values()),
        experts=experts,
        second_inputs=has_second_inputs(config),
        conv1d=conv1d,
    )


def _layers_prefix(names: Iterable[str]) -> str | None:
    """What precedes the number of a decoder layer: of all numbered lists the one with the most tensors."""
    counts = Counter(match[1] for match in map(_LAYER.match, names) if match)
    return max(counts, key=lambda prefix: counts[prefix], default=None)


def _dtype(config: Mapping[str, object], headers: Mapping[str, TensorHeader]) -> str:
    """The config's dtype, or else that of most stored bytes; a GGUF's quantized types count as float16."""
    named = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    if named in ("float32", "float16", "bfloat16"):
        return named
    counts: dict[str, int] = {}
    for header in headers.values():
        if header.dtype in ("float32", "float16", "bfloat16", "F32", "F16", "BF16"):
            kind = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(header.dtype, header.dtype)
        elif header.file.endswith(".gguf"):
            kind = "float16"
        else:
            continue
        counts[kind] = counts.get(kind, 0) + header.nbytes
    return max(counts, key=lambda kind: counts[kind], default="float16")


def _gguf_config(metadata: Mapping[str, object]) -> dict[str, object]:
    """A GGUF's keys under the names of config.json."""
    arch = str(metadata.get("general.architecture", ""))
    names = {
        "hidden_size": "embedding_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "max_position_embeddings": "context_length",
        "vocab_size": "vocab_size",
    }
    found = {ours: metadata.get(f"{arch}.{theirs}") for ours, theirs in names.items()}
    config: dict[str, object] = {name: value for name, value in found.items() if value is not None}
    # A GGUF stores a head of its own exactly when it is not tied.
    return {"model_type": arch, "tie_word_embeddings": False, "multi_query": False, **config}


def _optional(config: Mapping[str, object], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if type(value) is int and value > 0:
            return value
    return None


def _int(config: Mapping[str, object], path: Path, *names: str) -> int:
    value = _optional(config, *names)
    if value is None:
        raise SourceError(
            f"the config of {path} does not say its {names[0]}", "Use the config of a language model"
        )
    return value
