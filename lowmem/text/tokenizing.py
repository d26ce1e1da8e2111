"""Text → token ids → text, with a tokenizer that is not trusted.

A tokenizer's files come with the checkpoint, and transformers' tokenizers are written in Rust: where their
code fails (a regular expression that backtracks more than ten million times) it panics, which `except
Exception` does not catch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from lowmem.errors import InvalidRequestError


def encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Encode a text to token ids, without the tokenizer's warning about long texts.

    options: further arguments of the tokenizer's call. Raises InvalidRequestError when the tokenizer panics.
    """
    with panics_told():
        return list(tokenizer(text, verbose=False, **options)["input_ids"])


def decode(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """Decode token ids to text, without the tokenizer's clean-up of spaces.

    Raises InvalidRequestError when the tokenizer panics.
    """
    with panics_told():
        return str(
            tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )


@contextlib.contextmanager
def panics_told() -> Iterator[None]:
    """Turn a panic of the tokenizers' Rust code into InvalidRequestError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of pyo3; it cannot be imported
            raise
        raise InvalidRequestError(
            f"the model's tokenizer fails on this text: {error}",
            "Its tokenizer.json may be damaged: replace it by the model's own",
        ) from error
