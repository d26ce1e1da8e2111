"""`lowmem run MODEL`: a chat at a terminal, or one answer on standard output."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from lowmem import __version__
from lowmem.commands.answering import (
    INTERRUPTED,
    add_grammar_arguments,
    add_sampling_arguments,
    argument_text,
    given_grammar,
    load_session,
    model_record,
    note,
    notifier,
    read_text,
    sampling_params,
)
from lowmem.commands.plan_options import add_check_argument, add_plan_arguments, request_of
from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError
from lowmem.text.standard import print_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from lowmem.chat.conversation import ChatState
    from lowmem.plan.planner import Plan
    from lowmem.plan.request import ModelRequest
    from lowmem.session import Response, Session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem run`."""
    add_plan_arguments(parser)
    add_check_argument(parser)
    prompt = parser.add_argument_group("prompt (without one, at a terminal, a chat starts)")
    prompt.add_argument(
        "-p", "--prompt", metavar="TEXT", help="answer this prompt, without reading standard input"
    )
    prompt.add_argument(
        "-f", "--file", metavar="FILE", help="a file with the prompt, or to append to -p; - is standard input"
    )
    prompt.add_argument("--system", metavar="TEXT", help="the system text")
    prompt.add_argument("--raw", action="store_true", help="continue the prompt without a dialogue template")
    prompt.add_argument("--load", metavar="FILE", help="resume a conversation saved by /save")
    add_sampling_arguments(parser, SamplingParams())
    add_grammar_arguments(parser)
    parser.add_argument("--no-speculation", action="store_true", help="decode one token at a time")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.add_argument("--quiet", action="store_true", help="print only errors on standard error")


@dataclass(frozen=True)
class _Run:
    """The parsed command line."""

    request: ModelRequest
    state: ChatState
    prompt: str | None
    """None starts a chat."""
    raw: bool
    speculate: bool
    json: bool
    quiet: bool
    say: Callable[[str], None]

    def session(self, plan: Plan, progress: Callable[[int, int], None]) -> Session:
        """Load the model."""
        return load_session(plan, self.request, self.say, progress, speculate=self.speculate)


def run(args: argparse.Namespace) -> int:
    """Chat or answer. Returns the exit code; raises LowmemError."""
    from lowmem.chat.terminal import restored_terminal
    from lowmem.plan.request import plan_or_download

    run = _parsed(args)
    with restored_terminal():
        try:
            plan = plan_or_download(run.request, run.say)
            run.say(plan.reason)
            return _chat(run, plan) if run.prompt is None else _answer(run, plan, run.prompt)
        except KeyboardInterrupt:
            if not run.quiet:
                note("interrupted")
            return INTERRUPTED


def _parsed(args: argparse.Namespace) -> _Run:
    from lowmem.chat.conversation import ChatState
    from lowmem.chat.settings import check_seed
    from lowmem.chat.store import load

    chat = args.prompt is None and args.file is None and _at_terminal()
    if chat and (args.raw or args.json):
        raise InvalidRequestError(f"{'--raw' if args.raw else '--json'} needs a prompt", "Give one with -p")
    if args.raw and (args.system is not None or args.load):
        option = "--system" if args.system is not None else "--load"
        raise InvalidRequestError(
            f"{option} needs a dialogue template, which --raw turns off", "Leave one out"
        )
    prompt = None if chat else read_prompt(args.prompt, args.file)
    state = load(args.load, SamplingParams()) if args.load else ChatState()
    if args.system is not None:
        state = replace(state, conversation=replace(state.conversation, system=argument_text(args.system)))
    params = replace(sampling_params(args, state.params), grammar=given_grammar(args))
    state = replace(state, params=params, model=args.model)
    check_seed(state.params)
    return _Run(
        request_of(args),
        state,
        prompt,
        raw=args.raw,
        speculate=not args.no_speculation,
        json=args.json,
        quiet=args.quiet,
        say=notifier(args.quiet),
    )


