"""A chat: it asks the session, shows the answer and keeps both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from lowmem.chat.conversation import ChatState, Conversation, Exchange
from lowmem.chat.figures import describe, dropped_note, figures, memory_now
from lowmem.chat.terminal import Interrupts, forget_typed, quiet_keyboard
from lowmem.chat.text import clean
from lowmem.chat.view import View, make_view
from lowmem.config import SamplingParams
from lowmem.errors import LowmemError

if TYPE_CHECKING:
    from lowmem.session import Response, Session

_LONG_PROMPT = 256
"""Tokens of a prompt from which on the progress of prefill is shown."""


class Chat:
    """A conversation with a session. Commands read and change its attributes."""

    def __init__(
        self,
        session: Session,
        console: Console,
        state: ChatState,
        view: Callable[[Console], View] = make_view,
    ) -> None:
        self.session = session
        self.conversation = state.conversation
        self.params = state.params
        self.model = state.model
        self.last: Response | None = None
        """The end of the last answer, with its figures."""
        self.answers = 0
        self.new_tokens = 0
        """Tokens of all answers."""
        self.dropped = 0
        """Turns left out of the last prompt to fit the context."""
        self.interrupts = Interrupts()
        loaded = session.loaded
        self.templated = loaded.dialogue is not None or bool(loaded.tokenizer.chat_template)
        """Whether the model has a dialogue template; otherwise each message is continued on its own."""
        self._console, self._view = console, view
        self._retries = 0  # of the last question

    @property
    def state(self) -> ChatState:
        """What /save writes."""
        return ChatState(self.conversation, self.params, self.model)

    def answer(self, question: str, *, again: bool = False) -> bool:
        """Answer the question, show the answer and keep both. Returns whether there was an answer to keep.

        again: use another seed than before. Raises LowmemError for a request that cannot be served.
        """
        self._retries = self._retries + 1 if again else 0
        params = self.params
        if params.seed is not None:
            params = replace(params, seed=(params.seed + self._retries) % (1 << 63))
        text, last, stopped = self._stream(question, params)
        if last is None:
            self.note("stopped before the first token; the question is not kept")
            return False
        if not text.strip() and not stopped:
            self.note("the model gave an empty answer")
        self.last = last
        self.answers += 1
        self.new_tokens += last.new_tokens
        self.dropped = last.dropped_turns
        self.conversation = self.conversation.with_exchange(Exchange(question, text, stopped))
        if last.dropped_turns:
            self.note(dropped_note(last.dropped_turns))
        hint = " (to raise the limit: /set max_new_tokens N)" if last.finish_reason == "length" else ""
        self.note(figures(last, memory_now(self.session.loaded), stopped=stopped) + hint)
        return True

    def _stream(self, question: str, params: SamplingParams) -> tuple[str, Response | None, bool]:
        """The answer's text, its last response, and whether Ctrl-C ended it."""
        text, last, stopped = "", None, False
        responses: Iterator[Response] | None = None
        self._console.file.write("\n")
        with quiet_keyboard(), self._view(self._console) as view:
            view.waiting("reading")

            def on_prefill(done: int, total: int) -> None:
                if total >= _LONG_PROMPT:
                    view.waiting(f"reading {done:,}/{total:,} tokens")

            try:
                with self.interrupts.armed():
                    responses = self._request(question, params, on_prefill)
                while True:
                    with self.interrupts.armed():
                        response = next(responses, None)
                    if response is None:
                        break
                    text += response.text
                    last = response
                    view.push(response.text)
            except KeyboardInterrupt:
                stopped = True
                forget_typed()
            finally:
                close = getattr(responses, "close", None)  # closing the generator stops the engine
                if close is not None:
                    close()
        if text.strip():
            self._console.file.write("\n")
        return text, last, stopped

    def _request(
        self, question: str, params: SamplingParams, on_prefill: Callable[[int, int], None]
    ) -> Iterator[Response]:
        if not self.templated:
            return self.session.stream(question, params, raw=True, on_prefill=on_prefill)
        messages, system = self.conversation.messages(question), self.conversation.system
        return self.session.stream(messages, params, system=system, on_prefill=on_prefill)

    def last_exchange(self) -> Exchange:
        """The last question and answer. Raises LowmemError if the conversation is empty."""
        if not self.conversation.exchanges:
            raise LowmemError("the conversation is empty", "Ask something first")
        return self.conversation.exchanges[-1]

    def resume(self, state: ChatState) -> None:
        """Go on with another conversation, and show where it stands."""
        self.conversation, self.params = state.conversation, state.params
        self.last, self.dropped, self._retries = None, 0, 0
        show_conversation(self._console, self.conversation, self._view)

    def greet(self, *, quiet: bool = False) -> None:
        """Describe the loaded model; quiet: only a lacking dialogue template."""
        if not quiet:
            self.note(describe(self.session.loaded, self.session.context))
        if not self.templated:
            self.note("this model has no dialogue template: it continues each message on its own")

    def say(self, *lines: str) -> None:
        """Print the output of a command."""
        for line in lines:
            _print(self._console, line)

    def note(self, line: str) -> None:
        """Print a dim line."""
        _print(self._console, line, "dim")

    def error(self, line: str) -> None:
        """Print a red line."""
        _print(self._console, line, "red")


def show_conversation(
    console: Console, conversation: Conversation, view: Callable[[Console], View] = make_view
) -> None:
    """Print the size of a loaded conversation and its last exchange."""
    exchanges = conversation.exchanges
    system = ", a system text" if conversation.system else ""
    _print(console, f"loaded: {len(exchanges)} exchange{'s' * (len(exchanges) != 1)}{system}", "dim")
    if not exchanges:
        return
    _print(console, "> " + clean(exchanges[-1].question).replace("\n", "\n  "), "bold")
    console.file.write("\n")
    with view(console) as shown:
        shown.push(exchanges[-1].answer)
    console.file.write("\n")


def _print(console: Console, text: str, style: str = "") -> None:
    console.print(Text(clean(text), style, overflow="fold"))
