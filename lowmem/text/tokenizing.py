"""Text → token ids → text, with a tokenizer of which anything may be expected.

Its files come with the checkpoint, and transformers' tokenizers are Rust: where their code gives up (a
regular expression that tries more than ten million ways at one place of a text) it panics, which no
`except Exception` sees.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from lowmem.errors import InvalidRequestError


def encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """The token ids of a text, without the warning about long ones. `options`: of the tokenizer's call.

    Raises InvalidRequestError where the tokenizer gives up.
    """
    with panics_told():
        return list(tokenizer(text, verbose=False, **options)["input_ids"])


def decode(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """The text of token ids as it was, with no space put right. Raises as `encode` does."""
    with panics_told():
        return str(
            tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )


@contextlib.contextmanager
def panics_told() -> Iterator[None]:
    """A panic of the tokenizers' Rust → InvalidRequestError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3's; no module has it to be imported from
            raise
        raise InvalidRequestError(
            f"the model's tokenizer gives up on this text: {error}",
            "Its tokenizer.json may be damaged: put the model's own in its place",
        ) from error
