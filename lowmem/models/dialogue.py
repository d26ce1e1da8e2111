"""StarChat's dialogue: its template, its stop tokens, and the fill-in-the-middle tokens of its family.

    <|system|>
    {system}<|end|>
    <|user|>
    {query}<|end|>
    <|assistant|>
    {answer}<|end|>

A prompt ends with `<|assistant|>` and no newline: the model writes that itself. The system turn is always
present, and empty unless one is given.

`Dialogue.encode` inserts the markers by id and tokenizes the contents with special tokens switched off, so
that an `<|end|>` inside a question ends nothing. `render` returns text, in which the two look alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lowmem.errors import InvalidRequestError
from lowmem.models.turn_end import turn_end_ids
from lowmem.text.tokenizing import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
ROLES = ("system", "user", "assistant")
# (prefix, middle, suffix): StarCoder's spelling, then SantaCoder's.
FIM_SPELLINGS = (
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
)
# What begins a file: StarCoder's token, then those of StarCoder2 and Qwen, also for files without a name.
FILE_SPELLINGS = (("<filename>", False), ("<file_sep>", True), ("<|file_sep|>", True))

CHAT_TEMPLATE = """\
{%- set first = messages[0] if messages else none -%}
{{- '<|system|>\\n' + (first['content'] if first and first['role'] == 'system' else '') + '<|end|>\\n' -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' or message['role'] == 'assistant' -%}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' -}}
{%- elif message['role'] != 'system' or not loop.first -%}
{{- raise_exception('roles are system (first only), user and assistant, not ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""
"""Jinja text for `chat_template.jinja`; renders what `Dialogue.render` renders."""


@dataclass(frozen=True)
class Message:
    """One turn: `role` is "system" (the first message only), "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Dialogue:
    """StarChat's four markers, as text and as token ids of one tokenizer."""

    system_id: int
    user_id: int
    assistant_id: int
    end_id: int
    system: str = SYSTEM
    user: str = USER
    assistant: str = ASSISTANT
    end: str = END

    @classmethod
    def detect(cls, tokenizer: PreTrainedTokenizerBase) -> Dialogue | None:
        """The dialogue of a tokenizer whose vocabulary holds all four markers, otherwise None."""
        vocabulary = tokenizer.get_vocab()
        if not all(marker in vocabulary for marker in (SYSTEM, USER, ASSISTANT, END)):
            return None
        return cls(vocabulary[SYSTEM], vocabulary[USER], vocabulary[ASSISTANT], vocabulary[END])

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The dialogue as text.

        Raises InvalidRequestError for an unknown role, or a system message that is not the first.
        """
        turns = _with_system(messages)
        text = "".join(f"{self._marker(turn.role)[0]}\n{turn.content}{self.end}\n" for turn in turns)
        return text + self.assistant if add_generation_prompt else text

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool
    ) -> list[int]:
        """The dialogue as token ids; contents cannot forge a marker.

        Equal to tokenizing `render`'s text when no content spells a special token. Raises
        InvalidRequestError for an unknown role, or a system message that is not the first.
        """
        newline = encode_plain(tokenizer, "\n")
        ids: list[int] = []
        for turn in _with_system(messages):
            content = encode_plain(tokenizer, "\n" + turn.content)
            ids += [self._marker(turn.role)[1], *content, self.end_id, *newline]
        return [*ids, self.assistant_id] if add_generation_prompt else ids

    def _marker(self, role: str) -> tuple[str, int]:
        """The text and the id of the marker that opens a turn."""
        return {
            "system": (self.system, self.system_id),
            "user": (self.user, self.user_id),
            "assistant": (self.assistant, self.assistant_id),
        }[role]


def _with_system(messages: Sequence[Message]) -> list[Message]:
    """The messages with a system message first, empty if none is given; roles are checked."""
    for position, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidRequestError(f"{message.role!r} is not a role", f"Use one of {', '.join(ROLES)}")
        if message.role == "system" and position:
            raise InvalidRequestError(
                f"message {position + 1} is a system message", "Only the first message can be one"
            )
    if messages and messages[0].role == "system":
        return list(messages)
    return [Message("system", ""), *messages]


def split_turns(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """Split messages, without the system message, into turns; each starts at a user message."""
    starts = [at for at, message in enumerate(messages) if message.role == "user" or at == 0]
    return [tuple(messages[a:b]) for a, b in pairwise([*starts, len(messages)])]


def first_turn(wholes: Sequence[int], questions: Sequence[int], budget: int) -> int:
    """The first turn to keep so that a dialogue fits `budget` tokens; earlier turns are dropped.

    questions[i]: tokens of turn i as the last one, without its answer. wholes[i]: tokens that turn i adds to
    later dialogues; not needed for the last.

    Dropping as few turns as possible would change the first turn each time, and so recompute every prompt
    from the beginning. Instead, when a dialogue is too long, turns are dropped until half of the budget is
    free (but not the turn before the last, if it fits), and the first turn then stays for many turns. Earlier
    turns are replayed to find it: the same dialogue with one more turn has the same first turn until the
    budget is full. (Dropping to a share k costs k / (1 - k) tokens of prefill for each new one: 1 at a half,
    3 at 3/4.)
    """
    first = kept = 0  # kept: tokens of the turns from `first` to before `now`
    for now, question in enumerate(questions):
        kept += wholes[now - 1] if now else 0
        if kept + question <= budget:
            continue
        while first < now and (
            kept + question > budget or (kept + question > budget // 2 and first < now - 1)
        ):
            kept -= wholes[first]
            first += 1
    return first


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of plain text: no special token is recognised in it, none is added.

    Where a tokenizer ignores `split_special_tokens` (slow ones, or markers that were added without being
    declared special), each marker in the text is split after its first character instead.
    """
    ids = _tokenize(tokenizer, text)
    markers = {
        added.content: token
        for token, added in tokenizer.added_tokens_decoder.items()
        if len(added.content) > 1 and (added.special or re.fullmatch(r"<[^<>\s]+>", added.content))
    }
    present = [marker for marker in markers if marker in text]
    if not present or not {markers[marker] for marker in present}.intersection(ids):
        return ids
    # The lookahead finds every start, also of overlapping markers.
    starts = re.finditer("(?=" + "|".join(map(re.escape, present)) + ")", text)
    cuts = [0, *(match.start() + 1 for match in starts), len(text)]
    return [token for a, b in pairwise(cuts) for token in _tokenize(tokenizer, text[a:b])]


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids without added special tokens."""
    return encode(tokenizer, text, add_special_tokens=False, split_special_tokens=True)


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue | None, *configs: Any
) -> tuple[int, ...]:
    """The ids that stop generation: the end of a turn first, then every end of text.

    configs: the model's and the generation config, as objects or mappings with `eos_token_id`, an int or a
    list. StarChat's name only `<|endoftext|>`, which is why the end of a turn is added here: that of the
    dialogue, or else of the chat template. Llama 3's generation config names several. Other values are
    ignored.
    """
    ids: list[Any] = [*turn_end_ids(tokenizer)] if dialogue is None else [dialogue.end_id]
    for config in (tokenizer, *configs):
        eos = (
            config.get("eos_token_id")
            if isinstance(config, Mapping)
            else getattr(config, "eos_token_id", None)
        )
        ids += eos if isinstance(eos, (list, tuple)) else [eos]
    return tuple(dict.fromkeys(token for token in ids if type(token) is int))


def fim_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int] | None:
    """Ids of the fill-in-the-middle tokens (prefix, middle, suffix), or None if the tokenizer has none.

    A prompt is prefix, code before, suffix, code after, middle; the model then writes the middle.
    """
    vocabulary = tokenizer.get_vocab()
    for prefix, middle, suffix in FIM_SPELLINGS:
        if prefix in vocabulary and middle in vocabulary and suffix in vocabulary:
            return vocabulary[prefix], vocabulary[middle], vocabulary[suffix]
    return None


def file_token(tokenizer: PreTrainedTokenizerBase) -> tuple[int, bool] | None:
    """Id of the token that begins a file, and whether files without a name have it too; None without one."""
    vocabulary = tokenizer.get_vocab()
    for spelling, unnamed in FILE_SPELLINGS:
        if spelling in vocabulary:
            return vocabulary[spelling], unnamed
    return None


def share_room(before: int, after: int, room: int) -> tuple[int, int]:
    """How many tokens before and after the gap to keep: 3 to 1 of `room` tokens when both are long.

    A side that needs less leaves the rest to the other.
    """
    kept_after = min(after, max(room // 4, room - before))
    return min(before, room - kept_after), kept_after
