"""How a latency measurement looks: a bar or lines while it runs, the ceilings first, a table at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lowmem.benchmarks.common.records import LatencyRecord, Roofline, SubjectLatency
from lowmem.benchmarks.latency.measure import Entry
from lowmem.benchmarks.latency.roofline import decode_ceiling, prefill_ceiling
from lowmem.benchmarks.latency.rounds import Watcher
from lowmem.benchmarks.latency.worker import Visit

from lowmem.text.units import format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress

_PLAIN_WIDTH = 100  # of a table that goes to a file or a pipe


class LineWatcher(Watcher):
    """A line for each process: for files and pipes."""

    def line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def ended(self, title: str, visit: Visit | str) -> None:
        self.line(f"{title}: {visit if isinstance(visit, str) else describe(visit)}")


class BarWatcher(LineWatcher):
    """A bar with what is measured now and the time left: for terminals."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar: Progress = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            refresh_per_second=2,  # drawing takes time from what is measured
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=1)
        self._title = ""
        self._end: float | None = None

    def line(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)

    def began(self, title: str, done: int, total: int, left: float | None) -> None:
        self._title, self._end = title, None if left is None else time.monotonic() + left
        self._bar.update(self._task, completed=done, total=total, description=title)

    def step(self, text: str) -> None:
        left = ""
        if self._end is not None:
            left = f"  about {_duration(max(1.0, self._end - time.monotonic()))} left"
        self._bar.update(self._task, description=f"{self._title}: {text}{left}")

    def close(self) -> None:
        self._bar.stop()


def make_watcher(*, quiet: bool) -> Watcher:
    """The watcher for the terminal or the pipe that we write to."""
    if quiet:
        return Watcher()
    return BarWatcher() if sys.stderr.isatty() else LineWatcher()


def describe(visit: Visit) -> str:
    """One line on what a process found: at its longest prompt and context."""
    prompt, decode = visit.prompts[-1], visit.decodes[-1]
    return (
        f"load {visit.load_seconds:.2f} s, prefill of {prompt.tokens}: "
        f"{prompt.tokens / prompt.ttft:,.0f} tokens/s, "
        f"decode at {decode.context}: {1 / decode.tpot:,.1f} tokens/s"
    )


def ceiling_lines(entries: Sequence[Entry], probe: Visit, dtype: str) -> Iterator[str]:
    """What the machine allows each form, before it is measured."""
    rates = probe.rates[0]
    yield (
        f"roofline: reads {rates.read / 1e9:.1f} GB/s, multiplies {rates.matmul / 1e9:,.0f} GFLOP/s "
        f"in {dtype} ({_threads(probe.threads)})"
    )
    for entry in entries:
        candidate, lengths = entry.entrant.candidate, entry.lengths
        if entry.reason:
            yield f"{entry.label}: does not fit: {entry.reason}"
            continue
        context, tokens = lengths.contexts[0], lengths.prompts[-1]
        decode = decode_ceiling(candidate.shape, candidate.form, context, lengths.new_tokens, rates.read)
        prefill = prefill_ceiling(candidate.shape, candidate.form, tokens, rates.read, rates.matmul)
        yield (
            f"{entry.label}: a token reads {format_bytes(entry.own_bytes)}: from memory that allows "
            f"{decode:,.0f} tokens/s of decode, and {prefill:,.0f} of prefill"
        )


def print_record(record: LatencyRecord) -> None:
    """The roofline, a table, and what is to be said about both, on standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    say(roofline_text(record.roofline, record.threads, record.drift))
    for headings, rows in (
        (("form", "size", "load s", "prompt", "TTFT ms", "tokens/s", "of ceiling"), _prefill_rows),
        (
            ("form", "peak", "context", "decode tok/s", "of ceiling", "ITL p50/p99 ms", "J/token"),
            _decode_rows,
        ),
    ):
        table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "form" else "right")
        cells = [row for subject in record.subjects for row in rows(subject)]
        if headings[-1] == "J/token" and not any(row[-1] for row in cells):
            table.columns.pop()  # this machine tells no energy
        for row in cells:
            table.add_row(*(Text(cell) for cell in row[: len(table.columns)]))
        say("")
        console.print(table)
    say("")
    for subject in record.subjects:
        if not subject.fits:
            say(f"{subject.subject.label}: not measured: {subject.reason}")
    for warning in record.warnings:
        say(f"! {warning}")


def roofline_text(roofline: Roofline, threads: int, drift: float) -> str:
    """One line on the machine."""
    read, matmul = roofline.read_bytes_per_second, roofline.matmul_flops_per_second
    return (
        f"Roofline: {read.median / 1e9:.1f} GB/s of reads ({read.low / 1e9:.1f} to {read.high / 1e9:.1f}, "
        f"drift {drift:.0%}), {matmul.median / 1e9:,.0f} GFLOP/s in {roofline.matmul_dtype} "
        f"({matmul.low / 1e9:,.0f} to {matmul.high / 1e9:,.0f}), {_threads(threads)}"
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def _prefill_rows(subject: SubjectLatency) -> Iterator[tuple[str, ...]]:
    """A row for each prompt length."""
    size = format_bytes(subject.subject.weight_bytes)
    if subject.load_seconds is None:
        yield (subject.subject.label, size, "not measured", "", "", "", "")
        return
    first = (subject.subject.label, size, f"{subject.load_seconds.median:.2f}")
    for index, prompt in enumerate(subject.prefill):
        yield (
            *(first if index == 0 else ("", "", "")),
            str(prompt.prompt_tokens),
            f"{prompt.ttft.median * 1e3:,.1f}",
            f"{prompt.tokens_per_second.median:,.0f}",
            _percent(prompt.share),
        )


def _decode_rows(subject: SubjectLatency) -> Iterator[tuple[str, ...]]:
    """A row for each context; none of a form that was not measured."""
    peak = format_bytes(subject.peak_device_bytes or subject.peak_host_bytes)
    for index, decode in enumerate(subject.decode):
        yield (
            *((subject.subject.label, peak) if index == 0 else ("", "")),
            str(decode.context_tokens),
            f"{1 / decode.tpot.median:,.1f}",
            _percent(decode.share),
            f"{decode.itl_p50 * 1e3:,.1f} / {decode.itl_p99 * 1e3:,.1f}",
            "" if decode.joules_per_token is None else f"{decode.joules_per_token:.2f}",
        )


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 90:
        return f"{seconds} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
