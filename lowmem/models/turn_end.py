"""Find the token with which a chat template ends an assistant's turn.

Many checkpoints name only the end of the text as `eos_token`: their models end an answer with another token,
which the template writes after each answer (`<|eot_id|>`, `<|im_end|>`, `<end_of_turn>`). The template itself
is the one file that always tells.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lowmem.models.template import apply_template, render_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "lowmem-answer"
_USER = {"role": "user", "content": "x"}
_CONTROL = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
"""The form of a control token that its tokenizer does not declare special."""


def turn_end_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The id of the token that the chat template writes after an assistant's answer; empty if it writes none.

    Of several tokens without text between them, the last counts: the others close parts of the answer. A
    template that ends turns only before the next one (GLM's) is asked with a further question. Nothing is
    raised for a template that fails: it is reported when it is used.
    """
    if not getattr(tokenizer, "chat_template", None):
        return ()
    turn = [_USER, {"role": "assistant", "content": _ANSWER}]
    for messages in (turn, [*turn, _USER]):
        tail = _after_answer(tokenizer, messages)
        found = None if tail is None else _last_control(tokenizer, tail)
        if found is not None:
            return (found,)
    return ()


def _after_answer(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str | None:
    """What the template writes after the answer; None if it fails or leaves the answer out."""
    try:
        text = render_template(tokenizer, messages)
        if _ANSWER not in text:
            ids = apply_template(tokenizer, messages)  # a template that reads lists of parts
            text = tokenizer.decode(ids, skip_special_tokens=False)
    except Exception:  # the template may raise anything
        return None
    _, answer, tail = text.rpartition(_ANSWER)
    return tail if answer else None


def _last_control(tokenizer: PreTrainedTokenizerBase, tail: str) -> int | None:
    """The last of the control tokens at the start of a text, behind white space."""
    tokens = {
        added.content: number
        for number, added in tokenizer.added_tokens_decoder.items()
        if added.content.strip() and (added.special or _CONTROL.fullmatch(added.content))
    }
    if not tokens:
        return None
    any_of = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
    tail, found = tail.lstrip(), None
    while match := any_of.match(tail):
        found, tail = tokens[match[0]], tail[match.end() :]
    return found
