"""`lowmem bench`: dispatch to a measurement, whose imports wait until it runs."""

from __future__ import annotations

import argparse
import importlib

from lowmem.debug import add_argument as add_debug_argument

MEASUREMENTS = (
    (
        "quality",
        "lowmem.benchmarks.quality.command",
        "KL divergence and perplexity of every version against the unquantized model",
    ),
    ("humaneval", "lowmem.benchmarks.humaneval.command", "share of HumanEval problems solved (pass@1)"),
    (
        "latency",
        "lowmem.benchmarks.latency.command",
        "load, prefill and decode times, beside what the machine allows",
    ),
    ("report", "lowmem.benchmarks.report.command", "make a Markdown and an HTML page of the results"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the measurements and their options."""
    words = parser.add_subparsers(
        dest="measurement", metavar="WHAT", required=True, parser_class=type(parser)
    )
    for name, module, text in MEASUREMENTS:
        sub = words.add_parser(name, help=text, description=text)
        importlib.import_module(module).add_arguments(sub)
        add_debug_argument(sub)


def run(args: argparse.Namespace) -> int:
    """Run the measurement; its exit code. Raises LowmemError."""
    from lowmem.checkpoint.files.reading import one_line
    from lowmem.errors import MemoryBudgetError
    from lowmem.plan.device import is_out_of_memory

    module = next(module for name, module, _ in MEASUREMENTS if name == args.measurement)
    try:
        return int(importlib.import_module(module).run(args))
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryBudgetError(
            f"out of memory: {one_line(error)}",
            "Close other programs or choose smaller --versions, and run the same command again: finished "
            "results are kept",
        ) from error
