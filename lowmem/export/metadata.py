"""The keys of a GGUF file: the model's name, licence and dimensions, its tokenizer and chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lowmem
from lowmem.checkpoint.files.home import typed_path
from lowmem.checkpoint.files.links import leads_outside
from lowmem.checkpoint.source.base import Source
from lowmem.checkpoint.source.card import base_model_of_card
from lowmem.export.families import add_dimensions
from lowmem.export.vocabulary import Vocabulary
from lowmem.models.dialogue import CHAT_TEMPLATE, Dialogue, end_token_ids, fim_tokens
from lowmem.models.turn_end import turn_end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILE_TYPES = {"F32": "ALL_F32"}
_QUANTIZATION_VERSION = 2
"""Of ggml's block layouts."""


@dataclass(frozen=True)
class StopTokens:
    """The tokens that end an answer, in llama.cpp's terms."""

    eos: int | None
    """The end of the text."""
    eot: int | None
    """The end of a turn."""
    eom: int | None = None
    """Another one at which the model stops."""

    @classmethod
    def of(cls, source: Source, tokenizer: PreTrainedTokenizerBase) -> StopTokens:
        """Those at which lowmem stops: of the dialogue or the chat template, and of the configs.

        StarChat's configs name only `<|endoftext|>`, and its dialogue ends turns with `<|end|>`.
        """
        dialogue, config = Dialogue.detect(tokenizer), source.config()
        ends = end_token_ids(tokenizer, dialogue, config, source.generation_config())
        turn = [dialogue.end_id] if dialogue else [*turn_end_ids(tokenizer)]
        eot = turn[0] if turn else None
        eos: Any = tokenizer.eos_token_id
        if eos is None:
            eos = next((number for number in ends if number != eot), eot)
        rest = [number for number in ends if number not in (eos, eot)]
        return cls(eos, eot, rest[0] if rest else None)


def base_model(source: Source) -> tuple[str, str] | None:
    """(owner, name) of the model that a quantized checkpoint's card says it was made of; None without one."""
    card = source.path / "README.md"
    if source.format is None or leads_outside(card):
        return None
    owner, _, name = (base_model_of_card(card) or "").removesuffix(".gguf").rpartition("/")
    return (owner, name) if name else None


def model_name(source: Source) -> str:
    """The name of the base model, or else the last part of the hub id or path."""
    if base := base_model(source):
        return base[1]
    typed = typed_path(source.display)
    if not typed.exists():
        return source.display.rpartition("/")[2]
    resolved: Path = typed.resolve()
    return resolved.stem if resolved.is_file() else resolved.name


def add_general(writer: Any, source: Source, kind: str) -> None:
    """Write name, licence and origin. kind: the type of most weights."""
    import gguf

    writer.add_type("model")
    name = model_name(source)
    writer.add_name(f"{name} {source.format.label} GPTQ" if source.format else name)
    if base := base_model(source):
        writer.add_base_model_count(1)
        writer.add_base_model_organization(0, base[0])
        writer.add_base_model_name(0, base[1])
    if licence := source.license_name():
        writer.add_license(licence)
    if source.format is not None:
        writer.add_quantized_by(", ".join(source.format.quantizer) or "GPTQ")
        writer.add_description(f"GPTQ, {source.format.label}, exported by lowmem {lowmem.__version__}")
    else:
        writer.add_description(f"exported by lowmem {lowmem.__version__}")
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES.get(kind, f"MOSTLY_{kind}")])
    writer.add_quantization_version(_QUANTIZATION_VERSION)


def add_tokenizer(
    writer: Any, source: Source, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary
) -> None:
    """Write the vocabulary, the special tokens and the chat template."""
    from gguf import Keys

    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(vocabulary.space_prefix)
    writer.add_token_types(list(vocabulary.types))
    writer.add_token_merges(list(vocabulary.merges))
    writer.add_add_bos_token(vocabulary.adds_bos)
    stops = StopTokens.of(source, tokenizer)
    bos = tokenizer.bos_token_id
    if bos is None:
        bos = getattr(source.config(), "bos_token_id", None)
    fim = fim_tokens(tokenizer) or (None, None, None)
    for key, number in {
        Keys.Tokenizer.BOS_ID: bos,
        Keys.Tokenizer.EOS_ID: stops.eos,
        Keys.Tokenizer.EOT_ID: stops.eot,
        Keys.Tokenizer.EOM_ID: stops.eom,
        Keys.Tokenizer.UNK_ID: tokenizer.unk_token_id,
        Keys.Tokenizer.PAD_ID: tokenizer.pad_token_id,
        Keys.Tokenizer.FIM_PRE_ID: fim[0],
        Keys.Tokenizer.FIM_MID_ID: fim[1],
        Keys.Tokenizer.FIM_SUF_ID: fim[2],
    }.items():
        if type(number) is int and 0 <= number < len(vocabulary.tokens):
            writer.add_uint32(key, number)
    if template := _template(tokenizer):
        writer.add_chat_template(template)


def _template(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The checkpoint's own chat template, or StarChat's where only the vocabulary tells of its dialogue."""
    templates: Any = tokenizer.chat_template
    if isinstance(templates, dict):
        return [{"name": name, "template": text} for name, text in templates.items()]
    if not templates and Dialogue.detect(tokenizer) is not None:
        return CHAT_TEMPLATE
    return templates


def add_all(
    writer: Any, source: Source, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, kind: str
) -> None:
    """Write every key. kind: the type of most weights."""
    add_general(writer, source, kind)
    add_dimensions(writer, source.config())
    writer.add_vocab_size(len(vocabulary.tokens))
    add_tokenizer(writer, source, tokenizer, vocabulary)
