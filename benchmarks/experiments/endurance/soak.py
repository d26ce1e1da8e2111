"""An hour of chat turns and resets: does memory stay flat?

    python -m lowmem.benchmarks.experiments.endurance.soak MODEL [--minutes 60] [--json FILE]

Two processes live for all that time and take turns: one talks to lowmem's Session, the other is `lowmem run`
in a terminal of its own, typed into, interrupted, resized, saved and loaded. After each round a process is
reset, answers one short question that is always the same, and counts what it holds (`soak_worker.Census`).

Flat: over the samples of the last three quarters of the time, the least-squares line of a figure, or what is
two standard errors steeper, rises by no more than its limit an hour; descriptors and threads are never more
in the last quarter than they were in the second. Standard errors are those of as many independent samples
as there are by the residuals' correlation. Mapped weights are files' pages: they are no part of `anonymous`.
Ends with 1 where something is not flat, or anything went wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lowmem.benchmarks.common.origin import machine_here, versions
from lowmem.benchmarks.common.record_file import write
from lowmem.benchmarks.experiments.endurance.soak_terminal import Stuck, Terminal

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
"""What a figure may rise by in an hour, by its line and two standard errors."""
COUNTS = ("descriptors", "threads")
SHOWN = ("rss", "pss", "private", "shared", *LIMITS, *COUNTS, "cached", "kept")
BYTES = frozenset({"rss", "pss", "anonymous", "private", "shared", "heap", "tensor_bytes", "cached", "kept"})
_FEWEST = 12  # samples that are judged


@dataclass(frozen=True)
class Trend:
    """A figure's course: medians of the quarters of the time, and its line over the last three.

    slope: an hour. error: the standard error of it. correlation: of neighbouring residuals.
    """

    quarters: tuple[float, ...]
    slope: float
    error: float
    correlation: float

    @property
    def most(self) -> float:
        """What it may rise by in an hour, two standard errors included."""
        return self.slope + 2 * self.error


@dataclass(frozen=True)
class Watched:
    """One process over all the time.

    turns: by kind. trends: by figure. growing: types of Python objects that are more in the last quarter than
    in the second (medians), most first. samples: minutes, then the figures of SHOWN in their order. faults:
    what is not flat, and what went wrong, in words.
    """

    name: str
    turns: dict[str, int]
    trends: dict[str, Trend]
    growing: tuple[tuple[str, int], ...]
    samples: tuple[tuple[float, ...], ...]
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """A run of the benchmark."""

    command: str
    date: str
    model: str
    form: str
    kernel: str
    context: int
    minutes: float
    rounds: int
    figures: tuple[str, ...]
    limits: dict[str, float]
    watched: tuple[Watched, ...]
    machine: dict[str, Any]
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether all was flat, and nothing went wrong."""
        return not any(watched.faults for watched in self.watched)


def trend_of(minutes: Sequence[float], values: Sequence[float]) -> Trend:
    """The course of a figure that was `values` at `minutes`, four samples or more."""
    first, last = minutes[0], minutes[-1]
    parts: list[list[float]] = [[], [], [], []]
    for minute, value in zip(minutes, values, strict=True):
        parts[min(3, int(4 * (minute - first) / max(last - first, 1e-9)))].append(value)
    quarters = tuple(statistics.median(part) if part else math.nan for part in parts)
    begin = len(parts[0])
    hours, late = [minute / 60 for minute in minutes[begin:]], list(values[begin:])
    count, middle, mean = len(late), statistics.fmean(hours), statistics.fmean(late)
    spread = sum((hour - middle) ** 2 for hour in hours)
    slope = sum((h - middle) * (v - mean) for h, v in zip(hours, late, strict=True)) / spread
    rest = [v - mean - slope * (h - middle) for h, v in zip(hours, late, strict=True)]
    squares = sum(r * r for r in rest)
    # Rounding of a figure that never moves is no residual.
    if squares <= 1e-12 * max(1.0, mean * mean):
        return Trend(quarters, slope, 0.0, 0.0)
    correlation = sum(a * b for a, b in pairwise(rest)) / squares
    correlation = min(max(correlation, 0.0), 0.95)
    independent = max(3.0, count * (1 - correlation) / (1 + correlation))
    error = math.sqrt(squares / spread / (independent - 2)) * math.sqrt(max(1.0, (count - 2) / count))
    return Trend(quarters, slope, error, correlation)


