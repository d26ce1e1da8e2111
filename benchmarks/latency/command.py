"""`lowmem bench latency`: load, prefill and decode of every version, beside what the machine allows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.benchmarks.common.lineup import Lineup, LineupRequest, add_lineup_arguments, line_up, lineup_of
from lowmem.benchmarks.common.output import Output, add_output_arguments, exclusive, output_of, print_json
from lowmem.benchmarks.common.record_file import to_json, write_record
from lowmem.benchmarks.common.records import LatencyRecord, Origin

from lowmem.cards.find import DEVICES
from lowmem.commands.answering import INTERRUPTED, note
from lowmem.commands.plan_options import DTYPES
from lowmem.errors import InvalidRequestError, MemoryBudgetError

if TYPE_CHECKING:
    from lowmem.benchmarks.common.progress import Progress
    from lowmem.benchmarks.latency.machine_state import Before
    from lowmem.benchmarks.latency.planning import PlannedVersion
    from lowmem.benchmarks.latency.rounds import Rounds
    from lowmem.benchmarks.latency.tasks import Lengths, Timings, TimingTask


@dataclass(frozen=True)
class LatencySettings:
    """What to time, and where."""

    lineup: LineupRequest
    prompts: tuple[int, ...] | None
    """Prompt lengths in tokens; None takes the defaults."""
    contexts: tuple[int, ...] | None
    """Context lengths in tokens; None takes the defaults."""
    new_tokens: int
    parallel: int
    """Answers at once that are timed too; 1: none."""
    rounds: int
    threads: int
    """CPU threads; 0 leaves the number to torch."""
    device: str
    """As torch names it."""
    limit: str
    """Memory that a version may use, as typed with --ram or --vram; "" for all free memory."""

    @classmethod
    def of(cls, args: argparse.Namespace) -> LatencySettings:
        """Check the command line. Raises InvalidRequestError for options that contradict each other."""
        from lowmem.plan.request import find_card

        if args.parallel < 1:
            raise InvalidRequestError("--parallel must be positive", "Use 1 to time one answer at a time")
        if args.rounds < 1 or args.threads < 0:
            raise InvalidRequestError("--rounds and --threads must be positive", "Use 1 or more")
        card = find_card(args.device)
        if card is None and args.vram:
            raise InvalidRequestError("--vram needs a card, and versions run on the CPU", "Use --ram SIZE")
        if card is not None and args.ram:
            raise InvalidRequestError(f"--ram is for the CPU, and versions run on {card}", "Use --vram SIZE")
        dtype = None if args.dtype == "auto" else args.dtype
        # Timing needs no reference, so a converted folder whose source is gone can be measured.
        return cls(
            lineup_of(args, cuda=card is not None, dtype=dtype, reference_needed=False),
            args.prompts,
            args.contexts,
            args.new_tokens,
            args.parallel,
            args.rounds,
            args.threads,
            str(card or "cpu"),
            args.vram or args.ram or "",
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem bench latency`."""
    add_lineup_arguments(parser)
    what = parser.add_argument_group("what is timed")
    what.add_argument(
        "--prompts", type=_numbers, metavar="LIST", help="prompt lengths in tokens (default: 32,128,512,2048)"
    )
    what.add_argument(
        "--contexts", type=_numbers, metavar="LIST", help="context lengths in tokens (default: 128,1024,4096)"
    )
    what.add_argument(
        "--new-tokens",
        type=int,
        default=64,
        metavar="N",
        help="tokens to decode per context (default: %(default)s)",
    )
    what.add_argument(
        "--parallel",
        type=int,
        default=4,
        metavar="N",
        help="answers at once, timed behind the shortest context too (default: %(default)s; 1: none)",
    )
    what.add_argument(
        "--rounds",
        type=int,
        default=3,
        metavar="N",
        help="times to measure every version (default: %(default)s)",
    )
    what.add_argument(
        "--threads", type=int, default=0, metavar="N", help="CPU threads (default: torch's choice)"
    )
    where = parser.add_argument_group("where")
    where.add_argument("--device", default="auto", help=f"{DEVICES} (default: %(default)s)")
    where.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of activations (default: %(default)s)"
    )
    where.add_argument("--ram", metavar="SIZE", help="most host memory that a version may use")
    where.add_argument("--vram", metavar="SIZE", help="most card memory that a version may use")
    add_output_arguments(parser, LatencyRecord)


def run(args: argparse.Namespace) -> int:
    """Measure, write `latency.json` and print it.

    Returns exit code 0, or 130 after Ctrl-C; the record then contains the complete rounds.
    """
    from lowmem.benchmarks.common.origin import origin_of
    from lowmem.benchmarks.latency import machine_state
    from lowmem.benchmarks.latency.planning import choose_lengths

    settings, output = LatencySettings.of(args), output_of(args)
    lineup = line_up(settings.lineup)
    positions = lineup.entrants[0].candidate.shape.positions
    lengths = choose_lengths(
        settings.prompts, settings.contexts, settings.new_tokens, positions, settings.parallel
    )
    origin = origin_of(sys.argv[1:], lineup.source, _digest(lineup), settings.device)
    before = machine_state.look_before(origin.load_average)
    with exclusive(output.folder, "latency"):
        return _Measurement(settings, output, origin).run(lineup, lengths, before)


def _digest(lineup: Lineup) -> str:
    """The fingerprint of the source, or of the converted folder that is measured without one."""
    from lowmem.checkpoint.source.open import open_source

    return open_source(lineup.source, offline=True).fingerprint()


