"""`lowmem bench humaneval`: pass@1 of every form of a model, its answers run in a sandbox."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.benchmarks.common.lineup import add_lineup_arguments, line_up
from lowmem.benchmarks.common.record_file import FOLDER, to_json

from lowmem.commands.answering import INTERRUPTED, note
from lowmem.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lowmem.benchmarks.common.lineup import Entrant
    from lowmem.benchmarks.common.records import Attempt, HumanEvalRecord, Origin
    from lowmem.benchmarks.humaneval.measure import Listener, Problem, Settings

    from lowmem.session import Session

DESCRIPTION = """HumanEval's 164 problems, answered by every form of a model: pass@1. The answers are programs
that nobody has read, and they are run, each locked in: no network, no other process, files only in a
temporary folder, limits of time and memory (Linux with Landlock and seccomp). A model with a dialogue is
asked in words for the whole function; any other continues the prompt. An interrupted measurement goes on
where it was when the same is typed again."""
CONTEXT = 2048
"""Tokens of prompt and answer: the longest prompt has about 600 in any vocabulary, an answer 512."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem bench humaneval`."""
    parser.description = DESCRIPTION
    add_lineup_arguments(parser)
    parser.add_argument(
        "--allow-code-execution", action="store_true", help="run what the model writes, locked in (required)"
    )
    what = parser.add_argument_group("what is asked")
    what.add_argument("--limit", type=int, metavar="N", help="only the first N problems")
    what.add_argument(
        "--task", action="append", default=[], metavar="ID", help="only this, as HumanEval/7; may be repeated"
    )
    how = parser.add_argument_group("how it is answered")
    how.add_argument(
        "--prompting",
        choices=("auto", "chat", "plain"),
        default="auto",
        help="chat: ask for the function; plain: continue the prompt (chat where the model has a template)",
    )
    how.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (%(default)s)")
    how.add_argument("--top-p", type=float, default=0.95, metavar="P", help="when sampling (%(default)s)")
    how.add_argument("--samples", type=int, default=1, metavar="N", help="of each problem (%(default)s)")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="when sampling (%(default)s)")
    how.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (%(default)s)"
    )
    how.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget the attempts of earlier runs")
    parser.add_argument(
        "--out", default=FOLDER, metavar="DIR", help="where humaneval.json is written (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the record instead of the table")
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")


def run(args: argparse.Namespace) -> int:
    """Measure, write `humaneval.json` and show it; 130 after Ctrl-C, which keeps the attempts made so far."""
    if not args.allow_code_execution:
        raise InvalidRequestError(
            "HumanEval runs what the model writes on this machine: locked in without network, processes or "
            "files of yours, but it is run",
            "If that is what you want, add --allow-code-execution",
        )
    from lowmem.benchmarks.common.origin import origin_of
    from lowmem.benchmarks.common.output import exclusive
    from lowmem.benchmarks.humaneval.measure import Settings, load_problems
    from lowmem.benchmarks.humaneval.sandbox import require

    from lowmem.checkpoint.source.open import open_source
    from lowmem.config import check_sampling
    from lowmem.plan.request import find_card

    walls = require()
    settings = Settings(
        samples=args.samples,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        prompting=args.prompting,
    )
    check_sampling(settings.params())
    problems = load_problems(args.limit, args.task)
    card = find_card(args.device)
    device = str(card or "cpu")
    lineup = line_up(args.models, reference=args.reference, forms=args.forms, cuda=card is not None)
    digest = open_source(lineup.source, offline=True).fingerprint()
    origin = origin_of(sys.argv[1:], lineup.source, digest, device)
    with exclusive(Path(args.out).expanduser(), "humaneval"):
        listener = _listener(args.quiet)
        listener.note(f"generated code is run behind {walls.describe()}")
        return _record(args, lineup.entrants, problems, settings, device, origin, listener)


def _record(
    args: argparse.Namespace,
    entrants: Sequence[Entrant],
    problems: list[Problem],
    settings: Settings,
    device: str,
    origin: Origin,
    listener: Listener,
) -> int:
    """All attempts, into the record; the exit code."""
    from lowmem.benchmarks.common.record_file import write_record
    from lowmem.benchmarks.common.records import HumanEvalRecord
    from lowmem.benchmarks.humaneval.measure import WORK_FILE, WorkFile, key_of, measure_subject
    from lowmem.benchmarks.humaneval.sandbox import Limits

    from lowmem.streaming.dense_source import open_any

    out, limits = Path(args.out).expanduser(), Limits()
    work = WorkFile(out / WORK_FILE)
    if args.fresh:
        work.remove()
    subjects = []
    try:
        for entrant in entrants:
            own = open_any(entrant.candidate.path).fingerprint()
            subjects.append(
                measure_subject(
                    entrant.subject,
                    problems,
                    settings,
                    open_session=_opener(entrant, device, listener),
                    work=work,
                    key=key_of(entrant.subject, own, device, settings, limits),
                    limits=limits,
                    listener=listener,
                )
            )
    except KeyboardInterrupt:
        listener.close()
        note("stopped; what was attempted is kept, and the same command goes on from here")
        return INTERRUPTED
    finally:
        listener.close()
    record = HumanEvalRecord(origin, tuple(subjects))
    file = write_record(record, out)
    if args.json:
        print(json.dumps(to_json(record), indent=1))
    else:
        show(record, settings)
        print(f"written to {file}; a page of it: lowmem bench report")
    return 0