def read_prompt(prompt: str | None, file: str | None) -> str:
    """The prompt: `prompt`, the text of `file`, both separated by an empty line, or standard input.

    Raises InvalidRequestError if it is missing or not text.
    """
    if prompt is None and file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise InvalidRequestError("the prompt is missing", 'Give one with -p "…", or pipe a text in')
    parts = [] if prompt is None else [argument_text(prompt)]
    if file is not None or prompt is None:
        text = read_text(file or "-", "Give a shorter excerpt")
        parts.append(text.removeprefix("\ufeff").rstrip("\r\n"))  # a byte order mark of a Windows editor
    text = "\n\n".join(parts)
    if not text.strip():
        where = " on standard input" if prompt is None and file in (None, "-") else ""
        raise InvalidRequestError(f"the prompt{where} is empty", 'Give one with -p "…"')
    return text


def _chat(run: _Run, plan: Plan) -> int:
    from rich.console import Console

    from lowmem.chat import commands
    from lowmem.chat.chat import Chat, show_conversation
    from lowmem.chat.first_message import FirstMessage
    from lowmem.chat.input import Prompt, open_history
    from lowmem.chat.loading import Loading
    from lowmem.chat.markdown import THEME
    from lowmem.chat.repl import talk
    from lowmem.chat.view import is_plain

    console = Console(theme=THEME, highlight=False, markup=False, emoji=False)
    prompt = Prompt(open_history(run.say), commands.names(), commands.choices(), plain=is_plain(console))
    if not run.quiet:
        note(f"lowmem {__version__}: /help shows commands and keys; Ctrl-C stops an answer, Ctrl-D leaves")
    if run.state.conversation.exchanges:
        show_conversation(console, run.state.conversation)
    with FirstMessage(prompt, Loading(os.fspath(run.request.model), quiet=run.quiet)) as reader:
        try:
            session = run.session(plan, reader.progress)
            reader.loaded()
        except KeyboardInterrupt:
            if reader.left:
                return 0
            raise
        chat = Chat(session, console, run.state)
        chat.greet(quiet=run.quiet)
        return talk(chat, reader)


def _answer(run: _Run, plan: Plan, prompt: str) -> int:
    """Print one answer: its text as it is generated, or one JSON object at the end."""
    from lowmem.chat.figures import describe, dropped_note, figures, memory_now
    from lowmem.chat.loading import Loading
    from lowmem.chat.text import clean

    loading = Loading(os.fspath(run.request.model), quiet=run.quiet)
    with loading.shown():
        session = run.session(plan, loading.update)
    run.say(describe(session.loaded, session.context))
    # A terminal would obey escape codes in the answer; a file or a pipe gets the text unchanged.
    shown = clean if sys.stdout.isatty() else str
    conversation = run.state.conversation
    messages = conversation.messages(prompt) if conversation.exchanges else prompt
    final: Response | None = None
    text = ""
    try:
        for response in session.stream(messages, run.state.params, system=conversation.system, raw=run.raw):
            # The model first writes the newline that templates put before an answer; it is not shown.
            begun = text or run.raw or run.state.params.grammar is not None
            piece = response.text if begun else response.text.removeprefix("\n")
            if not run.json:
                sys.stdout.write(shown(piece))
                sys.stdout.flush()
            text += piece
            final = response
    except KeyboardInterrupt:
        if text and not run.json and not text.endswith("\n"):
            print(flush=True)  # the shell's prompt starts on a new line
        raise
    assert final is not None, "the engine yields at least one response"
    if run.json:
        print_json(_record(replace(final, text=text), session))
    elif not text.endswith("\n"):
        print(flush=True)
    if final.dropped_turns:
        run.say(dropped_note(final.dropped_turns))
    run.say(figures(final, memory_now(session.loaded)))
    return 0


def _record(response: Response, session: Session) -> dict[str, object]:
    """The answer with its figures, and the model."""
    from lowmem.chat.figures import memory_now

    figures, loaded = asdict(response), session.loaded
    format = loaded.format if loaded.format and loaded.format.uniform else None
    del figures["logprobs"], figures["cut_tokens"]  # this command sets neither
    return {
        **figures,
        **model_record(loaded),
        "bits": format.default.bits if format else None,
        "group_size": format.default.group_size if format else None,
        "cpu_layers": loaded.cpu_layers,
        "context": loaded.context,
        "reason": loaded.plan.reason if loaded.plan else None,
        "memory": asdict(memory_now(loaded)),
    }


def _at_terminal() -> bool:
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
