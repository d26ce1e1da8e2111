"""/tokenize and /detokenize: a text's tokens and back, in llama.cpp's form and in vLLM's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from lowmem.loading.loader import LoadedModel
from lowmem.models.dialogue import encode_plain
from lowmem.server.api_errors import invalid
from lowmem.server.protocol import MOST_MESSAGES, ChatMessage, ChatRequest, Text
from lowmem.server.turns import encode_turns
from lowmem.server.variants import Flag
from lowmem.text.stream import token_text
from lowmem.text.tokenizing import decode, encode

MOST_TOKENS = 1 << 20
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_CHAT_ONLY = ("tools", "chat_template_kwargs", "add_generation_prompt")
_TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(max_length=MOST_TOKENS)]


class TokenizeRequest(BaseModel):
    """The body of POST /tokenize: `content` in llama.cpp's form, `prompt` or `messages` in vLLM's."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: Text | None = None
    content: Text | None = None
    add_special: Flag | None = None
    """Add the tokenizer's special tokens to `content`; false by default."""
    parse_special: Flag | None = None
    """Special tokens that `content` spells are those tokens; true by default."""
    with_pieces: Flag | None = None
    """Return each token of `content` with its text, or its bytes if they are no text."""
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    """A conversation, up to where the answer begins."""
    add_special_tokens: Flag | None = None
    """Add the tokenizer's special tokens to `prompt`; true by default."""
    return_token_strs: Flag | None = None
    """Return the texts of the tokens of `prompt` or `messages` too."""
    add_generation_prompt: Flag | None = None
    """The answer begins behind `messages`, always."""
    tools: Annotated[list[dict[str, Any]], Field(max_length=MOST_MESSAGES)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(BaseModel):
    """The body of POST /detokenize."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: Text | None = None
    tokens: _TokenIds


def tokenized(loaded: LoadedModel, context: int, request: TokenizeRequest) -> dict[str, Any]:
    """The response to a text or a conversation. Raises ApiError for one that has no tokens."""
    given = [name for name in ("content", "prompt", "messages") if getattr(request, name) is not None]
    if len(given) != 1:
        raise invalid("Send one of content, prompt and messages", given[1] if given else "content")
    tokenizer = loaded.tokenizer
    if request.content is not None:
        ids = _content(tokenizer, request.content, request)
        if not request.with_pieces:
            return {"tokens": ids}
        piece = cache(lambda token: _piece(tokenizer, token))
        return {"tokens": [{"id": token, "piece": piece(token)} for token in ids]}
    ids = _prompt(loaded, request)
    text = cache(lambda token: token_text(tokenizer, token))
    texts = [text(token) for token in ids] if request.return_token_strs else None
    return {"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": texts}


def detokenized(loaded: LoadedModel, vocabulary: int, tokens: Sequence[int]) -> dict[str, str]:
    """The text of token ids, special tokens included, under llama.cpp's name and vLLM's."""
    if tokens and max(tokens) >= vocabulary:
        raise invalid(f"token ids must be below {vocabulary}, the size of the vocabulary", "tokens")
    text = decode(loaded.tokenizer, tokens, skip_special_tokens=False)
    return {"content": text, "prompt": text}


def _content(tokenizer: Any, text: str, request: TokenizeRequest) -> list[int]:
    special = bool(request.add_special)
    if request.parse_special is False and not special:
        return encode_plain(tokenizer, text)
    return encode(
        tokenizer,
        text,
        add_special_tokens=special,
        split_special_tokens=request.parse_special is False,
    )


def _prompt(loaded: LoadedModel, request: TokenizeRequest) -> list[int]:
    if request.messages is None:
        for name in _CHAT_ONLY:
            if getattr(request, name) is not None:
                raise invalid(f"{name} needs messages", name)
        special = request.add_special_tokens is not False
        return encode(loaded.tokenizer, request.prompt or "", add_special_tokens=special)
    if request.add_special_tokens:
        raise invalid("add_special_tokens needs prompt; the chat template has its own", "add_special_tokens")
    if request.add_generation_prompt is False:
        raise invalid("add_generation_prompt must be true. Leave it out", "add_generation_prompt")
    chat = ChatRequest(
        messages=request.messages, tools=request.tools, chat_template_kwargs=request.chat_template_kwargs
    )
    return encode_turns(loaded, chat)


def _piece(tokenizer: Any, token: int) -> str | list[int]:
    """The text of a token, or its bytes if they are a part of a character."""
    text = token_text(tokenizer, token)
    if "\ufffd" not in text:
        return text
    name = str(tokenizer.convert_ids_to_tokens(token))
    if match := _BYTE.fullmatch(name):
        return [int(match.group(1), 16)]
    letters = _byte_letters()
    return [letters[letter] for letter in name] if all(letter in letters for letter in name) else text


@cache
def _byte_letters() -> dict[str, int]:
    """The byte of each letter in the tokens of byte-level BPE: printable ones are themselves (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }
