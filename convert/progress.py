"""Progress of a conversion: a live bar, a line per layer, JSON lines, or nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lowmem.text.units import format_bytes

if TYPE_CHECKING:
    from lowmem.convert.memory_plan import MemoryPlan
    from lowmem.convert.stages.context import LinearReport, Seconds
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


class Reporter:
    """Receives the events of a conversion; this one prints nothing but warnings (`--quiet`)."""

    folder: Path | None = None
    """The folder to create, once it is known."""

    def target(self, folder: Path) -> None:
        """The folder to create is known; nothing is written yet."""
        self.folder = folder

    def started(self, plan: MemoryPlan, layers: int, finished: int, note: str) -> None:
        """The work begins; `finished` layers exist from an interrupted run. note: its description."""

    def disk(self, needed: int, free: int, folder: Path) -> None:
        """Bytes of disk that the work needs in `folder`, and that are free."""

    def message(self, text: str) -> None:
        """A notice for the user."""

    def warning(self, text: str) -> None:
        """A notice that is shown even with `--quiet`: the checkpoint is not what its config says."""
        print(text, file=sys.stderr, flush=True)

    def measuring(self, step: str, done: int, layers: int) -> None:
        """The sensitivities are measured. step: "forward", "head" or "backward"; done: layers it finished."""

    def phase(self, layer: int, text: str) -> None:
        """The current stage, as `rounding of mlp.c_fc`."""

    def linear(self, layer: int, report: LinearReport) -> None:
        """One linear is quantized."""

    def layer(self, layer: int, reports: Sequence[LinearReport], seconds: Seconds) -> None:
        """One decoder layer is finished and on disk."""

    def finished(self, summary: dict[str, Any]) -> None:
        """The checkpoint is complete. summary: the fields of ResultSummary."""

    def close(self) -> None:
        """No more events will follow."""


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def _spent(seconds: Mapping[str, float]) -> str:
    """Time spent by activity, without those that took none."""
    return ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items() if s > 0)


def _mean_error(reports: Sequence[LinearReport]) -> float:
    return sum(report.error for report in reports) / len(reports)


def describe_plan(plan: MemoryPlan) -> str:
    """Describe in one sentence the memory, hidden states and rows at a time."""
    where = "in memory" if plan.keep_hidden else "in a file"
    card = f", {format_bytes(plan.device_peak)} on the GPU" if plan.device_peak else ""
    return (
        f"needs at most {format_bytes(plan.host_peak)} of memory{card} (at {plan.largest.name}); "
        f"hidden states {where}, {format_bytes(plan.hidden_bytes)}; {plan.rows_at_a_time} rows at a time"
    )


class LineReporter(Reporter):
    """Prints one line per layer, for files and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.layers = 0
        self._began = time.monotonic()
        self._first = 0

    def _line(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def message(self, text: str) -> None:
        self._line(text)

    def warning(self, text: str) -> None:
        self.message(text)

    def started(self, plan: MemoryPlan, layers: int, finished: int, note: str) -> None:
        self.layers, self._first, self._began = layers, finished, time.monotonic()
        self._line(note)
        self._line(describe_plan(plan))
        if finished:
            self._line(f"resuming after layer {finished} of {layers}")

    def disk(self, needed: int, free: int, folder: Path) -> None:
        self._line(f"needs at most {format_bytes(needed)} of disk in {folder}: {format_bytes(free)} are free")

    def measuring(self, step: str, done: int, layers: int) -> None:
        if step == "backward" and (done % max(1, layers // 8) == 0):
            self._line(f"sensitivities: {done} of {layers} layers measured")

    def layer(self, layer: int, reports: Sequence[LinearReport], seconds: Seconds) -> None:
        done = layer + 1 - self._first
        left = (time.monotonic() - self._began) / done * (self.layers - layer - 1)
        worst = max(reports, key=lambda r: r.error)
        self._line(
            f"layer {layer + 1}/{self.layers}  error {_mean_error(reports):.2e} "
            f"(worst: {worst.name} {worst.error:.2e})  {_duration(left)} left  "
            f"({_spent(asdict(seconds))})"
        )

    def finished(self, summary: dict[str, Any]) -> None:
        spent = _spent(summary["seconds"])
        self._line(
            f"wrote {summary['out']}: {format_bytes(summary['bytes'])}, "
            f"{summary['bits_per_weight']:.2f} bits per weight in the linears, "
            f"peak memory {format_bytes(summary['peak_memory'])}, {_duration(summary['total_seconds'])}"
            + (f" ({spent})" if spent else "")
        )


class BarReporter(LineReporter):
    """Displays a live bar with layer, stage, error and time left, for terminals."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar: Bar = Progress(
            TextColumn("layer"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True),
        )
        self._task: TaskID | None = None
        self._measuring: TaskID | None = None
        self._phase = self._last = ""

    def _line(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)

    def started(self, plan: MemoryPlan, layers: int, finished: int, note: str) -> None:
        super().started(plan, layers, finished, note)
        if self._measuring is not None:
            self._bar.remove_task(self._measuring)
        self._bar.start()
        self._task = self._bar.add_task("", total=layers, completed=finished)

    def measuring(self, step: str, done: int, layers: int) -> None:
        if self._measuring is None:
            self._bar.start()
            self._measuring = self._bar.add_task("", total=layers)
        text = f"sensitivities: {step} pass"
        self._bar.update(self._measuring, description=text, completed=done, total=layers)

    def phase(self, layer: int, text: str) -> None:
        self._phase = text
        self._describe()

    def linear(self, layer: int, report: LinearReport) -> None:
        self._last = f"{report.name} {report.error:.1e}"
        self._describe()

    def _describe(self) -> None:
        if self._task is not None:
            last = f"  (error of {self._last})" if self._last else ""
            self._bar.update(self._task, description=f"{self._phase}{last}")

    def layer(self, layer: int, reports: Sequence[LinearReport], seconds: Seconds) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=layer + 1)

    def finished(self, summary: dict[str, Any]) -> None:
        self._bar.stop()
        super().finished(summary)

    def close(self) -> None:
        self._bar.stop()


class JsonReporter(Reporter):
    """Prints one JSON object per line on standard output, for programs."""

    def _event(self, kind: str, **values: Any) -> None:
        print(json.dumps({"event": kind, **values}), flush=True)

    def message(self, text: str) -> None:
        self._event("message", text=text)

    def started(self, plan: MemoryPlan, layers: int, finished: int, note: str) -> None:
        self._event("started", plan=asdict(plan), layers=layers, finished=finished, note=note)

    def disk(self, needed: int, free: int, folder: Path) -> None:
        self._event("disk", needed=needed, free=free, folder=str(folder))

    def measuring(self, step: str, done: int, layers: int) -> None:
        self._event("measuring", step=step, done=done, layers=layers)

    def linear(self, layer: int, report: LinearReport) -> None:
        self._event("linear", layer=layer, **asdict(report))

    def layer(self, layer: int, reports: Sequence[LinearReport], seconds: Seconds) -> None:
        self._event("layer", layer=layer, error=_mean_error(reports), seconds=asdict(seconds))

    def finished(self, summary: dict[str, Any]) -> None:
        self._event("finished", **summary)


def make_reporter(*, quiet: bool, as_json: bool) -> Reporter:
    """Choose the reporter that fits the options, and the terminal or pipe on standard error."""
    if as_json:
        return JsonReporter()
    if quiet:
        return Reporter()
    return BarReporter() if sys.stderr.isatty() else LineReporter()
