"""The options by which every command that runs a model says which form, where, and in how much memory."""

from __future__ import annotations

import argparse

from lowmem.plan.request import Request

DTYPES = ("auto", "float32", "bfloat16", "float16")
METHODS = ("auto", "gptq", "int8", "nf4", "none")


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare MODEL and the options of `request_of`."""
    parser.add_argument(
        "model", metavar="MODEL", help="folder or weight file, hub id, or a name from `lowmem list`"
    )
    group = parser.add_argument_group("what runs, and where")
    group.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of prompt and answer together (the model's positions, 8192 at most)",
    )
    group.add_argument(
        "--bits",
        type=int,
        choices=(32, 16, 8, 4, 3, 2),
        help="only a form of so many bits (the best that fits)",
    )
    group.add_argument(
        "--quantize",
        choices=METHODS,
        default="auto",
        help="gptq: converted forms; int8, nf4: bitsandbytes on the fly; none: as published (%(default)s)",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    group.add_argument("--vram", metavar="SIZE", help="of the card, as 12GiB (what is free, or $LOWMEM_VRAM)")
    group.add_argument(
        "--ram", metavar="SIZE", help="the most of the host's memory to plan with (what is free)"
    )
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="of the activations (%(default)s)")
    group.add_argument(
        "--activation-bits",
        type=int,
        choices=(8, 12, 16),
        help="of activations on a CPU: the fewer, the faster a prompt is read, 16 is exact "
        "(as few as are free: 16 for weights of 8 bits, 12 for 4, 8 for 3 and 2)",
    )


def add_check_argument(parser: argparse.ArgumentParser) -> None:
    """Declare the option by which commands that load a model compare its files first."""
    parser.add_argument(
        "--check",
        action="store_true",
        help="before loading, compare all files with their digests (the manifest's, or the hub's)",
    )


def request_of(args: argparse.Namespace) -> Request:
    """The Request that the arguments stand for; RecipeError for a size that is none."""
    from lowmem.plan.device import parse_bytes

    method = {"auto": None, "none": "dense"}.get(args.quantize, args.quantize)
    return Request(
        model=args.model,
        context=args.context,
        bits=args.bits,
        method=method,
        device=args.device,
        vram=parse_bytes(args.vram, "--vram") if args.vram else None,
        ram=parse_bytes(args.ram, "--ram") if args.ram else None,
        dtype=None if args.dtype == "auto" else args.dtype,
        activation_bits=args.activation_bits,
        check=getattr(args, "check", False),
    )
