"""Is memory flat over an hour of turns, resets, retries, long prompts and Ctrl-C?

    python -m lowmem.benchmarks.experiments.endurance.soak MODEL [--minutes 60]

Two processes run all that time in turns: one uses lowmem's Session, the other is `lowmem run` in a terminal
of its own, with typed questions, interrupts, resizes, saves and loads. After each round a process is reset,
answers one short question that is always the same, and takes a census of what it holds
(`soak_worker.Census`).

A figure is flat if its least-squares line over the last three quarters of the time, plus two standard errors,
rises by no more than its limit an hour. Descriptors and threads must not be more in the last quarter than in
the second. The number of independent samples is estimated from the correlation of neighbouring residuals.
Mapped weights are file pages, which are not part of `anonymous`. Ends with 1 if something is not flat or went
wrong.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from lowmem.benchmarks.common.records import Origin
from lowmem.benchmarks.experiments.common import (
    RESULTS,
    Experiment,
    made_with,
    origin_here,
    say,
    table,
    write,
)
from lowmem.benchmarks.experiments.endurance.soak_terminal import Stuck, Terminal
from lowmem.benchmarks.experiments.workers.turns import Worker, WorkerError

from lowmem.text.units import format_bytes

MIB = 1 << 20
LIMITS: dict[str, float] = {
    "anonymous": 2 * MIB,
    "heap": 2 * MIB,
    "objects": 2000,
    "blocks": 20000,
    "tensors": 10,
    "tensor_bytes": 0.25 * MIB,
}
"""What a figure may rise by in an hour."""
COUNTS = ("descriptors", "threads")
SHOWN = ("rss", "pss", "private", "shared", *LIMITS, *COUNTS, "cached", "kept")
IN_BYTES = frozenset(
    {"rss", "pss", "anonymous", "private", "shared", "heap", "tensor_bytes", "cached", "kept"}
)
FEWEST = 12
"""Samples that can be judged."""


@dataclass(frozen=True)
class Trend:
    """A figure's course over the time."""

    figure: str
    quarters: tuple[float, ...]
    """Medians of the quarters."""
    slope: float
    """Of the line over the last three quarters, an hour."""
    error: float
    """The slope's standard error."""
    correlation: float
    """Of neighbouring residuals."""

    @property
    def most(self) -> float:
        """The rise in an hour, two standard errors included."""
        return self.slope + 2 * self.error


@dataclass(frozen=True)
class Watched:
    """One process over all the time."""

    name: str
    turns: tuple[tuple[str, int], ...]
    """By kind."""
    trends: tuple[Trend, ...]
    growing: tuple[tuple[str, int], ...]
    """Types of Python objects that are more in the last quarter than in the second (medians), most first."""
    samples: tuple[tuple[float, ...], ...]
    """Minutes, then the figures of SHOWN in their order."""
    faults: tuple[str, ...]
    """What is not flat, and what went wrong."""


@dataclass(frozen=True)
class Soak:
    """`soak.json`."""

    origin: Origin
    kernel: str
    context: int
    minutes: float
    rounds: int
    figures: tuple[str, ...]
    limits: tuple[tuple[str, float], ...]
    watched: tuple[Watched, ...]

    @property
    def passed(self) -> bool:
        """Whether everything was flat, and nothing went wrong."""
        return not any(watched.faults for watched in self.watched)


def trend_of(figure: str, minutes: Sequence[float], values: Sequence[float]) -> Trend:
    """The course of a figure that was `values` at `minutes`, four samples or more."""
    times, found = np.asarray(minutes, float), np.asarray(values, float)
    length = max(times[-1] - times[0], 1e-9)
    part = np.minimum(3, (4 * (times - times[0]) / length).astype(int))
    quarters = tuple(float(np.median(found[part == n])) if (part == n).any() else math.nan for n in range(4))
    hours, late = times[part > 0] / 60, found[part > 0]
    hours = hours - hours.mean()
    distances = float(hours @ hours)
    slope = float(hours @ (late - late.mean())) / distances
    rest = late - late.mean() - slope * hours
    squares = float(rest @ rest)
    # Rounding of a constant figure is not a residual.
    if squares <= 1e-12 * max(1.0, float(late.mean()) ** 2):
        return Trend(figure, quarters, slope, 0.0, 0.0)
    count = len(late)
    correlation = min(max(float(rest[:-1] @ rest[1:]) / squares, 0.0), 0.95)
    independent = max(3.0, count * (1 - correlation) / (1 + correlation))
    error = math.sqrt(squares / distances / (independent - 2)) * math.sqrt(max(1.0, (count - 2) / count))
    return Trend(figure, quarters, slope, error, correlation)


@dataclass
class Watch:
    """What has been seen of one process so far."""

    name: str
    minutes: list[float]
    counts: list[dict[str, Any]]
    """A Census for each sample, as JSON, with `kept` in it."""
    wrong: list[str]

    def judge(self, turns: Mapping[str, int]) -> Watched:
        """Trends and faults of the samples. turns: by kind."""
        faults, counts = list(self.wrong), self.counts
        trends: tuple[Trend, ...] = ()
        growing: list[tuple[str, int]] = []
        if len(counts) < FEWEST:
            faults.append(f"{len(counts)} samples are too few to judge")
        else:
            trends = tuple(trend_of(name, self.minutes, [c[name] for c in counts]) for name in SHOWN)
            for trend in trends:
                limit = LIMITS.get(trend.figure, math.inf)
                if trend.most > limit:
                    rise, allowed = shown(trend.figure, trend.most), shown(trend.figure, limit)
                    faults.append(f"{trend.figure} may rise by {rise} an hour, more than {allowed}")
            quarter = len(counts) // 4
            second, last = counts[quarter : 2 * quarter], counts[-quarter:]
            for figure in COUNTS:
                before, after = (max(count[figure] for count in part) for part in (second, last))
                if after > before:
                    faults.append(f"{figure} are {after}, and were {before} in the second quarter")
            for kind in {kind for count in last for kind in count["types"]}:
                a, b = (median(count["types"].get(kind, 0) for count in part) for part in (second, last))
                if b > a:
                    growing.append((kind, round(b - a)))
        growing.sort(key=lambda entry: (-entry[1], entry[0]))
        samples = tuple(
            (round(minute, 3), *(count[figure] for figure in SHOWN))
            for minute, count in zip(self.minutes, counts, strict=True)
        )
        return Watched(self.name, tuple(turns.items()), trends, tuple(growing[:12]), samples, tuple(faults))


