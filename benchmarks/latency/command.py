"""`lowmem bench latency`: load, prefill and decode of every form, beside what the machine allows."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.benchmarks.common.lineup import Lineup, add_lineup_arguments
from lowmem.benchmarks.common.record_file import FOLDER

from lowmem.commands.answering import INTERRUPTED, note
from lowmem.commands.plan_options import DTYPES
from lowmem.errors import InvalidRequestError, MemoryBudgetError

if TYPE_CHECKING:
    from lowmem.benchmarks.common.records import Origin
    from lowmem.benchmarks.latency.machine_state import Before
    from lowmem.benchmarks.latency.measure import Entry, Lengths
    from lowmem.benchmarks.latency.rounds import Found, Watcher
    from lowmem.benchmarks.latency.worker import Visit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem bench latency`."""
    add_lineup_arguments(parser)
    what = parser.add_argument_group("what is timed")
    what.add_argument(
        "--prompts", type=_numbers, metavar="LIST", help="tokens of a prompt to be read (32,128,512,2048)"
    )
    what.add_argument(
        "--contexts",
        type=_numbers,
        metavar="LIST",
        help="tokens before those that are decoded (128,1024,4096)",
    )
    what.add_argument(
        "--new-tokens", type=int, default=64, metavar="N", help="decode so many at each context (%(default)s)"
    )
    what.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="measure every form so many times (%(default)s)"
    )
    what.add_argument("--threads", type=int, default=0, metavar="N", help="of the CPU (as torch chooses)")
    where = parser.add_argument_group("where")
    where.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    where.add_argument("--dtype", choices=DTYPES, default="auto", help="of the activations (%(default)s)")
    where.add_argument("--ram", metavar="SIZE", help="the most of the host's memory that a form may need")
    where.add_argument("--vram", metavar="SIZE", help="the most of the card's memory that a form may need")
    parser.add_argument("--fresh", action="store_true", help="forget what an interrupted run has measured")
    parser.add_argument("--out", type=Path, default=Path(FOLDER), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the record")
    parser.add_argument("--quiet", action="store_true", help="say nothing while it runs")


def run(args: argparse.Namespace) -> int:
    """Measure, write `latency.json` and show it; 130 after Ctrl-C, with the record of the whole rounds."""
    from lowmem.benchmarks.common.origin import origin_of
    from lowmem.benchmarks.common.output import exclusive
    from lowmem.benchmarks.latency.machine_state import look_before
    from lowmem.benchmarks.latency.measure import choose_lengths

    device = _device(args)
    lineup = _line_up(args, cuda=device != "cpu")
    positions = lineup.entrants[0].candidate.shape.positions
    lengths = choose_lengths(args.prompts, args.contexts, args.new_tokens, positions)
    origin = origin_of(sys.argv[1:], lineup.source, _digest(lineup), device)
    before = look_before(origin.load_average)
    with exclusive(args.out, "latency"):
        return _record(args, lineup, lengths, origin, device, before)


def _record(
    args: argparse.Namespace, lineup: Lineup, lengths: Lengths, origin: Origin, device: str, before: Before
) -> int:
    """All rounds, into the record; the exit code."""
    from lowmem.benchmarks.common.record_file import to_json, write_record
    from lowmem.benchmarks.latency.machine_state import swap_warning
    from lowmem.benchmarks.latency.measure import make_record
    from lowmem.benchmarks.latency.rounds import Found
    from lowmem.benchmarks.latency.view import make_watcher, print_record

    found, watcher = Found(), make_watcher(quiet=args.quiet)
    for warning in before.warnings:
        watcher.line(warning)
    try:
        entries, probe = _plan(args, lineup, lengths, device, watcher)
        stopped = _measure(args, entries, origin, device, watcher, found)
    finally:
        watcher.close()
    warnings = [*before.warnings, *lengths.notes, swap_warning(before)]
    if stopped:
        done = found.whole_rounds()
        note(f"stopped with {done} of {args.rounds} rounds whole; the same command goes on from here")
        if not done:
            return INTERRUPTED
        warnings.append(f"Interrupted: {done} of {args.rounds} rounds were measured")
    record = make_record(origin, entries, found.whole(), found.failures, probe, [w for w in warnings if w])
    file = write_record(record, args.out)
    if args.json:
        print(json.dumps(to_json(record)))
    else:
        print_record(record)
    if not args.quiet:
        note(f"wrote {file}")
    return INTERRUPTED if stopped else 0


def _device(args: argparse.Namespace) -> str:
    """What runs, as torch names it; InvalidRequestError for options that do not go with it."""
    from lowmem.plan.request import find_card

    if args.rounds < 1 or args.threads < 0:
        raise InvalidRequestError("--rounds and --threads are counts", "Give 1 or more")
    card = find_card(args.device)
    if card is None and args.vram:
        raise InvalidRequestError("there is no card here for --vram to be of", "Use --ram SIZE on the CPU")
    if card is not None and args.ram:
        raise InvalidRequestError(f"everything runs on {card}, and --ram is not of it", "Use --vram SIZE")
    return "cpu" if card is None else str(card)


def _line_up(args: argparse.Namespace, *, cuda: bool) -> Lineup:
    """Times need no reference: GPTQ folders whose source is gone are measured alone."""
    from lowmem.benchmarks.common.lineup import line_up

    return line_up(
        args.models,
        reference=args.reference,
        forms=args.forms,
        dtype=None if args.dtype == "auto" else args.dtype,
        cuda=cuda,
        reference_needed=False,
    )


def _digest(lineup: Lineup) -> str:
    """The fingerprint of the source, or of the converted folder that runs without one."""
    from lowmem.checkpoint.files.shards import read_shards
    from lowmem.checkpoint.source.open import open_source
    from lowmem.checkpoint.source.safetensors import SafetensorsSource

    candidate = lineup.entrants[0].candidate
    if candidate.form.method == "gptq" and str(candidate.path) == lineup.source:
        tensors = read_shards(candidate.path).tensors
        return SafetensorsSource(candidate.path, lineup.source, tensors).fingerprint()
    return open_source(lineup.source, offline=True).fingerprint()


def _plan(
    args: argparse.Namespace, lineup: Lineup, lengths: Lengths, device: str, watcher: Watcher
) -> tuple[list[Entry], Visit]:
    """Look at the machine first, in a process of its own: what each form may take, and its ceilings."""
    from lowmem.benchmarks.latency.measure import Entry, Place, enter, probe_dtype
    from lowmem.benchmarks.latency.roofline import SECONDS
    from lowmem.benchmarks.latency.rounds import run_job
    from lowmem.benchmarks.latency.view import ceiling_lines
    from lowmem.benchmarks.latency.worker import Job

    from lowmem.plan import device as machine
    from lowmem.plan.memory import CUDA_CONTEXT, HOST_CONTEXT
    from lowmem.text.units import format_bytes

    entries = [Entry(entrant, lengths, 0) for entrant in lineup.entrants]
    dtype = probe_dtype(entries)
    watcher.began("the machine alone", 0, 1, None)
    largest = max(entry.own_bytes for entry in entries)
    probe = run_job(Job("", "", dtype, device, 0, (), (), 0, largest, SECONDS), args.threads, watcher.step)
    if isinstance(probe, str):
        raise MemoryBudgetError(f"not even the machine's own rates could be measured on {device}: {probe}")
    if limit := args.vram or args.ram:
        free = machine.parse_bytes(limit, "--vram" if args.vram else "--ram")
        said = f"{'--vram' if args.vram else '--ram'} allows {format_bytes(free)}"
        own = CUDA_CONTEXT if args.vram else HOST_CONTEXT
    else:
        free = machine.host_memory_available() if device == "cpu" else probe.free_bytes
        said = f"{format_bytes(free)} are free"
        own = HOST_CONTEXT if device == "cpu" else 0  # a card's own context has been taken off already
    place = Place(device, free, said, own, machine.packs_nf4())
    entries = [enter(entrant, lengths, place) for entrant in lineup.entrants]
    for line in ceiling_lines(entries, probe, dtype):
        watcher.line(line)
    return entries, probe


def _measure(
    args: argparse.Namespace,
    entries: list[Entry],
    origin: Origin,
    device: str,
    watcher: Watcher,
    found: Found,
) -> bool:
    """All rounds; whether Ctrl-C ended them early."""
    from lowmem.benchmarks.common.record_file import to_json
    from lowmem.benchmarks.latency.roofline import SECONDS
    from lowmem.benchmarks.latency.rounds import WORK_FILE, WorkFile, job_of, run_job, run_rounds

    jobs = {entry.label: job_of(entry, device, SECONDS) for entry in entries}
    key = {
        "versions": origin.versions,
        "machine": to_json(origin.machine),
        "digest": origin.source_digest,
        "jobs": {label: to_json(job) for label, job in jobs.items()},
        "files": {entry.label: _files(entry.entrant.candidate.path) for entry in entries},
        "threads": args.threads,
    }
    work = WorkFile(args.out / WORK_FILE, key)
    try:
        run_rounds(
            entries,
            args.rounds,
            work,
            lambda entry, step: run_job(jobs[entry.label], args.threads, step),
            watcher,
            found,
            fresh=args.fresh,
        )
    except KeyboardInterrupt:
        return True
    work.remove()
    return False


def _files(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a form's files: what shows that it was converted anew."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return [(name, found.st_size, found.st_mtime_ns) for name, found in stats]


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 128,1024") from None