def judge(
    name: str,
    turns: dict[str, int],
    minutes: Sequence[float],
    counts: Sequence[dict[str, Any]],
    wrong: Sequence[str] = (),
) -> Watched:
    """What the samples of a process come to. counts: a Census each, as JSON, with `kept` in it."""
    faults = list(wrong)
    trends: dict[str, Trend] = {}
    growing: list[tuple[str, int]] = []
    if len(counts) < _FEWEST:
        faults.append(f"{len(counts)} samples are too few to judge")
    else:
        trends = {name: trend_of(minutes, [float(count[name]) for count in counts]) for name in SHOWN}
        for figure, limit in LIMITS.items():
            if trends[figure].most > limit:
                rise = shown(figure, trends[figure].most)
                faults.append(f"{figure} may rise by {rise} an hour, more than {shown(figure, limit)}")
        quarter = len(counts) // 4
        second, last = counts[quarter : 2 * quarter], counts[-quarter:]
        for figure in COUNTS:
            before, after = (max(count[figure] for count in part) for part in (second, last))
            if after > before:
                faults.append(f"{figure} are {after}, and were {before} in the second quarter")
        for kind in {kind for count in last for kind in count["types"]}:
            a, b = (
                statistics.median(count["types"].get(kind, 0) for count in part) for part in (second, last)
            )
            if b > a:
                growing.append((kind, round(b - a)))
    growing.sort(key=lambda entry: (-entry[1], entry[0]))
    samples = tuple(
        (round(minute, 3), *(count[figure] for figure in SHOWN))
        for minute, count in zip(minutes, counts, strict=True)
    )
    return Watched(name, turns, trends, tuple(growing[:12]), samples, tuple(faults))


def shown(figure: str, value: float) -> str:
    """A figure in its unit."""
    if figure in BYTES:
        return f"{'-' if value < 0 else ''}{format_bytes(abs(round(value)))}"
    return f"{value:,.1f}".removesuffix(".0")


class SessionProcess:
    """The process that talks to a Session; `rounds` are asked for, and it counts after each."""

    def __init__(self, model: str, context: int, folder: Path, seed: int, turns: int) -> None:
        words = [model, str(context), str(folder), str(seed), str(turns)]
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lowmem.benchmarks.experiments.endurance.soak_worker", "session", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self._line()

    @property
    def kept(self) -> int:
        """Bytes of the conversations that were saved."""
        return sum(file.stat().st_size for file in self._folder.iterdir())

    def round(self) -> dict[str, Any]:
        """One round; what is held after it. Raises Stuck."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Stuck(f"the session's process ended with {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> int:
        """End it; the exit code."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        code = self._process.wait()
        self._process.stdout.close()
        return code


