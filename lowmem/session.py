"""Text in, a stream of text out: dialogue template, tokens, engine, and text again with its figures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowmem.checkpoint.files import one_line
from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError
from lowmem.generate.engine import FinishReason, Token, generate
from lowmem.loader import LoadedModel
from lowmem.models.dialogue import Message

_CARD = SamplingParams()  # the settings of StarChat Alpha's card
_INCOMPLETE = "\ufffd"  # what a decoder shows for bytes that are no whole character (yet)


@dataclass(frozen=True)
class Response:
    """A piece of an answer, or a whole one, with the figures up to its end.

    text: the new piece from `Session.stream`, the whole answer from `Session.complete`. finish_reason:
    None while there is more to come. new_tokens: all that were generated, the one that ends the turn
    included. ttft_seconds: from the request to the first token. tokens_per_second: of the tokens after
    the first; 0 where there is none.
    """

    text: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    new_tokens: int
    ttft_seconds: float
    tokens_per_second: float


class TextStream:
    """Token ids one at a time → text in whole characters.

    A token may hold a part of a character's bytes; the text waits until they are complete. Each piece is
    what the last tokens add to the text of those before them, since some tokenizers write a token
    differently at the start of a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # those since `_given` began; older ones do not matter any more
        self._given = 0  # of which so many are given out as text

    def push(self, token: int) -> str:
        """The text that is complete with this token; it may be empty."""
        self._ids.append(token)
        piece, whole = self._piece()
        if not piece or whole.endswith(_INCOMPLETE):
            return ""
        del self._ids[: self._given]
        self._given = len(self._ids)
        return piece

    def finish(self) -> str:
        """What is left, broken characters as U+FFFD."""
        piece, _ = self._piece()
        self._given = len(self._ids)
        return piece

    def _piece(self) -> tuple[str, str]:
        given, whole = self._text(self._ids[: self._given]), self._text(self._ids)
        return whole[len(given) :], whole

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class Session:
    """Answers prompts with a loaded model, one at a time."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded

    def encode(
        self, prompt: str | Sequence[Message], *, system: str | None = None, raw: bool = False
    ) -> list[int]:
        """The token ids that the model is given.

        prompt: one question, or the messages so far. The dialogue format of the model's tokens is applied,
        or else the tokenizer's own chat template, or else none. raw: none in any case; the text is continued.
        Raises InvalidRequestError where a system text or several messages have no template to go into.
        """
        tokenizer, dialogue = self.loaded.tokenizer, self.loaded.dialogue
        templated = not raw and (dialogue is not None or bool(tokenizer.chat_template))
        if not templated:
            if not isinstance(prompt, str) or system is not None:
                reason = "--raw applies none" if raw else "this model has none"
                raise InvalidRequestError(
                    f"messages need a dialogue template, and {reason}", "Give a prompt alone"
                )
            return list(tokenizer(prompt).input_ids)
        messages = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
        if system is not None:
            messages.insert(0, Message("system", system))
        if dialogue is not None:
            return list(dialogue.encode(tokenizer, messages, add_generation_prompt=True))
        try:
            ids = tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.content} for message in messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except Exception as error:  # the template is the checkpoint's, and raises what it likes
            raise InvalidRequestError(
                f"the model's chat template refuses the messages: {one_line(error)}", "Leave --system out"
            ) from error
        return list(ids)

    def stream(
        self,
        prompt: str | Sequence[Message],
        params: SamplingParams = _CARD,
        *,
        system: str | None = None,
        raw: bool = False,
    ) -> Iterator[Response]:
        """Answer piece by piece; the last response has a finish_reason.

        The request is checked at once: InvalidRequestError comes from here, not from the first next().
        """
        start = time.perf_counter()
        ids = self.encode(prompt, system=system, raw=raw)
        tokens = generate(self.loaded.model, ids, params, self.loaded.stop_ids)
        return self._responses(tokens, len(ids), start)

    def complete(
        self,
        prompt: str | Sequence[Message],
        params: SamplingParams = _CARD,
        *,
        system: str | None = None,
        raw: bool = False,
    ) -> Response:
        """The whole answer at once."""
        pieces = list(self.stream(prompt, params, system=system, raw=raw))
        return replace(pieces[-1], text="".join(piece.text for piece in pieces))

    def _responses(self, tokens: Iterator[Token], prompt_tokens: int, start: float) -> Iterator[Response]:
        text = TextStream(self.loaded.tokenizer)
        first = 0.0
        for count, token in enumerate(tokens, 1):
            now = time.perf_counter()
            first = first or now
            piece = "" if token.finish_reason == "stop" else text.push(token.id)
            if token.finish_reason:
                piece += text.finish()
            if piece or token.finish_reason:
                rate = (count - 1) / (now - first) if count > 1 else 0.0
                yield Response(piece, token.finish_reason, prompt_tokens, count, first - start, rate)
