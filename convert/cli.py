"""`lowmem convert`: its options, and the call that they describe. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from lowmem.cards.find import WITH_FLOAT64
from lowmem.checkpoint.readers import READERS
from lowmem.config import BITS, EFFORTS, TRAINED_BITS, QuantConfig
from lowmem.errors import RecipeError

if TYPE_CHECKING:
    from lowmem.plan.fit.budget import SizeBudget

INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem convert`."""
    parser.add_argument(
        "source", metavar="SOURCE", help="folder or file of the 16-bit checkpoint, a GGUF, or a hub id"
    )
    parser.add_argument(
        "out", metavar="OUT", nargs="?", help="folder to create (default: in lowmem's cache, see lowmem list)"
    )
    quant = parser.add_argument_group("quantization")
    quant.add_argument("--bits", type=int, choices=BITS, help="bits per weight (default: 4)")
    quant.add_argument(
        "--effort",
        choices=tuple(EFFORTS),
        default="default",
        help="time for quality: "
        + "; ".join(
            f"{name}: {effort.tune_steps} steps of tuning, {effort.rows} rows, "
            f"{effort.hours} hours for StarChat Alpha on 2 cores"
            for name, effort in EFFORTS.items()
        )
        + " (default: %(default)s)",
    )
    fit = parser.add_argument_group(
        "made to fit: bits, group size and zero-points are chosen for each linear, so that the size is met "
        "with the least predicted loss"
    )
    size = fit.add_mutually_exclusive_group()
    size.add_argument(
        "--fit", metavar="SIZE", help="fill a card with so much free memory, such as 11.5GiB, when it runs"
    )
    size.add_argument("--fit-ram", metavar="SIZE", help="the same for a machine without a card")
    size.add_argument("--size", metavar="SIZE", help="bytes of all weights")
    size.add_argument(
        "--bpw", type=float, metavar="X", help="average bits of a linear's weights, scales included, as 3.5"
    )
    fit.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of context that --fit leaves room for (default: the model's positions, at most 8192)",
    )
    fit.add_argument(
        "--head-bits",
        choices=("auto", "16", "8"),
        default="auto",
        help="bits of the head and the token embedding that --fit counts, as `lowmem run` holds them; "
        "auto: 8 on a card where the linears gain more than that costs, else 16 (default: %(default)s)",
    )
    quant.add_argument(
        "--group-size",
        type=int,
        default=0,
        metavar="N",
        help="input columns that share a scale, -1 for a whole row (default: 128, or 64 or 32 where needed)",
    )
    quant.add_argument("--sym", action=argparse.BooleanOptionalAction, default=True, help=argparse.SUPPRESS)
    quant.add_argument(
        "--asym",
        dest="sym",
        action="store_false",
        help="give each group its own zero-point (default: symmetric)",
    )
    quant.add_argument(
        "--desc-act",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="quantize the most important columns first (act-order); does not slow down inference "
        "(default: on)",
    )
    quant.add_argument(
        "--damp-percent",
        type=float,
        default=0.01,
        metavar="F",
        help="fraction of the Hessian's mean diagonal added to its diagonal (default: %(default)s)",
    )
    quant.add_argument(
        "--true-sequential",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="calibrate each linear on the outputs of the quantized ones before it (default: on)",
    )
    quant.add_argument(
        "--correction",
        type=float,
        default=QuantConfig.correction,
        metavar="F",
        help="share of the earlier linears' error that a linear corrects; 0 is faster (default: %(default)s)",
    )
    quant.add_argument(
        "--passes",
        type=int,
        default=QuantConfig.passes,
        metavar="N",
        help="refinement passes over each group's integers and scale; 0 is faster (default: %(default)s)",
    )
    quant.add_argument(
        "--tune-steps",
        type=int,
        metavar="N",
        help="steps of tuning each layer's integers, scales, biases and norms; 0 is faster "
        f"(default: by --effort, and 0 with more than {TRAINED_BITS} bits)",
    )
    quant.add_argument(
        "--plain",
        action="store_true",
        help="plain GPTQ, the fastest: --correction 0 --passes 0 --tune-steps 0",
    )
    quant.add_argument(
        "--for",
        dest="reader",
        choices=tuple(READERS),
        help="refuse what this program does not load: vLLM, GPTQModel, or llama.cpp after lowmem export",
    )
    text = parser.add_argument_group("calibration")
    text.add_argument(
        "--calibration",
        default="builtin",
        metavar="TEXT",
        help="builtin, oasst1, dolly, FILE.jsonl, FILE.txt or a hub dataset (default: %(default)s)",
    )
    text.add_argument("--rows", type=int, metavar="N", help="rows of calibration text (default: by --effort)")
    text.add_argument(
        "--row-length", type=int, default=512, metavar="N", help="tokens per row (default: %(default)s)"
    )
    text.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of the text (default: %(default)s)"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help=f"{WITH_FLOAT64} (default: %(default)s)")
    machine.add_argument(
        "--memory", metavar="SIZE", help="memory limit, such as 8GiB (default: all free memory)"
    )
    machine.add_argument(
        "--compute-dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the calibration's forward passes (default: %(default)s)",
    )
    result = parser.add_argument_group("result")
    result.add_argument(
        "--shard-size", default="4GiB", metavar="SIZE", help="size of one file (default: %(default)s)"
    )
    result.add_argument(
        "--store-head", action="store_true", help="store a tied head too, which auto-gptq needs"
    )
    result.add_argument(
        "--force", action="store_true", help="replace OUT, and discard another unfinished conversion"
    )
    result.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("-q", "--quiet", action="store_true", help="print nothing but warnings and errors")
    output.add_argument("--json", action="store_true", help="print one JSON object per line")


