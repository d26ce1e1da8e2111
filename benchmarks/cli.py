"""`lowmem bench`: dispatch to what is measured. A measurement's imports wait until it is called."""

from __future__ import annotations

import argparse
import importlib

MEASUREMENTS = (
    (
        "quality",
        "lowmem.benchmarks.quality.command",
        "KL divergence and perplexity of every form against bf16",
    ),
    ("humaneval", "lowmem.benchmarks.humaneval.command", "share of HumanEval's problems solved (pass@1)"),
    (
        "latency",
        "lowmem.benchmarks.latency.command",
        "load, prefill and decode, beside what the machine allows",
    ),
    ("report", "lowmem.benchmarks.report.command", "a Markdown and an HTML page of what was measured"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the words after `lowmem bench`, and the options of each."""
    words = parser.add_subparsers(
        dest="measurement", metavar="WHAT", required=True, parser_class=type(parser)
    )
    for name, module, text in MEASUREMENTS:
        sub = words.add_parser(name, help=text, description=text)
        importlib.import_module(module).add_arguments(sub)


def run(args: argparse.Namespace) -> int:
    """Measure; the exit code. Raises LowmemError for what the user can mend."""
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
            "Close other programs, or measure smaller --forms, and give the same command again: what is "
            "measured is kept",
        ) from error
