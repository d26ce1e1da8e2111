"""`lowmem bench humaneval`: pass@1 of every version of a model. Its answers run in a sandbox."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lowmem.benchmarks.common.lineup import Entrant, add_lineup_arguments, line_up, lineup_of
from lowmem.benchmarks.common.output import add_output_arguments, exclusive, output_of, print_json
from lowmem.benchmarks.common.records import HumanEvalRecord, SubjectHumanEval

from lowmem.cards.find import DEVICES
from lowmem.commands.answering import INTERRUPTED, note
from lowmem.errors import InvalidRequestError

if TYPE_CHECKING:
    from lowmem.benchmarks.humaneval.measure import Evaluation

    from lowmem.session import Session

DESCRIPTION = """Every version of a model answers HumanEval's 164 problems: pass@1. The answers are unreviewed
programs. Each runs in a sandbox: no network, no other processes, files only in a temporary
folder, limited time and memory (Linux with Landlock and seccomp). A model with a chat template writes
the whole function; any other continues the prompt. The same command resumes an interrupted measurement."""
CONTEXT = 2048
"""Tokens of prompt and answer: the longest prompt has about 600 tokens, an answer 512."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem bench humaneval`."""
    parser.description = DESCRIPTION
    add_lineup_arguments(parser)
    parser.add_argument(
        "--allow-code-execution", action="store_true", help="run the model's answers in a sandbox (required)"
    )
    what = parser.add_argument_group("problems")
    what.add_argument("--limit", type=int, metavar="N", help="only the first N problems")
    what.add_argument(
        "--task", action="append", default=[], metavar="ID", help="only HumanEval/ID; may be repeated"
    )
    how = parser.add_argument_group("how they are answered")
    how.add_argument(
        "--prompting",
        choices=("auto", "chat", "plain"),
        default="auto",
        help="chat: ask for the function; plain: continue the prompt (default: chat if "
        "the model has a template)",
    )
    how.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: %(default)s)"
    )
    how.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="when sampling (default: %(default)s)"
    )
    how.add_argument(
        "--samples", type=int, default=1, metavar="N", help="answers to each problem (default: %(default)s)"
    )
    how.add_argument("--seed", type=int, default=0, metavar="N", help="when sampling (default: %(default)s)")
    how.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default: %(default)s)"
    )
    how.add_argument("--device", default="auto", help=f"{DEVICES} (default: %(default)s)")
    add_output_arguments(parser, HumanEvalRecord)


def run(args: argparse.Namespace) -> int:
    """Measure, write `humaneval.json` and print it.

    Returns exit code 0, or 130 after Ctrl-C; finished attempts are kept.
    """
    if not args.allow_code_execution:
        raise InvalidRequestError(
            "HumanEval runs model-written programs on this machine. They run in a sandbox and cannot use the "
            "network, start processes or access your files",
            "To allow that, add --allow-code-execution",
        )
    from lowmem.benchmarks.common.origin import origin_of
    from lowmem.benchmarks.common.progress import make_progress
    from lowmem.benchmarks.common.record_file import write_record
    from lowmem.benchmarks.humaneval.measure import WORK_FILE, Evaluation, Settings, load_problems
    from lowmem.benchmarks.humaneval.sandbox import require
    from lowmem.benchmarks.report.quality_sections import humaneval_table
    from lowmem.benchmarks.report.terminal import print_tables

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
    card, output = find_card(args.device), output_of(args)
    device = str(card or "cpu")
    lineup = line_up(lineup_of(args, cuda=card is not None))
    digest = open_source(lineup.source, offline=True).fingerprint()
    origin = origin_of(sys.argv[1:], lineup.source, digest, device)
    with exclusive(output.folder, "humaneval"):
        file, progress = output.folder / WORK_FILE, make_progress(output.quiet)
        if output.fresh:
            file.unlink(missing_ok=True)
        progress.note(f"generated code runs in a sandbox: {walls.describe()}")
        evaluation = Evaluation(problems, settings, file, progress=progress)
        try:
            subjects = [_Version(entrant, device, evaluation).measure() for entrant in lineup.entrants]
        except KeyboardInterrupt:
            progress.close()
            note("stopped; finished attempts are kept, and the same command resumes")
            return INTERRUPTED
        finally:
            progress.close()
        record = HumanEvalRecord(origin, tuple(subjects))
        written = write_record(record, output.folder)
    if output.json:
        print_json(record)
    else:
        where = f"wrote {written}; make a page of it with: lowmem bench report"
        print_tables([humaneval_table(record)], [settings.describe(), where])
    return 0


@dataclass
class _Version:
    """One version while it is measured."""

    entrant: Entrant
    device: str
    evaluation: Evaluation
    kernel: str = ""

    def measure(self) -> SubjectHumanEval:
        from lowmem.benchmarks.common.currency import made_with

        from lowmem.checkpoint.source.open import open_source

        subject, path = self.entrant.subject, self.entrant.candidate.path
        work = self.evaluation.work(subject, str(open_source(path, offline=True).fingerprint()), self.device)
        found = self.evaluation.measure(subject, work, self.open_session)
        return replace(found, subject=replace(subject, made_with=made_with(path, self.kernel)))

    def open_session(self) -> Session:
        """Plan and load the version. Raises MemoryBudgetError if it does not fit in memory."""
        from lowmem.loading.opening import open_model
        from lowmem.plan.planner import usual_slots
        from lowmem.plan.request import ModelRequest
        from lowmem.session import Session

        candidate, label = self.entrant.candidate, self.entrant.subject.label
        request = ModelRequest(
            model=str(candidate.path),
            context=min(CONTEXT, candidate.shape.positions or CONTEXT),
            method=candidate.form.method,
            device=self.device,
            dtype=candidate.form.dtype,
            head_bits=candidate.form.head_bits,
        )

        def loading(done: int, count: int) -> None:
            self.evaluation.progress.update(done, count, f"{label}: loading")

        loaded = open_model(request, progress=loading)
        self.kernel = loaded.kernel
        return Session(loaded, slots=usual_slots(loaded.plan) if loaded.plan else 1)
