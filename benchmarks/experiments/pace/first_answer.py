"""The first answer of a model that has just been loaded, by how long its user took to ask.

    python -m lowmem.benchmarks.experiments.pace.first_answer --work DIR [--layers 40] [--waits 0,2,5,10] [--tokens 32] [--rounds 3]

Packed weights are put into the order that is read fastest while somebody types, or between the first tokens
of an answer that is wanted at once. Here a 4-bit model of StarChat Alpha's dimensions with random weights
(8.6 GB with 40 layers, written to DIR if it is not there) is loaded anew for each answer, and asked after so
many seconds; the waits take turns, round by round. A line a wait: time to the first token of a prompt of 18,
and the tokens a second after it. `--json FILE` writes the record, `--show FILE` prints one.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from lowmem.benchmarks.common import record_file
from lowmem.benchmarks.common.records import Origin
from lowmem.benchmarks.experiments.pace.models import make_ours, our_models

PROMPT = tuple(range(100, 118))


@dataclass(frozen=True)
class Answer:
    """Seconds waited after the load, time to the first token from then on, and tokens a second after it."""

    waited: float
    ttft: float
    rate: float


@dataclass(frozen=True)
class FirstAnswers:
    """tokens: of each answer. answers: in the order in which they were given."""

    origin: Origin
    threads: int
    layers: int
    tokens: int
    answers: tuple[Answer, ...]


def ask(folder: Path, wait: float, tokens: int) -> Answer:
    """Load, wait, ask."""
    from lowmem.config import SamplingParams
    from lowmem.loading.loader import load
    from lowmem.session import Session

    engine = Session(load(folder, context=512), context=512).engine
    engine.stop_ids = frozenset()
    with engine.repacking.in_background():
        time.sleep(wait)
    asked = time.perf_counter()
    answer = engine.generate(PROMPT, SamplingParams(max_new_tokens=tokens, temperature=0))
    next(answer)
    first = time.perf_counter()
    count = sum(1 for _ in answer)
    return Answer(wait, first - asked, count / (time.perf_counter() - first))


def show(record: FirstAnswers) -> None:
    """Print a line a wait: medians, and the lowest and highest round."""
    machine, versions = record.origin.machine, dict(record.origin.versions)
    print(
        f"{machine.cpu}, {record.threads} threads, torch {versions['torch']}, {record.origin.date[:10]}; "
        f"{record.layers} layers; load average before {record.origin.load_average}"
    )
    for wait in sorted({answer.waited for answer in record.answers}):
        found = [answer for answer in record.answers if answer.waited == wait]
        ttfts, rates = [a.ttft for a in found], [a.rate for a in found]
        print(
            f"asked after {wait:g} s: "
            f"first token after {median(ttfts):.2f} s ({min(ttfts):.2f} to {max(ttfts):.2f}), then "
            f"{median(rates):.2f} tokens/s over {record.tokens - 1} ({min(rates):.2f} to {max(rates):.2f})"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("first-answer"))
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--waits", default="0,2,5,10", help="seconds, with commas (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--show", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.show:
        show(record_file.read(FirstAnswers, args.show, "lowmem.benchmarks.experiments.pace.first_answer"))
        return 0
    import torch
    from lowmem.benchmarks.common.origin import origin_of
    from lowmem.benchmarks.experiments.peers.command import typed_command

    origin = dataclasses.replace(
        origin_of((), f"StarChat Alpha's dimensions, {args.layers} layers, made-up weights", ""),
        command=typed_command(
            "lowmem.benchmarks.experiments.pace.first_answer", sys.argv[1:] if argv is None else argv
        ),
    )
    model = next(m for m in our_models(args.work) if m.kind == "4-bit g128" and m.head == "16-bit")
    make_ours([model], args.work, args.layers, lambda line: print(line, file=sys.stderr))
    waits = [float(wait) for wait in args.waits.split(",")]
    ask(model.path, 0, 2)  # the first of a process takes what no later one does
    answers = []
    for number in range(args.rounds):
        for wait in waits:
            answers.append(ask(model.path, wait, args.tokens))
            print(f"round {number + 1}: {answers[-1]}", file=sys.stderr)
    record = FirstAnswers(origin, torch.get_num_threads(), args.layers, args.tokens, tuple(answers))
    if args.json:
        record_file.write(record, args.json)
    show(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