@dataclass(frozen=True)
class _Measurement:
    settings: LatencySettings
    output: Output
    origin: Origin

    def run(self, lineup: Lineup, lengths: Lengths, before: Before) -> int:
        """Measure all rounds and write the record. Returns the exit code."""
        from lowmem.benchmarks.common.progress import make_progress
        from lowmem.benchmarks.latency.machine_state import swap_warning
        from lowmem.benchmarks.latency.summary import make_record

        progress, stopped = make_progress(self.output.quiet), False
        for warning in before.warnings:
            progress.note(warning)
        try:
            machine, probe = self._probe(lineup, progress)
            planned = self._plan(lineup, lengths, probe)
            for line in self._ceilings(planned, machine, probe):
                progress.note(line)
            rounds = self._rounds(planned, machine, progress)
            try:
                rounds.run()
                rounds.work.remove()
            except KeyboardInterrupt:
                stopped = True
        finally:
            progress.close()
        warnings = [*before.warnings, *lengths.notes, swap_warning(before)]
        if stopped:
            complete = f"{rounds.whole()} of {self.settings.rounds} rounds"
            note(f"stopped after {complete}; the same command resumes")
            if not rounds.whole():
                return INTERRUPTED
            warnings.append(f"interrupted after {complete}")
        record = make_record(self.origin, rounds, probe, [w for w in warnings if w])
        file = write_record(record, self.output.folder)
        if self.output.json:
            print_json(record)
        else:
            _print(record)
        if not self.output.quiet:
            note(f"wrote {file}")
        return INTERRUPTED if stopped else 0

    def _probe(self, lineup: Lineup, progress: Progress) -> tuple[TimingTask, Timings]:
        """Measure the machine alone, in a process of its own: the task, and what it found."""
        from lowmem.benchmarks.latency import rounds
        from lowmem.benchmarks.latency.planning import PlannedVersion, usual_dtype
        from lowmem.benchmarks.latency.roofline import SECONDS
        from lowmem.benchmarks.latency.tasks import Lengths, TimingTask

        versions = [PlannedVersion(entrant, Lengths((), (), 0), 0) for entrant in lineup.entrants]
        largest = max(one.own_bytes for one in versions)
        device, threads = self.settings.device, self.settings.threads
        task = TimingTask(device, usual_dtype(versions), largest, threads, SECONDS)
        found = rounds.run_task(task, lambda step: progress.update(0, 1, step))
        if isinstance(found, str):
            raise MemoryBudgetError(f"the machine's own rates could not be measured on {device}: {found}")
        return task, found

    def _plan(self, lineup: Lineup, lengths: Lengths, probe: Timings) -> list[PlannedVersion]:
        """What each version can run in the memory that it may use."""
        from lowmem.benchmarks.latency.planning import Budget, plan_version

        from lowmem.plan import device
        from lowmem.plan.memory import CUDA_CONTEXT, HOST_CONTEXT
        from lowmem.text.units import format_bytes

        cpu = self.settings.device == "cpu"
        if limit := self.settings.limit:
            option = "--ram" if cpu else "--vram"
            free, own = device.parse_bytes(limit, option), HOST_CONTEXT if cpu else CUDA_CONTEXT
            reason = f"{option} allows {format_bytes(free)}"
        else:
            free = device.host_memory_available() if cpu else probe.free_bytes
            own = HOST_CONTEXT if cpu else 0  # the card's own context is in use already
            reason = f"{format_bytes(free)} are free"
        support = device.kernel_support(None if cpu else self.settings.device)
        budget = Budget(self.settings.device, free, reason, own, support)
        return [plan_version(entrant, lengths, budget) for entrant in lineup.entrants]

    def _ceilings(self, planned: Sequence[PlannedVersion], machine: TimingTask, probe: Timings) -> list[str]:
        """What the machine allows, before anything is timed."""
        from lowmem.benchmarks.report.numbers import plural

        rates = probe.rates[0]
        first = (
            f"roofline: {rates.read / 1e9:.1f} GB/s of memory bandwidth, {rates.matmul / 1e9:,.0f} GFLOP/s "
            f"in {machine.dtype}, {plural(probe.threads, 'thread')}"
        )
        return [first, *(one.describe(rates) for one in planned)]

    def _rounds(self, planned: list[PlannedVersion], machine: TimingTask, progress: Progress) -> Rounds:
        from lowmem.benchmarks.common.work_file import WorkFile, digest_of
        from lowmem.benchmarks.latency import rounds
        from lowmem.benchmarks.latency.tasks import Timings

        tasks = {one.label: one.task(machine) for one in planned}
        key = {
            "versions": self.origin.versions,
            "machine": to_json(self.origin.machine),
            "digest": self.origin.source_digest,
            "tasks": {label: to_json(task) for label, task in tasks.items()},
            "files": {one.label: _files(one.entrant.candidate.path) for one in planned},
        }
        file = self.output.folder / rounds.WORK_FILE
        work = WorkFile(file, Timings, digest_of(key), rounds.KEPT_SECONDS)
        if self.output.fresh:
            work.remove()
        return rounds.Rounds(
            planned,
            self.settings.rounds,
            work,
            lambda one, step: rounds.run_task(tasks[one.label], step),
            progress,
        )


def _print(record: LatencyRecord) -> None:
    from lowmem.benchmarks.report.latency_sections import (
        batch_table,
        decode_table,
        memory_table,
        prefill_table,
        roofline_text,
    )
    from lowmem.benchmarks.report.terminal import print_tables

    tables = [prefill_table(record), decode_table(record), batch_table(record), memory_table(record)]
    notes = [roofline_text(record), *(f"! {warning}" for warning in record.warnings)]
    print_tables([table for table in tables if table.rows], notes)


def _files(path: Path) -> list[tuple[str, int, int]]:
    """(name, size, time) of a version's files, which change when it is converted again."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return [(name, found.st_size, found.st_mtime_ns) for name, found in stats]


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 128,1024") from None
