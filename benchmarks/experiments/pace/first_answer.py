"""The first answer of a model that has just been loaded, by how long its user took to ask.

    python -m lowmem.benchmarks.experiments.pace.first_answer [--waits 0,2,5,10] [--rounds 3]

lowmem repacks weights while the user types, or between the first tokens of an answer that is wanted at once.
A 4-bit model of StarChat Alpha's dimensions with random weights (8.6 GB with 40 layers, written to --work if
it is not there) is loaded anew for each answer and asked after a wait; the waits take turns, round by round.
Each line shows a wait, the time to the first token of a prompt of 18 tokens, and tokens a second after it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowmem.benchmarks.common.records import Origin
from lowmem.benchmarks.experiments.common import RESULTS, Experiment, made_with, origin_here, say, spread
from lowmem.benchmarks.experiments.pace.models import make_ours, our_models

PROMPT = tuple(range(100, 118))


@dataclass(frozen=True)
class Answer:
    """One load and its first answer."""

    waited: float
    """Seconds from the load to the question."""
    ttft: float
    """Seconds from the question to the first token."""
    rate: float
    """Tokens a second after it."""


@dataclass(frozen=True)
class FirstAnswers:
    """`first_answer.json`."""

    origin: Origin
    threads: int
    layers: int
    tokens: int
    """Of each answer."""
    answers: tuple[Answer, ...]
    """In the order in which they were given."""


def ask(folder: Path, wait: float, tokens: int) -> Answer:
    """Load, wait, ask."""
    from lowmem.config import SamplingParams
    from lowmem.loading.loader import LoadOptions, load
    from lowmem.session import Session

    engine = Session(load(folder, LoadOptions(context=512)), context=512).engine
    engine.stop_ids = frozenset()
    with engine.repacking.in_background():
        time.sleep(wait)
    asked = time.perf_counter()
    answer = engine.generate(PROMPT, SamplingParams(max_new_tokens=tokens, temperature=0))
    next(answer)
    first = time.perf_counter()
    count = sum(1 for _ in answer)
    return Answer(wait, first - asked, count / (time.perf_counter() - first))


def render(record: FirstAnswers) -> str:
    """A line for each wait: the median of the rounds, and the extremes."""
    lines = [f"{made_with(record.origin)} {record.threads} threads, {record.layers} layers."]
    for wait in sorted({answer.waited for answer in record.answers}):
        found = [answer for answer in record.answers if answer.waited == wait]
        lines.append(
            f"asked after {wait:g} s: first token after {spread([a.ttft for a in found])} s, then "
            f"{spread([a.rate for a in found])} tokens/s over {record.tokens - 1}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    experiment = Experiment("pace.first_answer", FirstAnswers, RESULTS / "first_answer.json", render)
    parser = experiment.parser(__doc__)
    parser.add_argument("--work", type=Path, default=Path("first-answer"), help="where the model is kept")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--waits", default="0,2,5,10", help="seconds (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)

    def measure() -> FirstAnswers:
        import torch

        name = f"StarChat Alpha's dimensions, {args.layers} layers, made-up weights"
        origin = origin_here("pace.first_answer", words, name)
        model = next(m for m in our_models(args.work) if (m.kind, m.head) == ("4-bit g128", "16-bit"))
        make_ours([model], args.work, args.layers)
        ask(model.path, 0, 2)  # the first load of a process is slower
        answers = []
        for number in range(args.rounds):
            for wait in map(float, args.waits.split(",")):
                answers.append(ask(model.path, wait, args.tokens))
                say(f"round {number + 1}: {answers[-1]}")
        return FirstAnswers(origin, torch.get_num_threads(), args.layers, args.tokens, tuple(answers))

    return experiment.run(args, measure)


if __name__ == "__main__":
    sys.exit(main())
