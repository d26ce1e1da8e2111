"""Check a tokenizer's ids against the rows of a model's embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from lowmem.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FEWEST = 3 / 4
"""The least share of a model's rows that its own tokenizer uses: rows are rounded up, often to 128."""


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    needed: Iterable[int] = (),
    notify: Callable[[str], None] = lambda line: None,
) -> None:
    """Compare the tokenizer's ids with a model whose embedding has `rows` rows.

    needed: ids that answers require, such as the markers of a dialogue. notify: called for added tokens that
    the model does not have, and for a model with far more rows than tokens. Raises SourceError when text can
    be encoded to an id that the model does not have, or when it lacks one of `needed`.
    """
    vocabulary = tokenizer.get_vocab()
    if not vocabulary:
        raise SourceError(
            "the tokenizer has no tokens", "Put the model's own tokenizer.json beside its weights"
        )
    beyond = {token: number for token, number in vocabulary.items() if number >= rows}
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    plain = [token for token in beyond if token not in added]
    unusable = sorted({number for number in needed if number >= rows})
    if plain or unusable:
        highest = max(beyond.values(), default=max(unusable, default=0))
        raise SourceError(
            f"the tokenizer gives tokens up to {highest}, and the model has {rows}: it is another model's",
            "Put the model's own tokenizer files beside its weights",
        )
    if beyond:
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        notify(f"the model of {rows} tokens does not have the tokenizer's {min(beyond)!r}{more}")
    elif len(vocabulary) < rows * _FEWEST:
        notify(f"the tokenizer has {len(vocabulary)} tokens, and the model {rows}: it may be another model's")


def check_draft(tokenizer: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
    """Compare the tokenizer of a draft model with that of the model that it drafts for.

    Raises SourceError unless every id that both have is the same token.
    """
    own, other = ({number: token for token, number in one.get_vocab().items()} for one in (tokenizer, draft))
    both = own.keys() & other.keys()
    different = min((number for number in both if own[number] != other[number]), default=None)
    if different is not None or not both:
        what = (
            f"token {different} is {own[different]!r} here and {other[different]!r} there" if both else "none"
        )
        raise SourceError(
            f"the draft model has another vocabulary: {what}",
            "Use a small model of the same family, one whose vocabulary begins like the model's",
        )


def stand_in(draft: PreTrainedTokenizerBase) -> int:
    """The token that a draft model reads for those that it lacks: a newline, or the end of text."""
    newline = draft("\n", add_special_tokens=False).input_ids
    return int(newline[0]) if len(newline) == 1 else int(draft.eos_token_id or 0)
