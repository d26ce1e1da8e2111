"""`lowmem fim MODEL …`: print the text that belongs between two texts."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from lowmem.commands.answering import (
    INTERRUPTED,
    add_sampling_arguments,
    load_session,
    model_record,
    note,
    read_text,
    sampling_params,
)
from lowmem.commands.plan_options import add_check_argument, add_plan_arguments, request_of
from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError
from lowmem.text.standard import print_json

if TYPE_CHECKING:
    from lowmem.loading.loader import LoadedModel
    from lowmem.session import Response

MARKER = "<FILL_HERE>"
# Greedy by default, like infill in node-llama-cpp and llama-cpp-python: the same file gives the same text.
_GREEDY = SamplingParams(temperature=0.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem fim`."""
    add_plan_arguments(parser)
    add_check_argument(parser)
    parser.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        help="a file with the marker where text is missing; - is standard input",
    )
    parser.add_argument(
        "--marker", metavar="TEXT", default=MARKER, help="the marker in FILE (default: %(default)s)"
    )
    parser.add_argument("--prefix-file", metavar="A", help="instead of FILE: the text before the hole")
    parser.add_argument("--suffix-file", metavar="B", help="instead of FILE: the text after the hole")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--whole", action="store_true", help="also print the text around the hole")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    add_sampling_arguments(parser, _GREEDY)


def run(args: argparse.Namespace) -> int:
    """Fill the hole. Returns the exit code; raises LowmemError."""
    from lowmem.plan.request import plan_or_download

    params = sampling_params(args, _GREEDY)
    request = request_of(args)
    prefix, suffix = texts(args.file, args.marker, args.prefix_file, args.suffix_file)
    streamed = not args.json and not args.whole
    final: Response | None = None
    middle = ""
    try:
        plan = plan_or_download(request, note)
        note(plan.reason)
        session = load_session(plan, request, note)
        for response in session.fill_in(prefix, suffix, params):
            middle += response.text
            if streamed:
                print(response.text, end="", flush=True)
            final = response
    except KeyboardInterrupt:
        _end_line(middle if streamed else "")
        note("interrupted")
        return INTERRUPTED
    assert final is not None, "the engine yields at least one response"
    if args.json:
        print_json(_record(replace(final, text=middle), session.loaded))
    else:
        # The whole file is printed at once, so that a redirected file is never half written.
        shown = middle if streamed else prefix + middle + suffix
        if not streamed:
            print(shown, end="", flush=True)
        _end_line(shown)
    if final.cut_tokens:
        note(f"{final.cut_tokens} tokens far from the hole were left out to fit the context")
    note(_figures(final))
    return 0


def texts(file: str | None, marker: str, prefix_file: str | None, suffix_file: str | None) -> tuple[str, str]:
    """The texts before and after the hole. Raises InvalidRequestError where they are missing or ambiguous."""
    pair = (prefix_file, suffix_file)
    if (file is None) == (pair == (None, None)):
        raise InvalidRequestError(
            "there is no text to fill in" if file is None else "two texts to fill in were given",
            "Give a FILE with a marker, or --prefix-file and --suffix-file",
        )
    if file is None:
        prefix, suffix = ("" if path is None else _read(path) for path in pair)
    else:
        prefix, suffix = split_at(_read(file), marker, file)
    if not prefix and not suffix:
        raise InvalidRequestError("the texts before and after the hole are empty", "Give at least one line")
    return prefix, suffix


def split_at(text: str, marker: str, name: str) -> tuple[str, str]:
    """The texts before and after the marker. Raises InvalidRequestError unless it occurs exactly once."""
    if not marker:
        raise InvalidRequestError("the marker is empty", f"Leave --marker out to use {MARKER}")
    first, last = text.find(marker), text.rfind(marker)
    if first < 0:
        raise InvalidRequestError(
            f"{name} does not contain {marker!r}", "Put it where text is missing, or set --marker"
        )
    if first != last:
        lines = [text.count("\n", 0, at) + 1 for at in (first, last)]
        raise InvalidRequestError(
            f"{name} contains {marker!r} more than once (first in line {lines[0]}, last in line {lines[1]})",
            "Keep only one marker: each run fills one gap",
        )
    return text[:first], text[first + len(marker) :]


def _read(name: str) -> str:
    text = read_text(name, "Give the part around the hole")
    if "\0" in text:
        raise InvalidRequestError(f"{name} is not text: it contains NUL bytes", "Give a text file")
    return text


def _record(response: Response, loaded: LoadedModel) -> dict[str, object]:
    figures = asdict(response)
    del figures["logprobs"], figures["dropped_turns"]  # not set for a hole
    return {**figures, **model_record(loaded)}


def _figures(response: Response) -> str:
    """One line about the answer: tokens, why it ended, TTFT, tokens/s."""
    rate = f", {response.tokens_per_second:.1f} tokens/s" if response.tokens_per_second else ""
    return (
        f"{response.prompt_tokens} + {response.new_tokens} tokens ({response.finish_reason}), "
        f"TTFT {response.ttft_seconds:.2f} s{rate}"
    )


def _end_line(text: str) -> None:
    """End the line on a terminal, for the shell's prompt; a pipe gets the text unchanged."""
    if text and not text.endswith("\n") and sys.stdout.isatty():
        print(flush=True)
