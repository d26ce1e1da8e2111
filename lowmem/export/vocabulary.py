"""A tokenizer in llama.cpp's keys.

llama.cpp has two tokenizers that matter here. Its "gpt2" merges the bytes of GPT-2's alphabet, after a split
that it knows by name (`tokenizer.ggml.pre`); the splits below are those of its llama-vocab.cpp. Its "llama"
is sentencepiece's BPE: it joins the two neighbours whose union has the highest score. Any other tokenizer
would split texts differently, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem.errors import SourceError
from lowmem.text.tokenizing import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
"""What the pre-tokenizer ByteLevel splits by."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_DIGIT = "\\p{N}"
_SPLITS = {
    # regular expressions in their order, whole tokens taken without merges → llama.cpp's name
    ((_GPT2,), False): "gpt-2",
    ((rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), True): "llama-bpe",
    ((rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), False): "smaug-bpe",
    ((rf"{_WORDS}|\p{{N}}|{_REST}",), False): "qwen2",
    ((rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASH}",), True): "tekken",
    (
        (rf"{_CASED[0]}{_ENDINGS}|{_CASED[1]}{_ENDINGS}|\p{{N}}{{1,3}}|{_SLASH}",),
        False,
    ): "gpt-4o",
    (("[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", "[一-龥ࠀ-一가-퟿]+", _DIGIT), False): "deepseek-coder",
}
_SPACE = "▁"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llama.cpp's keys."""

    model: str
    """"gpt2" or "llama"."""
    tokens: tuple[str, ...]
    """By id, gaps filled."""
    types: tuple[int, ...]
    """gguf's TokenType of each."""
    merges: tuple[str, ...] = ()
    """Of "gpt2"."""
    pre: str = "default"
    """llama.cpp's name of the split before merges."""
    scores: tuple[float, ...] = ()
    """Of "llama": the higher, the earlier a token is put together."""
    space_prefix: bool = False
    """A text begins with a space."""
    adds_bos: bool = False
    """A text begins with the token bos."""
    notes: tuple[str, ...] = ()
    """Lines for the user on texts that llama.cpp splits differently."""


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, digits: str = "starcoder") -> Vocabulary:
    """A fast tokenizer in llama.cpp's keys, for an embedding of `size` rows.

    digits: llama.cpp's name for GPT-2's split after single digits. Raises SourceError for a tokenizer that
    llama.cpp has no counterpart of.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    model = data["model"]
    if model["type"] != "BPE" or model.get("dropout"):
        raise _unknown(f"its model is {model['type']}")
    tokens, types = _listed(data, size, tokenizer.unk_token if model.get("byte_fallback") else None)
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and encode(tokenizer, "a", add_special_tokens=True)[:1] == [bos]
    if model.get("byte_fallback"):
        scores = _scores(tokens, _merges(model))
        return Vocabulary(
            "llama", tokens, types, scores=scores, space_prefix=_space_prefix(data), adds_bos=adds_bos
        )
    notes = []
    if data["normalizer"]:
        if data["normalizer"] != {"type": "NFC"}:
            raise _unknown(f"it normalizes texts ({data['normalizer'].get('type')})")
        notes.append(
            "llama.cpp does not normalize texts: those that are not in Unicode's NFC become other tokens"
        )
    pre = _split_name(data["pre_tokenizer"], bool(model.get("ignore_merges")), digits)
    return Vocabulary("gpt2", tokens, types, _merges(model), pre, adds_bos=adds_bos, notes=tuple(notes))


def _unknown(why: str) -> SourceError:
    return SourceError(
        f"the tokenizer is not a byte-level BPE, or sentencepiece's, that llama.cpp knows by name: {why}",
        "Run the model with lowmem instead",
    )


def _listed(
    data: Mapping[str, Any], size: int, unknown: str | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Every token and its type, by id.

    unknown: of sentencepiece, its token for what has none; `<0x0A>` is then the token of a byte.
    """
    from gguf import TokenType

    found = {number: (token, TokenType.NORMAL) for token, number in data["model"]["vocab"].items()}
    if unknown is not None:
        for number, (token, _) in found.items():
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                found[number] = (token, TokenType.BYTE)
    for token in data["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        if token["content"] == unknown:
            kind = TokenType.UNKNOWN
        found[token["id"]] = (token["content"], kind)
    # Rows of the embedding without a token get a name that no text encodes to.
    listed = [found.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(size)]
    return tuple(token for token, _ in listed), tuple(int(kind) for _, kind in listed)


def _merges(model: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])


# --- gpt2 ---------------------------------------------------------------------------------------------------


def _split_name(pre: Mapping[str, Any] | None, ignore_merges: bool, digits: str) -> str:
    """llama.cpp's name of the splits before merges."""
    splits = _splits(pre or {})
    if splits == (_DIGIT, _GPT2) and not ignore_merges:
        return digits
    name = _SPLITS.get((splits, ignore_merges)) if splits else None
    if name is None:
        raise _unknown("it splits texts by other rules")
    return name


def _splits(pre: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The regular expressions that a byte-level pre-tokenizer splits by, in order; None for another one."""
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    last, found = steps[-1], []
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    for step in steps[:-1]:
        if step.get("type") == "Digits" and step.get("individual_digits"):
            found.append(_DIGIT)
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step["pattern"]
            found.append(pattern.get("Regex") or pattern.get("String", ""))
        else:
            return None
    return (*found, _GPT2) if last.get("use_regex", True) else tuple(found)


# --- sentencepiece ------------------------------------------------------------------------------------------


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> tuple[float, ...]:
    """A score for each token, so that joining the best neighbours first is merging in the order of `merges`.

    Raises SourceError where no scores do this: merges of one token that are not next to each other.
    """
    ranks: dict[str, int] = {}
    previous = ""
    for merge in merges:
        token = merge.replace(" ", "")
        if token != previous and token in ranks:
            raise _unknown("its merges do not follow from scores of its tokens")
        ranks.setdefault(token, len(ranks))
        previous = token
    return tuple(-float(ranks.get(token, len(ranks))) for token in tokens)


def _space_prefix(data: Mapping[str, Any]) -> bool:
    """Whether a text begins with a space. Raises SourceError for rules that sentencepiece does not have."""
    normalizer, pre = data["normalizer"] or {}, data["pre_tokenizer"]
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
    steps = [step for step in steps if step]
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if pre is None:
        if steps == [{"type": "Prepend", "prepend": _SPACE}, escape]:
            return True
        if steps == [escape]:
            return False
    elif not steps and (pre.get("type"), pre.get("split", True)) == ("Metaspace", False):
        return bool(pre.get("prepend_scheme", "always") != "never")
    raise _unknown("it splits texts by other rules")
