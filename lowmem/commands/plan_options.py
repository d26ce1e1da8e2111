"""The options of every command that runs a model: which version, where, and in how much memory."""

from __future__ import annotations

import argparse

from lowmem.cards.find import DEVICES
from lowmem.config import BITS
from lowmem.errors import InvalidRequestError
from lowmem.plan.request import ModelRequest

DTYPES = ("auto", "float32", "bfloat16", "float16")
METHODS = ("auto", "gptq", "int8", "nf4", "none")


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare MODEL and the options of `request_of`."""
    parser.add_argument(
        "model", metavar="MODEL", help="folder, weight file, hub id, or name from `lowmem list`"
    )
    group = parser.add_argument_group("version and memory")
    group.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of prompt and answer together (default: the model's positions, at most 8192)",
    )
    group.add_argument(
        "--bits",
        type=int,
        choices=(32, 16, *BITS),
        help="use a version with this many bits per weight (default: the best that fits)",
    )
    group.add_argument(
        "--quantize",
        choices=METHODS,
        default="auto",
        help="gptq: a converted version; int8, nf4: quantize with bitsandbytes while loading; "
        "none: the model as published (default: %(default)s)",
    )
    group.add_argument("--device", default="auto", help=f"{DEVICES} (default: %(default)s)")
    group.add_argument(
        "--vram",
        metavar="SIZE",
        help="memory of the card, such as 12GiB (default: $LOWMEM_VRAM, or the free memory)",
    )
    group.add_argument("--ram", metavar="SIZE", help="memory of the host (default: the free memory)")
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="data type of the activations (default: %(default)s)"
    )
    group.add_argument(
        "--activation-bits",
        type=int,
        choices=(8, 12, 16),
        help="bits of the activations on a CPU; fewer make prefill faster, 16 is exact "
        "(default: 16 with weights of 5 to 8 bits, 12 with 4, 8 with 3 and 2)",
    )
    group.add_argument(
        "--draft",
        metavar="MODEL",
        help="a small model whose vocabulary begins like MODEL's drafts tokens, which MODEL checks several "
        "at a time: faster, with the same answers",
    )
    group.add_argument(
        "--head-bits",
        choices=("auto", "16", "8"),
        default="auto",
        help="bits of the head and the token embedding: 8 rounds them while loading; "
        "auto: 8 where a better version then fits the card, else 16 (default: %(default)s)",
    )


def add_check_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --check, for the commands that load a model."""
    parser.add_argument(
        "--check",
        action="store_true",
        help="before loading, compare all files with the digests of the manifest or the hub",
    )


def request_of(args: argparse.Namespace) -> ModelRequest:
    """The parsed arguments as a ModelRequest.

    Raises RecipeError for an invalid size, InvalidRequestError for options that contradict each other.
    """
    draft = getattr(args, "draft", None)
    if draft is not None and getattr(args, "no_speculation", False):
        raise InvalidRequestError(
            "--draft and --no-speculation contradict each other", "Leave one of them out"
        )
    return ModelRequest(
        model=args.model,
        context=args.context,
        bits=args.bits,
        method={"auto": None, "none": "dense"}.get(args.quantize, args.quantize),
        device=args.device,
        vram=args.vram,
        ram=args.ram,
        dtype=None if args.dtype == "auto" else args.dtype,
        activation_bits=args.activation_bits,
        head_bits=None if args.head_bits == "auto" else int(args.head_bits),
        draft=draft,
        check=getattr(args, "check", False),
    )