def run(args: argparse.Namespace) -> int:
    """Convert with the given arguments, and return the exit code."""
    from lowmem.plan.shape import check_convertible

    check_convertible(args.source)  # before torch is imported
    from lowmem.convert.calibration import CalibrationSpec
    from lowmem.convert.job import ConversionJob
    from lowmem.convert.pipeline import convert
    from lowmem.convert.progress import make_reporter
    from lowmem.convert.recipe import ConvertOptions

    from lowmem.checkpoint.files.reading import one_line
    from lowmem.errors import MemoryBudgetError
    from lowmem.plan.device import is_out_of_memory, parse_bytes

    effort, bits = EFFORTS[args.effort], args.bits or QuantConfig.bits
    steps = effort.steps(bits) if args.tune_steps is None else args.tune_steps
    config = QuantConfig(
        bits=bits,
        group_size=args.group_size,
        sym=args.sym,
        desc_act=args.desc_act,
        damp_percent=args.damp_percent,
        true_sequential=args.true_sequential,
        correction=0.0 if args.plain else args.correction,
        passes=0 if args.plain else args.passes,
        tune_steps=0 if args.plain else steps,
    )
    calibration = CalibrationSpec(
        args.calibration, effort.rows if args.rows is None else args.rows, args.row_length, args.seed
    )
    options = ConvertOptions(
        device=args.device,
        memory=parse_bytes(args.memory, "--memory") if args.memory else None,
        shard_size=parse_bytes(args.shard_size, "--shard-size"),
        store_head=args.store_head,
        force=args.force,
        revision=args.revision,
        reader=args.reader,
        compute_dtype=args.compute_dtype,
        budget=_budget(args),
    )
    reporter = make_reporter(quiet=args.quiet, as_json=args.json)
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        convert(args.source, args.out, config, calibration=calibration, options=options, reporter=reporter)
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryBudgetError(
            f"out of memory: {one_line(error)}",
            "Close other programs, or set a lower --memory, and repeat the command: finished layers are kept",
        ) from error
    except KeyboardInterrupt:
        job = ConversionJob(reporter.folder) if reporter.folder else None
        state = job.load() if job else None
        if job is None or state is None:
            print("stopped before a layer was converted", file=sys.stderr)
        else:
            print(
                f"stopped; {state.finished_layers} layers are finished in {job.folder}. "
                "Repeat the command to resume after them",
                file=sys.stderr,
            )
        return INTERRUPTED
    return 0


def _budget(args: argparse.Namespace) -> SizeBudget | None:
    """The size that the options ask for. Raises RecipeError for options that contradict each other."""
    from lowmem.plan.device import parse_bytes
    from lowmem.plan.fit.budget import SizeBudget

    wanted = {"--fit": args.fit, "--fit-ram": args.fit_ram, "--size": args.size, "--bpw": args.bpw}
    given = next((name for name, value in wanted.items() if value is not None), None)
    if given is None:
        if args.context is not None:
            raise RecipeError("--context counts only for memory", "Give it with --fit or --fit-ram")
        if args.head_bits != "auto":
            raise RecipeError("--head-bits counts only for memory", "Give it with --fit or --fit-ram")
        return None
    for name, there in (
        ("--bits", args.bits is not None),
        ("--group-size", args.group_size != 0),
        ("--asym", not args.sym),
    ):
        if there:
            raise RecipeError(
                f"{name} and {given} contradict each other", f"{given} chooses it for each linear"
            )
    card, host, weights = (
        parse_bytes(text, name) if text is not None else None
        for name, text in (("--fit", args.fit), ("--fit-ram", args.fit_ram), ("--size", args.size))
    )
    head_bits = None if args.head_bits == "auto" else int(args.head_bits)
    return SizeBudget(card, host, weights, args.bpw, args.context, head_bits)


def _as_interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