def shown(figure: str, value: float) -> str:
    """A figure in its unit."""
    if figure in IN_BYTES:
        return f"{'-' if value < 0 else ''}{format_bytes(abs(round(value)))}"
    return f"{value:,.1f}".removesuffix(".0")


def measure(args: argparse.Namespace, words: Sequence[str]) -> Soak:
    """Both processes for --minutes, --turns of each a round. The record so far is written now and then."""
    origin = origin_here("endurance.soak", words, Path(args.model).name)
    with tempfile.TemporaryDirectory(prefix="lowmem-soak-") as name:
        folder, saved = Path(name), Path(name) / "session"
        saved.mkdir()
        (folder / "terminal").mkdir()
        module = "lowmem.benchmarks.experiments.endurance.soak_worker"
        command = [
            sys.executable,
            "-m",
            module,
            "session",
            str(Path(args.model).resolve()),
            str(args.context),
        ]
        session = Worker([*command, str(saved), str(args.seed)], folder / "session.log")
        terminal = Terminal(args.model, args.context, folder / "terminal", args.seed)
        watches = (Watch("session", [], [], []), Watch("terminal", [], [], []))

        def census(watch: Watch) -> dict[str, Any]:
            if watch.name == "session":
                kept = sum(file.stat().st_size for file in saved.iterdir())
                return {**session.ask({"what": "round", "turns": args.turns}), "kept": kept}
            terminal.round(args.turns)
            return {**terminal.census(), "kept": terminal.kept}

        begun, next_word = time.monotonic(), 0.0
        empty = Soak(origin, session.kernel, args.context, 0.0, 0, SHOWN, tuple(LIMITS.items()), ())

        def so_far() -> Soak:
            rounds = len(watches[1].counts)
            turns = ({"all kinds": rounds * args.turns}, dict(sorted(terminal.turns.items())))
            watched = tuple(watch.judge(done) for watch, done in zip(watches, turns, strict=True))
            minutes = round((time.monotonic() - begun) / 60, 1)
            return replace(empty, minutes=minutes, rounds=rounds, watched=watched)

        while (now := time.monotonic() - begun) < args.minutes * 60 and not any(w.wrong for w in watches):
            for watch in watches:
                try:
                    count = census(watch)
                except (Stuck, WorkerError) as error:
                    watch.wrong.append(str(error))
                    break
                watch.minutes.append((time.monotonic() - begun) / 60)
                watch.counts.append(count)
            if now >= next_word and all(watch.counts for watch in watches):
                held = ", ".join(f"{w.name} {format_bytes(w.counts[-1]['anonymous'])}" for w in watches)
                say(f"{now / 60:5.1f} min, {len(watches[1].counts)} rounds: anonymous memory of {held}")
                write(so_far(), args.out)
                next_word = now + max(30.0, args.minutes)
        try:
            if (code := terminal.leave()) != 0:
                watches[1].wrong.append(f"it ended with {code}")
        except Stuck as error:
            watches[1].wrong.append(str(error))
        terminal.close()
        session.close()
        return so_far()


def render(record: Soak) -> str:
    """Medians of the quarters, the slope and its bound, as Markdown."""
    parts = [f"{record.kernel}, context {record.context}: {record.rounds} rounds of each"]
    limits = dict(record.limits)
    heads = ("", "1st quarter", "2nd", "3rd", "4th", "an hour", "at most", "limit")
    for watched in record.watched:
        kinds = ", ".join(f"{count} {kind}" for kind, count in watched.turns)
        parts.append(f"{watched.name}: {sum(dict(watched.turns).values())} turns ({kinds})")
        rows = []
        for trend in watched.trends:
            name = trend.figure
            limit = [shown(name, limits[name])] if name in limits else [""]
            values = (*trend.quarters, trend.slope, trend.most)
            rows.append([name, *(shown(name, value) for value in values), *limit])
        parts.append(table(heads, rows))
        if watched.growing:
            parts.append("more objects of " + ", ".join(f"{kind} (+{n})" for kind, n in watched.growing[:6]))
        parts += [f"FAULT: {fault}" for fault in watched.faults]
    parts.append(f"{'flat' if record.passed else 'NOT flat'}; {made_with(record.origin)}")
    return "\n\n".join(parts)


SOAK = Experiment("endurance.soak", Soak, RESULTS / "soak.json", render)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    parser = SOAK.parser(__doc__)
    parser.add_argument("model", nargs="?", help="a model's folder; a converted one uses lowmem's kernels")
    parser.add_argument("--minutes", type=float, default=60.0, help="(%(default)s)")
    parser.add_argument("--context", type=int, default=512, help="short, so that turns are dropped")
    parser.add_argument("--turns", type=int, default=40, help="of each process in a round (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    if args.model is None and not args.show:
        parser.error("MODEL is required")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    code = SOAK.run(args, lambda: measure(args, words))
    return code or int(not SOAK.read(args.out).passed)


if __name__ == "__main__":
    sys.exit(main())
