"""What the commands that answer have alike: how tokens are chosen, texts from files, lines on stderr."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError

INTERRUPTED = 130
"""What a shell reports for a program that Ctrl-C ended."""
LARGEST = 64 << 20
"""Bytes of a file that is read: no context is nearly as long, and /dev/zero has no end."""


def add_sampling_arguments(parser: argparse.ArgumentParser, base: SamplingParams) -> None:
    """Declare how tokens are chosen; what is not given is left to `sampling_params`, and `base` is shown."""
    group = parser.add_argument_group("how the answer is chosen")
    numbers: tuple[tuple[str, type, str, str], ...] = (
        ("max_new_tokens", int, "N", "end the answer after N tokens"),
        ("temperature", float, "T", "0 always takes the most likely token"),
        ("top_k", int, "K", "sample among the K most likely tokens; 0 is off"),
        ("top_p", float, "P", "sample among the tokens that make up probability P; 1 is off"),
        ("min_p", float, "P", "only tokens with P times the probability of the most likely one; 0 is off"),
        ("repetition_penalty", float, "R", "above 1 makes tokens that were there less likely; 1 is off"),
    )
    for name, kind, metavar, text in numbers:
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, metavar=metavar, help=f"{text} ({getattr(base, name)})")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the answer before this text; may be repeated"
    )


def sampling_params(args: argparse.Namespace, base: SamplingParams) -> SamplingParams:
    """`base` with what was given on the command line."""
    values: dict[str, Any] = {
        name: getattr(args, name)
        for name in (
            "max_new_tokens",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "seed",
        )
        if getattr(args, name) is not None
    }
    if args.stop is not None:
        values["stop"] = tuple(args.stop)
    return replace(base, **values)


def read_text(name: str, too_large: str) -> str:
    """A file's text as it is, line ends included; - is standard input.

    too_large: what to do about a file of more than LARGEST bytes. Raises InvalidRequestError for one that is
    none, cannot be read, or is not UTF-8.
    """
    where = "standard input" if name == "-" else name
    try:
        if name == "-":
            stream = getattr(sys.stdin, "buffer", None)
            data = stream.read(LARGEST + 1) if stream else sys.stdin.read().encode()
        else:
            with Path(name).expanduser().open("rb") as file:
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


def note(line: str) -> None:
    """A dim line on stderr; plain where stderr is no terminal, or nobody wants colours."""
    dim = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print(f"\x1b[2m{line}\x1b[0m" if dim else line, file=sys.stderr, flush=True)
