"""An unquantized model as GGUF, for llama.cpp.

    python -m lowmem.benchmarks.experiments.peers.to_gguf SOURCE OUT.gguf

gpt_bigcode becomes llama.cpp's architecture "starcoder", llama its "llama"; tensor names come from PyPI's
gguf, which llama.cpp publishes. Matrices keep the dtype of the source; norms, biases and positions become
float32, which holds them exactly and which llama.cpp adds without rounding. One tensor is in memory at a
time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.errors import LowmemError, OutputError, SourceError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from lowmem.models.architecture import Architecture

ARCHITECTURES = {"gpt_bigcode": "starcoder", "llama": "llama"}
GELUS = ("gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast")
"""llama.cpp has one GELU, the tanh approximation from a float16 table; all of these are within 1e-3 of it."""
END_OF_TURN = "<|end|>"


@dataclass(frozen=True)
class Stored:
    """A tensor of the file."""

    name: str
    source: str
    """Its name in the model."""
    shape: tuple[int, ...]
    kind: str
    """F32, F16 or BF16."""
    rows: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Reorders its rows."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer in llama.cpp's keys."""

    tokens: tuple[str, ...]
    """By id, gaps filled."""
    types: tuple[int, ...]
    """gguf's TokenType of each."""
    merges: tuple[str, ...]
    pre: str
    """llama.cpp's name of the split before merges."""
    end_of_turn: int | None