def _opener(entrant: Entrant, device: str, listener: Listener) -> Callable[[], Session]:
    """What loads a form when it is needed: planned, so that what does not fit is refused in one line."""

    def open_session() -> Session:
        from lowmem.loading.opening import open_model
        from lowmem.plan.request import ModelRequest
        from lowmem.session import Session

        candidate = entrant.candidate
        request = ModelRequest(
            model=str(candidate.path),
            context=min(CONTEXT, candidate.shape.positions or CONTEXT),
            method=candidate.form.method,
            device=device,
            dtype=candidate.form.dtype,
        )
        label = entrant.subject.label
        return Session(open_model(request, progress=lambda done, count: listener.loading(label, done, count)))

    return open_session


# --- what is shown -----------------------------------------------------------------------------------------

COLUMNS = ("form", "bits", "pass@1 ± se", "passed", "failed", "stopped", "s each")


def show(record: HumanEvalRecord, settings: Settings) -> None:
    """The record as a table, on stdout."""
    from rich.console import Console
    from rich.table import Table

    first = record.subjects[0]
    how = (
        "greedy" if first.temperature == 0 else f"{first.samples} samples, temperature {first.temperature:g}"
    )
    table = Table(title=f"HumanEval: {first.problems} problems, {how}", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "form" else "right", no_wrap=True)
    for one in record.subjects:
        counts = {kind: sum(a.outcome == kind for a in one.attempts) for kind in ("passed", "failed")}
        table.add_row(
            one.subject.label,
            f"{one.subject.bits_per_weight:.2f}",
            f"{one.pass_at_1:.1%} ± {one.standard_error:.1%}",
            *map(str, counts.values()),
            str(len(one.attempts) - sum(counts.values())),  # out of time or memory
            f"{one.seconds / max(1, len(one.attempts)):.1f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    console.print(f"asked: {settings.describe()}", highlight=False)
    console.print("stopped: out of time or memory")


def _listener(quiet: bool) -> Listener:
    """A bar at a terminal, lines elsewhere, nothing with --quiet."""
    from lowmem.benchmarks.humaneval.measure import Listener

    if quiet:
        return Listener()
    return _bar() if sys.stderr.isatty() else _lines()


def _began(label: str, done: int, count: int) -> str:
    return f"{label}: {count} attempts" + (f", {done} of them from an earlier run" if done else "")


def _lines() -> Listener:
    from lowmem.benchmarks.humaneval.measure import Listener

    class Lines(Listener):
        """A line an attempt."""

        def began(self, label: str, done: int, count: int) -> None:
            note(_began(label, done, count))

        def attempted(self, label: str, attempt: Attempt, done: int, passed: int, count: int) -> None:
            why = f": {attempt.detail}" if attempt.detail else ""
            note(f"{label} {done}/{count} {attempt.task} {attempt.outcome}{why} ({passed} passed)")

        def note(self, line: str) -> None:
            note(line)

    return Lines()


def _bar() -> Listener:
    from lowmem.benchmarks.humaneval.measure import Listener
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[passed]} passed"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    progress = Progress(*columns, console=Console(stderr=True), transient=True)

    class Bar(Listener):
        """A bar a form."""

        def __init__(self) -> None:
            self.task = progress.add_task("", total=None, passed=0)
            progress.start()

        def began(self, label: str, done: int, count: int) -> None:
            self.note(_began(label, done, count))
            progress.reset(self.task, description=label, total=count, completed=done, passed=0)

        def loading(self, label: str, done: int, count: int) -> None:
            read = f"{label}: loading {done / max(1, count):.0%}"
            progress.update(self.task, description=read if done < count else label)

        def attempted(self, label: str, attempt: Attempt, done: int, passed: int, count: int) -> None:
            progress.update(self.task, description=label, completed=done, passed=passed)

        def note(self, line: str) -> None:
            progress.console.print(line, style="dim", markup=False, highlight=False)

        def close(self) -> None:
            progress.stop()

    return Bar()
