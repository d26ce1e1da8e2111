"""What the commands that answer share: sampling options, text files, lines on standard error."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lowmem.checkpoint.files.home import typed_path
from lowmem.config import Grammar, SamplingParams, check_sampling
from lowmem.errors import InvalidRequestError

if TYPE_CHECKING:
    from lowmem.loading.loader import LoadedModel
    from lowmem.plan.planner import Plan
    from lowmem.plan.request import ModelRequest
    from lowmem.session import Session

INTERRUPTED = 130
"""The exit code that a shell reports for a program ended by Ctrl-C."""
LARGEST = 64 << 20
"""Bytes of the largest file that is read: longer than any context, and /dev/zero never ends."""
_SAMPLING: tuple[tuple[str, type, str, str], ...] = (
    ("max_new_tokens", int, "N", "end the answer after N tokens"),
    ("temperature", float, "T", "0 always takes the most likely token"),
    ("top_k", int, "K", "sample among the K most likely tokens; 0 turns it off"),
    ("top_p", float, "P", "sample among the most likely tokens of total probability P; 1 turns it off"),
    ("min_p", float, "P", "drop tokens below P times the highest probability; 0 turns it off"),
    ("repetition_penalty", float, "R", "above 1 makes repeated tokens less likely; 1 turns it off"),
    ("seed", int, "N", "the same seed gives the same answer"),
)


def add_sampling_arguments(parser: argparse.ArgumentParser, defaults: SamplingParams) -> None:
    """Declare the options of `sampling_params`; the help shows `defaults`."""
    group = parser.add_argument_group("sampling")
    for name, kind, metavar, text in _SAMPLING:
        default = getattr(defaults, name)
        shown = "" if default is None else f" (default: {default})"
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar=metavar, help=text + shown)
    group.add_argument("--max-tokens", dest="max_new_tokens", type=int, help=argparse.SUPPRESS)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the answer before this text; may be repeated"
    )


def sampling_params(args: argparse.Namespace, defaults: SamplingParams) -> SamplingParams:
    """`defaults` with the options that were given. Raises InvalidRequestError for one out of range."""
    given = {name: getattr(args, name) for name, *_ in _SAMPLING}
    values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if args.stop is not None:
        values["stop"] = tuple(map(argument_text, args.stop))
    params = replace(defaults, **values)
    check_sampling(params)
    return params


def add_grammar_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `given_grammar`."""
    group = parser.add_argument_group("structured output").add_mutually_exclusive_group()
    group.add_argument("--schema", metavar="FILE", help="answer in JSON that is valid under this JSON Schema")
    group.add_argument(
        "--grammar", metavar="FILE", help="answer with a text of this grammar, in Lark's syntax or in GBNF"
    )


def given_grammar(args: argparse.Namespace) -> Grammar | None:
    """The grammar of `--schema` or `--grammar`. Raises InvalidRequestError for one that cannot be used."""
    if args.schema is None and args.grammar is None:
        return None
    from lowmem.text.grammar_process import compile_grammar

    text = read_text(args.schema or args.grammar, "Give a shorter one").removeprefix("\ufeff")
    grammar = Grammar.gbnf(text) if args.schema is None else Grammar.json_schema(text)
    compile_grammar(grammar.kind, grammar.text)  # before the model is loaded
    return grammar


def argument_text(word: str) -> str:
    """A word of the command line as the UTF-8 text that it is, also where the system's encoding is ASCII."""
    return word.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def read_text(name: str, too_large: str) -> str:
    """A file's text, line ends unchanged; - is standard input.

    too_large: the hint for a file of more than LARGEST bytes. Raises InvalidRequestError for a file that is
    too large, cannot be read, or is not UTF-8.
    """
    where = "standard input" if name == "-" else name
    try:
        if name == "-":
            stream = getattr(sys.stdin, "buffer", None)
            data = stream.read(LARGEST + 1) if stream else sys.stdin.read().encode()
        else:
            with typed_path(name).open("rb") as file:
                data = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise InvalidRequestError(f"cannot read {where}: {reason}", "Give the path of a text file") from error
    if len(data) > LARGEST:
        raise InvalidRequestError(f"{where} is larger than {LARGEST >> 20} MiB", too_large)
    try:
        text: str = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{where} is not UTF-8 text (byte {error.start + 1})",
            "Give a text file, or convert it with iconv",
        ) from error
    return text


def load_session(
    plan: Plan,
    request: ModelRequest,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
    *,
    slots: int = 1,
    speculate: bool = True,
) -> Session:
    """Load a planned model; imports torch and what else this model needs. slots: see `Session`."""
    from lowmem.loading.garbage import paused_collection

    with paused_collection():
        from lowmem.loading.opening import load_plan
        from lowmem.session import Session

    return Session(load_plan(plan, request, say, progress), slots=slots, speculate=speculate)


def notifier(quiet: bool) -> Callable[[str], None]:
    """`note`, or with --quiet a function that prints nothing."""
    return (lambda line: None) if quiet else note


def note(line: str) -> None:
    """Print a line on standard error: dim on a terminal, unless NO_COLOR is set."""
    dim = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print(f"\x1b[2m{line}\x1b[0m" if dim else line, file=sys.stderr, flush=True)


def model_record(loaded: LoadedModel) -> dict[str, object]:
    """The loaded model, for --json."""
    return {
        "label": loaded.label,
        "kernel": loaded.kernel,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "load_seconds": loaded.load_seconds,
        "weight_bytes": loaded.weight_bytes,
    }
