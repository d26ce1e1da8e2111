"""`lowmem plan MODEL`: the memory that each version of a model needs."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from lowmem.commands.plan_options import add_plan_arguments, request_of
from lowmem.text.standard import print_json

if TYPE_CHECKING:
    from lowmem.plan.planner import Option, Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem plan`."""
    add_plan_arguments(parser)
    parser.add_argument(
        "--bandwidth",
        metavar="RATE",
        help="memory bandwidth per second, such as 360GB, of a card that is not in this machine",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Plan and print; reads headers only. Raises LowmemError."""
    from dataclasses import replace

    from lowmem.plan.device import parse_bytes
    from lowmem.plan.request import plan_for

    request = request_of(args)
    if args.bandwidth:
        rate = args.bandwidth.removesuffix("/s")
        request = replace(request, bandwidth=float(parse_bytes(rate, "--bandwidth")))
    plan = plan_for(request, named_card=True, measure=True)
    if args.json:
        print_json(record(plan))
    else:
        print_table(plan)
        print(plan.reason)
    return 0


def print_table(plan: Plan) -> None:
    """Print a row per version; those that are not converted yet follow in a second section."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from lowmem.text.units import format_bytes

    budget = plan.budget
    have = budget.host if budget.card is None else budget.card
    everything = (*plan.options, *plan.possible)
    unit, name = (2**30, "GiB") if max(o.need.total for o in everything) >= 2**30 else (2**20, "MiB")
    rates = any(option.ceiling for option in everything)
    title = f"{budget.device}: {format_bytes(have)}, context {plan.context:,}; sizes in {name}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("version", no_wrap=True)
    for column in ("bits", "weights", "KV", "work", "own", "total", "fits", "context"):
        table.add_column(column, justify="right", no_wrap=True)
    if rates:
        table.add_column("tok/s ≤", justify="right", no_wrap=True)
    known = any(option.candidate.kld is not None for option in everything)
    if known:
        table.add_column("KL div.", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for option in plan.options:
        table.add_row(*_cells(option, plan, unit), *_extras(option, rates, known))
    if plan.possible:
        table.add_section()
    for option in plan.possible:
        table.add_row(*_cells(option, plan, unit), *_extras(option, rates, known), style="dim")
    console = Console()
    Console(width=None if console.is_terminal else 120).print(table)
    if budget.card is not None and not rates:
        print(
            "Pass --bandwidth to estimate tokens/s: this card's memory bandwidth is unknown.", file=sys.stderr
        )


def _cells(option: Option, plan: Plan, unit: int) -> list[str]:
    """Of the columns that every table has."""
    need, candidate = option.need, option.candidate
    sizes = [need.weights, need.kv_cache, need.workspace, need.context, need.total]
    digits = 2 if unit == 2**30 else 0
    return [
        ("→ " if option.candidate is plan.chosen.candidate else "  ") + candidate.label,
        f"{candidate.bits:.3g}",
        *(f"{nbytes / unit:.{digits}f}" for nbytes in sizes),
        "yes" if option.fits else f"{option.short / unit:.{digits}f} short",
        f"{option.longest:,}" if option.longest else "—",
    ]


def _extras(option: Option, rates: bool, known: bool) -> list[str]:
    """Tokens/s and KL divergence where the table has them, and where the version comes from."""
    candidate, found = option.candidate, []
    if rates:
        found.append(f"{option.ceiling:.1f}" if option.ceiling else "—")
    if known:
        predicted = "~" if candidate.command else ""
        found.append("—" if candidate.kld is None else f"{predicted}{candidate.kld:.2g}")
    if candidate.command:
        return [*found, "to convert"]
    if candidate.form.method == "gptq":
        return [*found, candidate.path.name]
    return [*found, "source" if candidate.form.method == "dense" else "on the fly"]


def record(plan: Plan) -> dict[str, object]:
    """The plan for --json; sizes in bytes."""
    return {
        "device": plan.budget.device,
        "have": plan.budget.host if plan.budget.card is None else plan.budget.card,
        "host": plan.budget.host,
        "context": plan.context,
        "reason": plan.reason,
        "draft": _draft(plan),
        "chosen": _option(plan.chosen),
        "options": [_option(option) for option in plan.options],
        "possible": [_option(option) for option in plan.possible],
    }


def _draft(plan: Plan) -> dict[str, object] | None:
    if plan.draft is None:
        return None
    candidate, need = plan.draft.candidate, plan.draft.need
    return {
        "label": candidate.label,
        "dtype": candidate.form.dtype,
        "path": str(candidate.path),
        "weights": need.weights,
        "kv_cache": need.kv_cache,
        "workspace": need.workspace,
        "need": need.total,
    }


def _option(option: Option) -> dict[str, object]:
    from lowmem.plan.memory import head_bytes

    candidate = option.candidate
    return {
        "label": candidate.label,
        "method": candidate.form.method,
        "bits": candidate.bits,
        "dtype": candidate.form.dtype,
        "head_bits": candidate.form.head_bits,
        "path": str(candidate.path),
        "command": candidate.command or None,
        "kld": candidate.kld,
        "device": option.device,
        "cpu_layers": option.cpu_layers,
        "weights": option.need.weights,
        "head": head_bytes(candidate.shape, candidate.form.head_bits, candidate.form.itemsize),
        "kv_cache": option.need.kv_cache,
        "workspace": option.need.workspace,
        "own_context": option.need.context,
        "need": option.need.total,
        "host_need": option.host.total if option.host else None,
        "fits": option.fits,
        "short": option.short,
        "longest_context": option.longest,
        "tokens_per_second_at_most": option.ceiling,
    }
