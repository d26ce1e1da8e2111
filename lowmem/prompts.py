"""Text and messages → token ids that fit the context, with an account of what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowmem.checkpoint.files.reading import one_line
from lowmem.errors import InvalidRequestError
from lowmem.loading.loader import LoadedModel
from lowmem.models.dialogue import (
    ROLES,
    Message,
    encode_plain,
    file_token,
    fim_tokens,
    first_turn,
    share_room,
    split_turns,
)
from lowmem.models.template import apply_template
from lowmem.text.tokenizing import encode

_PROBE = Message("user", "x")  # a short last message, with which the tokens of a turn are counted


@dataclass(frozen=True)
class Prompt:
    """What the engine continues."""

    ids: list[int]
    dropped_turns: int = 0
    """Turns at the start of the messages that were left out to fit the context."""
    cut_tokens: int = 0
    """Tokens at the far ends of a prefix and a suffix that were left out to fit the context."""


@dataclass(frozen=True)
class Snippet:
    """A piece of another file, which a hole's prompt begins with."""

    name: str
    """The file's name; may be empty."""
    text: str


def encode_prompt(
    loaded: LoadedModel, prompt: str | Sequence[Message], *, system: str | None = None, raw: bool = False
) -> list[int]:
    """Encode a question, or the messages so far, as the model expects a dialogue.

    Applies the dialogue format of the model's special tokens, or else the tokenizer's chat template, or else
    none. Message contents never become special tokens. raw: apply no template; the text is continued.
    Raises InvalidRequestError for a system text or several messages without a template.
    """
    tokenizer = loaded.tokenizer
    if raw or (loaded.dialogue is None and not tokenizer.chat_template):
        if not isinstance(prompt, str) or system is not None:
            reason = "--raw applies none" if raw else "this model has none"
            raise InvalidRequestError(
                f"messages need a dialogue template, and {reason}", "Give a single prompt without --system"
            )
        return encode(tokenizer, prompt)
    return _encode_messages(loaded, as_messages(prompt, system))


def opened(loaded: LoadedModel, ids: list[int]) -> list[int]:
    """A dialogue's prompt, and the line end that the model itself would write before its answer.

    A grammar has no place for it.
    """
    return ids if loaded.dialogue is None else [*ids, *encode_plain(loaded.tokenizer, "\n")]


def as_messages(prompt: str | Sequence[Message], system: str | None) -> list[Message]:
    """The prompt as messages, behind the system text if there is one."""
    messages = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
    return messages if system is None else [Message("system", system), *messages]


