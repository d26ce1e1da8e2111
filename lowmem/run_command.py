"""`lowmem run MODEL -p PROMPT`: the answer goes to stdout, everything about it to stderr."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError

if TYPE_CHECKING:
    from lowmem.loader import LoadedModel
    from lowmem.session import Response

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem run`."""
    defaults = SamplingParams()
    parser.add_argument("model", metavar="MODEL", help="folder of a converted or a 16-bit checkpoint")
    parser.add_argument("-p", "--prompt", help="the question; read from standard input when left out")
    parser.add_argument("--system", metavar="TEXT", help="text of the system turn before the question")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is, without a template")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=defaults.max_new_tokens,
        metavar="N",
        help="end the answer after N tokens (%(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=defaults.temperature,
        metavar="T",
        help="0 always takes the most likely token (%(default)s)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=defaults.top_k,
        metavar="K",
        help="sample among the K most likely tokens; 0 is off (%(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=defaults.top_p,
        metavar="P",
        help="sample among the tokens that make up probability P; 1 is off (%(default)s)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the activations (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")


def run(args: argparse.Namespace) -> int:
    """Answer the prompt; the exit code. Raises LowmemError for what the user can mend."""
    params = SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    prompt = args.prompt if args.prompt is not None else _read_stdin()
    # Only now: torch takes seconds to import, and what is wrong above needs none of it.
    import torch

    from lowmem.generate.sampling import check_sampling
    from lowmem.loader import load
    from lowmem.plan.device import resolve_device
    from lowmem.session import Session

    check_sampling(params)
    try:
        dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
        loaded = load(args.model, device=resolve_device(args.device), dtype=dtype)
        _note(describe(loaded))
        responses = Session(loaded).stream(prompt, params, system=args.system, raw=args.raw)
        final = None
        text = ""
        for response in responses:
            text += response.text
            if not args.json:
                print(response.text, end="", flush=True)
            final = response
    except KeyboardInterrupt:
        # A half-written line is finished, so that the shell's prompt starts on its own.
        print(file=sys.stderr if args.json else sys.stdout, flush=True)
        _note("interrupted")
        return INTERRUPTED
    assert final is not None, "the engine gives at least one token"
    if args.json:
        print(json.dumps(_record(replace(final, text=text), loaded), ensure_ascii=False))
    else:
        print(flush=True)
        _note(figures(final))
    return 0


def describe(loaded: LoadedModel) -> str:
    """One line on the model that was loaded."""
    format = loaded.format
    weights = f"{format.bits}-bit g{format.group_size}" if format else "not quantized"
    dtype = str(loaded.dtype).removeprefix("torch.")
    mib = loaded.weight_bytes / 2**20
    return (
        f"{weights}, {mib:,.0f} MiB of weights, {dtype} on {loaded.device}, "
        f"loaded in {loaded.load_seconds:.1f} s"
    )


def figures(response: Response) -> str:
    """One line on an answer: tokens, TTFT, tokens/s."""
    rate = f", {response.tokens_per_second:.1f} tokens/s" if response.tokens_per_second else ""
    return (
        f"{response.prompt_tokens} + {response.new_tokens} tokens ({response.finish_reason}), "
        f"TTFT {response.ttft_seconds:.2f} s{rate}"
    )


def _record(response: Response, loaded: LoadedModel) -> dict[str, object]:
    return {
        **vars(response),
        "load_seconds": loaded.load_seconds,
        "weight_bytes": loaded.weight_bytes,
        "bits": loaded.format.bits if loaded.format else None,
        "group_size": loaded.format.group_size if loaded.format else None,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
    }


def _read_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise InvalidRequestError("there is no prompt", 'Give one with -p "…", or pipe a text in')
    text = sys.stdin.read()
    if not text.strip():
        raise InvalidRequestError("the prompt on standard input is empty", 'Give one with -p "…"')
    return text.rstrip("\n")


def _note(line: str) -> None:
    """A dim line on stderr; plain where stderr is no terminal."""
    print(f"\x1b[2m{line}\x1b[0m" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)
