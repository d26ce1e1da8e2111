"""`lowmem run MODEL`: a chat at a terminal; with a prompt, one answer on stdout and all else on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from lowmem.chat.loading import loading
from lowmem.commands.answering import INTERRUPTED, add_sampling_arguments, note, read_text, sampling_params
from lowmem.commands.plan_options import add_check_argument, add_plan_arguments, request_of
from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError
from lowmem.loading.garbage import paused_collection

if TYPE_CHECKING:
    from lowmem.chat.store import Saved
    from lowmem.loading.loader import LoadedModel
    from lowmem.session import Response, Session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem run`."""
    add_plan_arguments(parser)
    add_check_argument(parser)
    prompt = parser.add_argument_group("what is asked (nothing, at a terminal: a chat)")
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="answer this, and end; stdin is not read")
    prompt.add_argument(
        "-f", "--file", metavar="FILE", help="a file with the question, or to go with -p; - is stdin"
    )
    prompt.add_argument("--system", metavar="TEXT", help="text of the system turn before the question")
    prompt.add_argument("--raw", action="store_true", help="continue the prompt as it is, without a template")
    prompt.add_argument("--load", metavar="FILE", help="go on with a conversation that /save wrote")
    add_sampling_arguments(parser, SamplingParams())
    parser.add_argument("--no-speculation", action="store_true", help="compute every token by itself")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")


def run(args: argparse.Namespace) -> int:
    """Chat or answer; the exit code. Raises LowmemError for what the user can mend."""
    chat = args.prompt is None and args.file is None and _at_terminal()
    if chat and (args.raw or args.json):
        raise InvalidRequestError(
            f"{'--raw' if args.raw else '--json'} is for a single prompt", "Give one with -p"
        )
    prompt = "" if chat else read_prompt(args)
    from lowmem.chat.terminal import restored_terminal

    with restored_terminal():
        try:
            with loading(args.model, quiet=args.quiet) as progress:
                session, params, saved = _open(args, progress)
            if chat:
                return _chat(args, session, params, saved)
            return _answer(args, session, params, saved, prompt)
        except KeyboardInterrupt:
            if not args.quiet:
                note("interrupted")
            return INTERRUPTED


def _open(args: argparse.Namespace, progress: Any) -> tuple[Session, SamplingParams, Saved | None]:
    """The model, loaded, and what the conversation starts from."""
    # Only now: torch takes seconds to import, and what was wrong before needs none of it.
    with paused_collection():
        from lowmem.chat.settings import check_seed
        from lowmem.chat.store import load
        from lowmem.generate.sampling import check_sampling
        from lowmem.loading.opening import open_model
        from lowmem.session import Session

    saved = load(args.load, SamplingParams()) if args.load else None
    params = sampling_params(args, saved.params if saved else SamplingParams())
    check_sampling(params)
    check_seed(params)
    loaded = open_model(request_of(args), _silent if args.quiet else note, progress)
    return Session(loaded, speculate=not args.no_speculation), params, saved


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt: -p, a file, both with an empty line between, or standard input.

    Raises InvalidRequestError where there is none, or none that is text.
    """
    if args.prompt is None and args.file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise InvalidRequestError("there is no prompt", 'Give one with -p "…", or pipe a text in')
    parts = [] if args.prompt is None else [args.prompt.encode("utf-8", "replace").decode("utf-8")]
    if args.file is not None or args.prompt is None:
        parts.append(read_text(args.file or "-", "Give the part that matters").rstrip("\r\n"))
    text = "\n\n".join(parts)
    if not text.strip():
        where = "on standard input " if args.prompt is None and args.file in (None, "-") else ""
        raise InvalidRequestError(f"the prompt {where}is empty", 'Give one with -p "…"')
    return text


def _chat(args: argparse.Namespace, session: Session, params: SamplingParams, saved: Saved | None) -> int:
    from rich.console import Console

    from lowmem.chat.conversation import Conversation
    from lowmem.chat.markdown import THEME
    from lowmem.chat.repl import open_chat

    conversation = saved.conversation if saved else Conversation()
    if args.system is not None:
        conversation = replace(conversation, system=args.system)
    # What cannot be encoded is shown as a question mark, not raised in the middle of an answer.
    getattr(sys.stdout, "reconfigure", lambda **_: None)(errors="replace")
    console = Console(theme=THEME, highlight=False, markup=False, emoji=False)
    return open_chat(
        session,
        console,
        notify=_silent if args.quiet else note,
        params=params,
        conversation=conversation,
        model_name=args.model,
        quiet=args.quiet,
    ).run()


def _answer(
    args: argparse.Namespace, session: Session, params: SamplingParams, saved: Saved | None, prompt: str
) -> int:
    """One answer: the text on stdout as it comes, or one JSON object at the end."""
    from lowmem.chat.figures import describe, dropped_note, figures, memory_now
    from lowmem.chat.text import clean

    say = _silent if args.quiet else note
    say(describe(session.loaded, session.context))
    # A terminal obeys what it is shown; a file or a pipe gets the answer as it is.
    shown = clean if sys.stdout.isatty() else str
    final: Response | None = None
    text = ""
    try:
        for response in _responses(args, session, params, saved, prompt):
            # The model writes the line end that its template has before an answer: it is no part of it.
            piece = response.text if text or args.raw else response.text.removeprefix("\n")
            if not args.json:
                sys.stdout.write(shown(piece))
                sys.stdout.flush()
            text += piece
            final = response
    except KeyboardInterrupt:
        if text and not args.json and not text.endswith("\n"):
            print(flush=True)  # the shell's prompt starts on a line of its own
        raise
    assert final is not None, "the engine gives at least one token"
    if args.json:
        print(json.dumps(_record(replace(final, text=text), session.loaded), ensure_ascii=False), flush=True)
    elif not text.endswith("\n"):
        print(flush=True)
    if final.dropped_turns:
        say(dropped_note(final.dropped_turns))
    say(figures(final, memory_now(session.loaded)))
    return 0


def _responses(
    args: argparse.Namespace, session: Session, params: SamplingParams, saved: Saved | None, prompt: str
) -> Iterator[Response]:
    system = args.system
    if saved is None:
        return session.stream(prompt, params, system=system, raw=args.raw)
    system = system if system is not None else saved.conversation.system
    return session.stream(saved.conversation.messages(prompt), params, system=system, raw=args.raw)


def _record(response: Response, loaded: LoadedModel) -> dict[str, object]:
    """The answer, its figures, and what gave it."""
    from lowmem.chat.figures import memory_now

    figures = asdict(response)
    del figures["logprobs"], figures["cut_tokens"]  # neither can be asked for here
    return {
        **figures,
        "label": loaded.label,
        "kernel": loaded.kernel,
        "bits": loaded.format.default.bits if loaded.format else None,
        "group_size": loaded.format.default.group_size if loaded.format else None,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "cpu_layers": loaded.cpu_layers,
        "context": loaded.context,
        "reason": loaded.plan.reason if loaded.plan else None,
        "load_seconds": loaded.load_seconds,
        "weight_bytes": loaded.weight_bytes,
        "memory": asdict(memory_now(loaded)),
    }


def _at_terminal() -> bool:
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def _silent(line: str) -> None:
    """Says nothing."""
