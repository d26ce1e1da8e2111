"""`lowmem fim MODEL …`: what belongs between two texts goes to stdout, everything about it to stderr."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from lowmem.commands.answering import INTERRUPTED, add_sampling_arguments, note, read_text, sampling_params
from lowmem.commands.plan_options import add_check_argument, add_plan_arguments, request_of
from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError
from lowmem.loading.garbage import paused_collection

if TYPE_CHECKING:
    from lowmem.loading.loader import LoadedModel
    from lowmem.session import Response

MARKER = "<FILL_HERE>"
# Greedy unless asked otherwise, as in node-llama-cpp's infill and llama-cpp-python's example of it: the text
# has to fit what is around it, and the same file should give the same text.
_GREEDY = SamplingParams(temperature=0.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem fim`."""
    add_plan_arguments(parser)
    add_check_argument(parser)
    parser.add_argument(
        "file", metavar="FILE", nargs="?", help="a file with the marker where text is missing; - is stdin"
    )
    parser.add_argument("--marker", metavar="TEXT", default=MARKER, help="the marker in FILE (%(default)s)")
    parser.add_argument("--prefix-file", metavar="A", help="instead of FILE: what comes before the hole")
    parser.add_argument("--suffix-file", metavar="B", help="instead of FILE: what comes after the hole")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--whole", action="store_true", help="print the text around the hole as well")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    add_sampling_arguments(parser, _GREEDY)


def run(args: argparse.Namespace) -> int:
    """Fill the hole; the exit code. Raises LowmemError for what the user can mend."""
    params = sampling_params(args, _GREEDY)
    prefix, suffix = texts(args)
    # Only now: torch takes seconds to import, and what is wrong above needs none of it.
    with paused_collection():
        from lowmem.generate.sampling import check_sampling
        from lowmem.loading.opening import open_model
        from lowmem.session import Session

    check_sampling(params)
    streamed = not args.json and not args.whole
    final: Response | None = None
    middle = ""
    try:
        loaded = open_model(request_of(args), note)
        for response in Session(loaded).fill_in(prefix, suffix, params):
            middle += response.text
            if streamed:
                print(response.text, end="", flush=True)
            final = response
    except KeyboardInterrupt:
        _end_line(middle if streamed else "")
        note("interrupted")
        return INTERRUPTED
    assert final is not None, "the engine gives at least one token"
    if args.json:
        print(json.dumps(_record(replace(final, text=middle), loaded), ensure_ascii=False))
    else:
        # A file with the hole filled comes at once: whoever redirects it never has half of it.
        shown = middle if streamed else prefix + middle + suffix
        if not streamed:
            print(shown, end="", flush=True)
        _end_line(shown)
    if final.cut_tokens:
        note(f"{final.cut_tokens} tokens far from the hole were left out: they did not fit the context")
    note(_figures(final))
    return 0


def texts(args: argparse.Namespace) -> tuple[str, str]:
    """The texts before and after the hole. Raises InvalidRequestError for what is no such text."""
    pair = (args.prefix_file, args.suffix_file)
    if (args.file is None) == (pair == (None, None)):
        raise InvalidRequestError(
            "there is nothing to fill" if args.file is None else "there are two texts to fill",
            "Give a FILE with a marker, or --prefix-file and --suffix-file",
        )
    if args.file is None:
        prefix, suffix = ("" if path is None else _read(path) for path in pair)
    else:
        prefix, suffix = split_at(_read(args.file), args.marker, args.file)
    if not prefix and not suffix:
        raise InvalidRequestError(
            "there is no text before or after the hole", "The files are empty: give at least one line"
        )
    return prefix, suffix


def split_at(text: str, marker: str, name: str) -> tuple[str, str]:
    """The text before and after its only marker; InvalidRequestError where there is none, or several."""
    if not marker:
        raise InvalidRequestError("the marker is empty", f"Leave --marker out, it is {MARKER}")
    first, last = text.find(marker), text.rfind(marker)
    if first < 0:
        raise InvalidRequestError(
            f"{name} has no {marker!r} in it", "Put it where text is missing, or name another with --marker"
        )
    if first != last:
        lines = [text.count("\n", 0, at) + 1 for at in (first, last)]
        raise InvalidRequestError(
            f"{name} has {marker!r} more than once (lines {lines[0]} to {lines[1]})",
            "One hole is filled at a time: leave one marker",
        )
    return text[:first], text[first + len(marker) :]


def _read(name: str) -> str:
    text = read_text(name, "Give the part of it that is around the hole")
    if "\0" in text:
        raise InvalidRequestError(f"{name} is not text: it has NUL bytes in it", "Give a text file")
    return text


def _record(response: Response, loaded: LoadedModel) -> dict[str, object]:
    figures = asdict(response)
    del figures["logprobs"], figures["dropped_turns"]  # neither belongs to a hole
    return {
        **figures,
        "label": loaded.label,
        "kernel": loaded.kernel,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "load_seconds": loaded.load_seconds,
        "weight_bytes": loaded.weight_bytes,
    }


def _figures(response: Response) -> str:
    """One line on the answer: tokens, why it ended, TTFT, tokens/s."""
    rate = f", {response.tokens_per_second:.1f} tokens/s" if response.tokens_per_second else ""
    return (
        f"{response.prompt_tokens} + {response.new_tokens} tokens ({response.finish_reason}), "
        f"TTFT {response.ttft_seconds:.2f} s{rate}"
    )


def _end_line(text: str) -> None:
    """On a terminal the shell's prompt starts on a line of its own; a pipe gets the text and nothing else."""
    if text and not text.endswith("\n") and sys.stdout.isatty():
        print(flush=True)