def measure(
    model: str,
    minutes: float,
    context: int,
    turns: int,
    seed: int,
    say: Callable[[str], None],
    keep: Callable[[Record], None] = lambda record: None,
) -> Record:
    """Both processes for so long, `turns` of each a round. keep: given what there is so far, now and then."""
    with tempfile.TemporaryDirectory(prefix="lowmem-soak-") as name:
        for part in ("session", "terminal"):
            (Path(name) / part).mkdir()
        session = SessionProcess(model, context, Path(name) / "session", seed, turns)
        terminal = Terminal(model, context, Path(name) / "terminal", seed)
        times: dict[str, list[float]] = {"session": [], "terminal": []}
        counts: dict[str, list[dict[str, Any]]] = {"session": [], "terminal": []}
        wrong: dict[str, list[str]] = {"session": [], "terminal": []}

        def so_far() -> Record:
            rounds = len(counts["terminal"])
            done = {
                "session": {"all kinds": rounds * turns},
                "terminal": dict(sorted(terminal.turns.items())),
            }
            return Record(
                command=shlex.join(
                    [
                        "python",
                        "-m",
                        "lowmem.benchmarks.experiments.endurance.soak",
                        Path(model).name,
                        "--minutes",
                        f"{minutes:g}",
                    ]
                ),
                date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                model=Path(model).name,
                form=session.about["form"],
                kernel=session.about["kernel"],
                context=context,
                minutes=round((time.monotonic() - begun) / 60, 1),
                rounds=rounds,
                figures=SHOWN,
                limits=dict(LIMITS),
                watched=tuple(
                    judge(kind, done[kind], times[kind], counts[kind], wrong[kind]) for kind in counts
                ),
                machine=asdict(machine_here()),
                versions=dict(versions(("torch", "transformers", "tokenizers", "prompt_toolkit", "rich"))),
            )

        begun, next_word = time.monotonic(), 0.0
        while (now := time.monotonic() - begun) < minutes * 60 and not any(wrong.values()):
            for kind in counts:
                try:
                    if kind == "session":
                        count = {**session.round(), "kept": session.kept}
                    else:
                        terminal.round(turns)
                        count = {**terminal.census(), "kept": terminal.kept}
                except Stuck as error:
                    wrong[kind].append(str(error))
                    break
                times[kind].append((time.monotonic() - begun) / 60)
                counts[kind].append(count)
            if now >= next_word and all(counts.values()):
                say(_progress(now, counts))
                keep(so_far())
                next_word = now + max(30.0, minutes)
        try:
            if (code := terminal.leave()) != 0:
                wrong["terminal"].append(f"it ended with {code}")
        except Stuck as error:
            wrong["terminal"].append(str(error))
        terminal.close()
        if (code := session.close()) != 0:
            wrong["session"].append(f"it ended with {code}")
        return so_far()


def _progress(seconds: float, counts: dict[str, list[dict[str, Any]]]) -> str:
    held = ", ".join(f"{kind} {format_bytes(found[-1]['anonymous'])}" for kind, found in counts.items())
    return f"{seconds / 60:5.1f} min, {len(counts['terminal'])} rounds: anonymous memory of {held}"


def table(record: Record) -> str:
    """The figures in lines: medians of the quarters, the line's slope an hour and its bound."""
    lines = [
        f"{record.form}, kernel {record.kernel}, context {record.context}: {record.rounds} rounds of each"
    ]
    for watched in record.watched:
        kinds = ", ".join(f"{count} {kind}" for kind, count in watched.turns.items())
        lines += ["", f"{watched.name}: {sum(watched.turns.values())} turns ({kinds})"]
        lines.append(f"{'':<13}{'quarters':<48}{'an hour':>12}{'at most':>12}{'limit':>12}")
        for figure, trend in watched.trends.items():
            quarters = "".join(f"{shown(figure, value):>12}" for value in trend.quarters)
            limit = shown(figure, record.limits[figure]) if figure in record.limits else ""
            rise, most = shown(figure, trend.slope), shown(figure, trend.most)
            lines.append(f"{figure:<13}{quarters}{rise:>12}{most:>12}{limit:>12}")
        if watched.growing:
            lines.append("more objects of " + ", ".join(f"{kind} (+{n})" for kind, n in watched.growing[:6]))
        lines += [f"NOT as it has to be: {fault}" for fault in watched.faults]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lowmem.benchmarks.experiments.endurance.soak", description=__doc__
    )
    parser.add_argument("model", help="a model's folder; a converted one runs on lowmem's own kernels")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--context", type=int, default=512, help="so short that turns are left out")
    parser.add_argument("--turns", type=int, default=40, help="of each process in a round (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the record there, as far as it is")
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    record = measure(
        args.model,
        args.minutes,
        args.context,
        args.turns,
        args.seed,
        lambda line: print(line, file=sys.stderr, flush=True),
        lambda record: write(record, args.json) if args.json else None,
    )
    print(table(record))
    if args.json:
        write(record, args.json)
    print("flat" if record.passed else "NOT flat")
    return 0 if record.passed else 1


if __name__ == "__main__":
    sys.exit(main())
