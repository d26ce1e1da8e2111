"""`lowmem run MODEL` at a terminal: read, answer, show, remember."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text

from lowmem import __version__
from lowmem.chat import commands
from lowmem.chat.conversation import Conversation, Exchange
from lowmem.chat.figures import describe, dropped_note, figures, memory_now
from lowmem.chat.store import save, state_folder
from lowmem.chat.terminal import Interrupts, forget_typed, quiet_keyboard
from lowmem.chat.text import clean
from lowmem.chat.view import View, make_view
from lowmem.config import SamplingParams
from lowmem.errors import LowmemError
from lowmem.plan.device import is_out_of_memory, trim_memory
from lowmem.session import Response, Session

_LONG_PROMPT = 256  # tokens from which it is worth telling how far reading is


class Reader(Protocol):
    """Where messages come from: `Prompt`, or a script."""

    def read(self) -> str:
        """The next message; KeyboardInterrupt for Ctrl-C at an empty prompt, EOFError at the end."""


class Chat:
    """A conversation with a session, and what the commands may change of it.

    conversation, params: what the next turn starts from. last, answers, new_tokens, dropped: figures of the
    answers so far. templated: whether the model takes messages; else each message is continued on its own.
    interrupts: Ctrl-C while the chat runs.
    """

    def __init__(
        self,
        session: Session,
        console: Console,
        reader: Reader,
        *,
        params: SamplingParams,
        conversation: Conversation | None = None,
        model_name: str = "",
        quiet: bool = False,
        view: Callable[[Console], View] = make_view,
    ) -> None:
        self.session = session
        self.params = params
        self.conversation = conversation or Conversation()
        self.model_name = model_name
        self.last: Response | None = None
        self.answers = self.new_tokens = self.dropped = 0
        loaded = session.loaded
        self.templated = loaded.dialogue is not None or bool(loaded.tokenizer.chat_template)
        self._console, self._reader, self._view, self._quiet = console, reader, view, quiet
        self._tries = 0  # of /retry for the last question
        self.interrupts = Interrupts()

    def run(self) -> int:
        """Talk until the user leaves; the exit code."""
        # All the time: Ctrl-C between an answer and the next prompt must not end the chat and what was said.
        with self.interrupts:
            return self._run()

    def _run(self) -> int:
        self._greet()
        leaving = False  # Ctrl-C at an empty prompt was the last thing that happened
        while True:
            trim_memory()  # while somebody types
            try:
                with self.session.engine.meanwhile():
                    text = self._reader.read()
            except KeyboardInterrupt:
                if leaving:
                    return 0
                leaving = True
                self.note("Ctrl-C again, Ctrl-D or /exit leaves")
                continue
            except EOFError:
                return 0
            leaving = False
            self.interrupts.requested = False  # what came before the message is not about its answer
            # Half a surrogate pair may come from a terminal that is not UTF-8, and has no encoding.
            text = text.encode("utf-8", "replace").decode("utf-8")
            try:
                typed = commands.parse(text)
                if isinstance(typed, str):
                    self.answer(typed)
                else:
                    commands.obey(self, typed)
            except EOFError:
                return 0
            except KeyboardInterrupt:
                self.note("stopped")
            except LowmemError as error:
                self._line(str(error), "red")
            except Exception as error:
                if not is_out_of_memory(error):
                    self._rescue()
                    raise
                self._line("out of memory; the question is not kept. Ask for less, or /reset", "red")

    def answer(self, question: str, *, again: bool = False) -> bool:
        """Have the question answered, show it, and keep both; whether there was anything to keep.

        again: with another seed than before. Raises LowmemError for a request that cannot be served.
        """
        self._tries = self._tries + 1 if again else 0
        params = self.params
        if params.seed is not None:
            params = replace(params, seed=(params.seed + self._tries) % (1 << 63))
        text, last, stopped = self._stream(question, params)
        if last is None:  # nothing came before Ctrl-C
            self.note("stopped before the first word; the question is not kept")
            return False
        if not text.strip() and not stopped:
            self.note("the model ended its turn without a word")
        self.last = last
        self.answers += 1
        self.new_tokens += last.new_tokens
        self.dropped = last.dropped_turns
        self.conversation = self.conversation.with_exchange(Exchange(question, text, stopped))
        if last.dropped_turns:
            self.note(dropped_note(last.dropped_turns))
        hint = " (more: /set max_new_tokens N)" if last.finish_reason == "length" else ""
        self.note(figures(last, memory_now(self.session.loaded), stopped=stopped) + hint)
        return True

    def _stream(self, question: str, params: SamplingParams) -> tuple[str, Response | None, bool]:
        """The text that came, the last of the responses, and whether Ctrl-C ended it."""
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
                close = getattr(responses, "close", None)  # a generator's, which ends the engine's work
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
        return self.session.stream(
            self.conversation.messages(question),
            params,
            system=self.conversation.system,
            on_prefill=on_prefill,
        )

    def _rescue(self) -> None:
        """A fault of ours is about to end the chat: what was said is kept."""
        if not self.conversation.exchanges:
            return
        try:
            folder = state_folder()
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = save(str(folder / "rescued.json"), self.conversation, self.params, self.model_name)
        except (LowmemError, OSError):
            return
        self.note(f"what was said is in {path}; go on with --load")

    def last_exchange(self) -> Exchange:
        """The last question and answer; LowmemError where nothing was said."""
        if not self.conversation.exchanges:
            raise LowmemError("nothing was said yet", "Ask something first")
        return self.conversation.exchanges[-1]

    def show_loaded(self) -> None:
        """What a conversation from a file is about: its size and its last exchange."""
        exchanges = self.conversation.exchanges
        self.last, self.dropped, self._tries = None, 0, 0
        system = ", a system text" if self.conversation.system else ""
        self.note(f"loaded: {len(exchanges)} exchange{'s' * (len(exchanges) != 1)}{system}")
        if not exchanges:
            return
        question, answer = clean(exchanges[-1].question), exchanges[-1].answer
        self._line("> " + question.replace("\n", "\n  "), "bold")
        self._console.file.write("\n")
        with self._view(self._console) as view:
            view.push(answer)
        self._console.file.write("\n")

    def say(self, *lines: str) -> None:
        """What a command has to tell."""
        for line in lines:
            self._line(line)

    def note(self, line: str) -> None:
        """A dim line about what happened."""
        self._line(line, "dim")

    def _line(self, text: str, style: str = "") -> None:
        self._console.print(Text(clean(text), style, overflow="fold"))

    def _greet(self) -> None:
        if not self._quiet:
            self.note(f"lowmem {__version__}: {describe(self.session.loaded, self.session.context)}")
            self.note("/help shows commands and keys; Ctrl-C stops an answer, Ctrl-D leaves")
        if not self.templated:
            self.note("this model has no dialogue template: each message is continued as it is, on its own")
        if self.conversation.exchanges:
            self.show_loaded()


def open_chat(session: Session, console: Console, *, notify: Callable[[str], None], **options: Any) -> Chat:
    """A chat at this terminal, with the history of earlier ones."""
    from lowmem.chat.input import Prompt, open_history
    from lowmem.chat.view import is_plain

    reader = Prompt(open_history(notify), commands.names(), commands.choices(), plain=is_plain(console))
    return Chat(session, console, reader, **options)