def write_gguf(source: str, out: Path) -> Path:
    """Write the model at `source` (see open_source) as one GGUF file, whole or not at all; returns `out`.

    Raises SourceError for a model or a tokenizer that llama.cpp would compute differently, OutputError where
    the file cannot be written.
    """
    from lowmem.checkpoint.source.open import open_source
    from lowmem.models.architecture import inspect
    from lowmem.streaming.weights import ModelWeights

    opened = open_source(source)
    config = opened.config()
    if config.model_type not in ARCHITECTURES:
        raise SourceError(
            f"{source} is of type {config.model_type!r}; only "
            + " and ".join(ARCHITECTURES)
            + " can be written as GGUF",
            "Leave llama.cpp out for this model",
        )
    arch = inspect(config)
    weights = ModelWeights(opened, arch)
    vocabulary = read_vocabulary(opened.tokenizer(), arch.shapes[arch.embedding][0])
    names = opened.resolve(arch.shapes)
    dtypes = {name: opened.infos[stored].dtype for name, stored in names.items()}
    plan = list(plan_tensors(arch, config, dtypes, weights.head_is_duplicated()))
    with _writer(out, ARCHITECTURES[config.model_type]) as writer:
        _add_keys(writer, config, plan)
        _add_vocabulary(writer, config, vocabulary)
        for stored in plan:
            _declare(writer, stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for stored in plan:
            tensor = weights.read(stored.source)
            writer.write_tensor_data(_as_numpy(stored.rows(tensor) if stored.rows else tensor, stored.kind))
            opened.release()
    return out


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """A fast byte-level BPE tokenizer in llama.cpp's keys, for an embedding of `size` rows.

    Raises SourceError for any other kind: llama.cpp would split texts differently.
    """
    import gguf

    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model, pre = data["model"], _pre_tokenizer(data)
    if model["type"] != "BPE" or pre is None:
        raise SourceError(
            "the tokenizer is not a byte-level BPE that llama.cpp knows by name",
            "Only models with GPT-2's or StarCoder's tokenizer can be written as GGUF",
        )
    kinds = gguf.TokenType
    found = {number: (token, kinds.NORMAL) for token, number in model["vocab"].items()}
    for token in data["added_tokens"]:
        kind = kinds.CONTROL if token["special"] else kinds.USER_DEFINED
        found[token["id"]] = (token["content"], kind)
    # Rows of the embedding without a token get a name that no text encodes to.
    listed = [found.get(number, (f"[PAD{number}]", kinds.UNUSED)) for number in range(size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    end = next((number for number, (token, _) in found.items() if token == END_OF_TURN), None)
    return Vocabulary(
        tuple(token for token, _ in listed), tuple(int(kind) for _, kind in listed), tuple(merges), pre, end
    )


def _pre_tokenizer(data: dict[str, Any]) -> str | None:
    """llama.cpp's name: "starcoder" splits digits one by one and then as GPT-2 does."""
    if data["normalizer"]:
        return None
    top = data["pre_tokenizer"] or {}
    steps = top["pretokenizers"] if top.get("type") == "Sequence" else [top]
    names = [step.get("type") for step in steps]
    last = steps[-1]
    if names[-1] != "ByteLevel" or last.get("add_prefix_space") or not last.get("use_regex", True):
        return None
    if names[:-1] == ["Digits"] and steps[0].get("individual_digits"):
        return "starcoder"
    return "gpt-2" if len(names) == 1 else None


def plan_tensors(arch: Architecture, config: Any, dtypes: Mapping[str, str], tied: bool) -> Iterator[Stored]:
    """Every tensor of the file, in the model's order. dtypes: the source's, by name. tied: write no head."""
    names = name_map(config)
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    for name, shape in arch.shapes.items():
        if tied and name == arch.head:
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise SourceError(f"llama.cpp has no place for the tensor {name!r}", "Leave llama.cpp out")
        small = len(shape) == 1 or stored.startswith("position_embd")
        yield Stored(stored, name, shape, "F32" if small else kinds[dtypes[name]], _rows(name, config))


def name_map(config: Any) -> Any:
    """gguf's map from transformers' tensor names to llama.cpp's."""
    import gguf

    architecture = ARCHITECTURES[config.model_type]
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, config.num_hidden_layers)


def _rows(name: str, config: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Brings the rows of an attention projection into llama.cpp's order; None where it is the model's."""
    heads = config.num_attention_heads
    if config.model_type == "gpt_bigcode":
        # With several KV heads the model stores q, k, v of each head; llama.cpp expects all q, all k, all v.
        # With one KV head both orders are the same.
        if ".c_attn." in name and not config.multi_query:
            return lambda tensor: _swapped(tensor, heads, 3)
        return None
    # transformers rotates the two halves of a head, llama.cpp neighbouring pairs.
    if ".q_proj." in name:
        return lambda tensor: _swapped(tensor, heads, 2, inside=True)
    if ".k_proj." in name:
        return lambda tensor: _swapped(tensor, config.num_key_value_heads, 2, inside=True)
    return None


def _swapped(tensor: torch.Tensor, heads: int, parts: int, *, inside: bool = False) -> torch.Tensor:
    """Rows [heads, parts, n] → [parts, heads, n]; inside: → [heads, n, parts]."""
    rows = tensor.reshape(heads, parts, tensor.shape[0] // heads // parts, *tensor.shape[1:])
    return (rows.transpose(1, 2) if inside else rows.transpose(0, 1)).reshape(tensor.shape)


def _add_keys(writer: Any, config: Any, plan: Sequence[Stored]) -> None:
    """Write the model's dimensions. Raises SourceError for what llama.cpp computes differently."""
    import gguf

    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt_bigcode":
        if config.activation_function not in GELUS or not config.scale_attn_weights:
            raise SourceError(
                f"llama.cpp's starcoder has no {config.activation_function}, or scales attention otherwise",
                "Leave llama.cpp out for this model",
            )
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_head_count_kv(1 if config.multi_query else config.num_attention_heads)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        rope = dict(getattr(config, "rope_parameters", None) or {})
        if rope.get("rope_type", "default") != "default" or config.hidden_act != "silu":
            raise SourceError(
                f"positions of type {rope.get('rope_type')!r} or the activation {config.hidden_act!r} are "
                "not plain llama's",
                "Leave llama.cpp out for this model",
            )
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
        writer.add_rope_dimension_count(width)
        writer.add_key_length(width)
        writer.add_value_length(width)
    types = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}
    matrices = [stored.kind for stored in plan if stored.name.endswith("attn_output.weight")]
    writer.add_file_type(gguf.LlamaFileType[types[matrices[0]]])


def _add_vocabulary(writer: Any, config: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    writer.add_token_merges(list(vocabulary.merges))
    writer.add_add_bos_token(False)
    for add, number in (
        (writer.add_bos_token_id, config.bos_token_id),
        (writer.add_eos_token_id, config.eos_token_id),
        (writer.add_eot_token_id, vocabulary.end_of_turn),
    ):
        first = number[0] if isinstance(number, list) and number else number
        if isinstance(first, int):
            add(first)


def _declare(writer: Any, stored: Stored) -> None:
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[stored.kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(stored.shape))
    # gguf wants a dtype only for the size of an element.
    writer.add_tensor_info(stored.name, stored.shape, np.dtype(np.float16), count // block * size, kind)


def _as_numpy(tensor: torch.Tensor, kind: str) -> np.ndarray[Any, Any]:
    """The tensor's bytes as `kind`, on the CPU; numpy has no bfloat16, so those go as int16."""
    import torch

    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    data = tensor.to(dtype).contiguous()
    return data.view(torch.int16).numpy() if dtype is torch.bfloat16 else data.numpy()


@contextmanager
def _writer(out: Path, architecture: str) -> Iterator[Any]:
    """gguf's writer on a file beside `out`, renamed to `out` at the end."""
    import gguf

    part = out.with_name(out.name + ".part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(part, architecture)
        try:
            yield writer
        finally:
            writer.close()
        part.replace(out)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder, file or hub id of an unquantized model")
    parser.add_argument("out", type=Path, help="the GGUF file to write")
    args = parser.parse_args(argv)
    try:
        print(write_gguf(args.source, args.out))
    except LowmemError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