class PromptFitter:
    """Fits dialogues and texts with a hole into `context` tokens."""

    def __init__(self, loaded: LoadedModel, context: int) -> None:
        self.loaded, self.context = loaded, context
        self._counted: dict[tuple[Message, ...], tuple[int, int]] = {}  # of the last dialogue's past turns

    def fit_messages(self, messages: Sequence[Message], room: int) -> Prompt:
        """Encode messages, leaving out turns at the start until `room` tokens are free for the answer.

        The system text and the last turn stay. `dialogue.first_turn` says how many turns go. Raises
        InvalidRequestError if what must stay exceeds the context.
        """
        head = [message for message in messages[:1] if message.role == "system"]
        turns = split_turns(messages[len(head) :])
        probe = self._count([_PROBE])
        system = self._count([*head, _PROBE]) - probe
        self._counted = {turn: self._counted.get(turn) or self._count_turn(turn) for turn in turns[:-1]}
        wholes = [self._counted[turn][0] for turn in turns[:-1]]
        questions = [self._counted[turn][1] for turn in turns[:-1]]
        questions.append(self._count(turns[-1]) if turns else 0)
        first = first_turn(wholes, questions, self.context - room - system)
        while True:
            kept = [*head, *(message for turn in turns[first:] for message in turn)]
            ids = _encode_messages(self.loaded, kept)
            # A chat template may produce more tokens for a dialogue than for its turns; then one more goes.
            if len(ids) + room <= self.context or first >= len(turns) - 1:
                break
            first += 1
        if len(ids) > self.context:
            raise InvalidRequestError(
                f"the system text and the last message have {len(ids)} tokens; "
                f"the context has room for {self.context}",
                "Shorten them, or use a larger --context if the model has the positions",
            )
        return Prompt(ids, dropped_turns=first)

    def fit_hole(self, prefix: str, suffix: str, room: int, snippets: Sequence[Snippet] = ()) -> Prompt:
        """Encode a prefix and a suffix with the model's fill-in-the-middle tokens around them.

        What does not fit beside `room` tokens for the answer is cut at the far ends; `dialogue.share_room`
        says how much of each. snippets: text of other files, the most useful last; the last ones that half of
        the context holds come first in the prompt. Raises InvalidRequestError for a context that is too
        small, or a model without these tokens.
        """
        tokenizer = self.loaded.tokenizer
        markers = fim_tokens(tokenizer)
        if markers is None:
            raise InvalidRequestError(
                "this model has no fill-in-the-middle tokens",
                "Use a model trained for it (StarCoder's family is), or ask in words with lowmem run",
            )
        others = self._fit_snippets(snippets)
        room = self.context - room - len(markers) - len(others)
        if room < 1:
            raise InvalidRequestError(
                f"a context of {self.context} tokens has no room for a prefix or suffix",
                "Use a larger --context",
            )
        before, after = encode_plain(tokenizer, prefix), encode_plain(tokenizer, suffix)
        kept_before, kept_after = share_room(len(before), len(after), room)
        cut = len(before) + len(after) - kept_before - kept_after
        before = before[len(before) - kept_before :]
        hole = [markers[0], *before, markers[2], *after[:kept_after], markers[1]]
        return Prompt([*others, *hole], cut_tokens=cut)

    def _fit_snippets(self, snippets: Sequence[Snippet]) -> list[int]:
        """The token ids of the last snippets, each as a whole, that half of the context holds.

        The limit does not depend on the hole, so the same snippets give the same beginning of a prompt, which
        stays in the KV cache. A model without a token for files gets plain text.
        """
        tokenizer = self.loaded.tokenizer
        marker = file_token(tokenizer)
        found: list[list[int]] = []
        room = self.context // 2
        for snippet in reversed(snippets):
            text = snippet.text if snippet.text.endswith("\n") else snippet.text + "\n"
            if marker is None:
                head = f"--- {snippet.name} ---\n" if snippet.name else "---\n"
                ids = encode_plain(tokenizer, f"{head}{text}\n")
            else:
                ids = [marker[0], *encode_plain(tokenizer, f"{snippet.name}\n{text}")]
            if len(ids) > room:
                break
            room -= len(ids)
            found.append(ids)
        if found and marker is not None and marker[1]:
            found.insert(0, [marker[0]])  # before the file with the hole
        return [token for ids in reversed(found) for token in ids]

    def _count(self, messages: Sequence[Message]) -> int:
        return len(_encode_messages(self.loaded, messages))

    def _count_turn(self, turn: tuple[Message, ...]) -> tuple[int, int]:
        """(tokens that a turn adds before later messages, tokens of a prompt with its question alone).

        Both without a system text; exact for dialogue formats, whose turns only add up.
        """
        return self._count([*turn, _PROBE]) - self._count([_PROBE]), self._count(turn[:1])


def _encode_messages(loaded: LoadedModel, messages: Sequence[Message]) -> list[int]:
    tokenizer, dialogue = loaded.tokenizer, loaded.dialogue
    if dialogue is not None:
        # The model generates the newline before an answer, so an answer that comes back may begin with it.
        given = [
            replace(turn, content=turn.content.removeprefix("\n")) if turn.role == "assistant" else turn
            for turn in messages
        ]
        return list(dialogue.encode(tokenizer, given, add_generation_prompt=True))
    for message in messages:
        if message.role not in ROLES:  # a template may paste it into a marker
            raise InvalidRequestError(f"{message.role!r} is not a role", f"Use one of {', '.join(ROLES)}")
    try:
        return apply_template(
            tokenizer,
            [{"role": message.role, "content": message.content} for message in messages],
            add_generation_prompt=True,
            sanitize_control_tokens=True,
        )
    except InvalidRequestError:  # the tokenizer's
        raise
    except Exception as error:  # the checkpoint's template may raise anything
        raise template_refused(error) from error


def template_refused(error: Exception) -> InvalidRequestError:
    """The error for messages that make a chat template raise `error`."""
    return InvalidRequestError(
        f"the model's chat template refuses the messages: {one_line(error)}",
        "Leave --system out, or the template with --raw",
    )
