"""Prompt-lookup speculation on prompts whose answer repeats code, as an edit's does.

    python -m lowmem.benchmarks.experiments.pace.speculation MODEL [--prompts 8] [--tokens 128]

Each prompt is a piece of held-out Python followed by its first lines again: a small model continues to copy,
as a large one does when it edits a file. Each prompt is answered without and with drafts, in turns, and the
decode rates (from the first token to the last) are compared. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lowmem.benchmarks.demo import embedded_model

if TYPE_CHECKING:
    from lowmem.config import SamplingParams
    from lowmem.generate.engine import Engine

CODE_TOKENS, AGAIN_TOKENS = 300, 60
SPACING = 9000  # characters of held-out code from one prompt to the next


@dataclass(frozen=True)
class Answered:
    """One prompt. Rates are tokens a second after the first token."""

    rate: float
    rate_with_drafts: float
    tokens: int
    same_tokens: bool
    drafted: int
    accepted: int

    def __str__(self) -> str:
        return (
            f"{self.rate:7.1f} tokens/s, with drafts {self.rate_with_drafts:7.1f} "
            f"({self.rate_with_drafts / self.rate:.2f}x), {self.accepted} of {self.drafted} drafted tokens "
            f"accepted, {'same' if self.same_tokens else 'OTHER'} tokens"
        )


def decode(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> tuple[list[int], float]:
    """(the answer's tokens, tokens a second after the first)."""
    tokens = engine.generate(prompt, params)
    ids = [next(tokens).id]
    start = time.perf_counter()
    ids += [token.id for token in tokens]
    return ids, (len(ids) - 1) / max(time.perf_counter() - start, 1e-9)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each prompt, the median speed-up, and all figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(the loader's choice)")
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args(argv)

    import torch

    from lowmem.config import SamplingParams
    from lowmem.generate.engine import Engine
    from lowmem.loading.loader import LoadOptions, load
    from lowmem.models.positions import context_length

    loaded = load(args.model, LoadOptions(dtype=getattr(torch, args.dtype) if args.dtype else None))
    code = (embedded_model() / "heldout.txt").read_text(encoding="utf-8")
    context = min(context_length(loaded.model), CODE_TOKENS + AGAIN_TOKENS + args.tokens)
    plain = Engine(loaded.model, context=context, speculate=False)
    drafting = Engine(loaded.model, context=context)
    runs: list[Answered] = []
    for number in range(args.prompts):
        part = loaded.tokenizer(code[number * SPACING :][: 8 * CODE_TOKENS]).input_ids[:CODE_TOKENS]
        prompt = [*part, *part[:AGAIN_TOKENS]]
        params = SamplingParams(temperature=args.temperature, max_new_tokens=args.tokens, seed=number)
        if not number:  # the first steps of a process are slow
            decode(plain, prompt, params)
        expected, rate = decode(plain, prompt, params)
        ids, faster = decode(drafting, prompt, params)
        assert drafting.sequence is not None
        drafted, accepted = drafting.sequence.drafted_tokens, drafting.sequence.accepted_tokens
        runs.append(Answered(rate, faster, len(ids), ids == expected, drafted, accepted))
        print(f"prompt {number}: {runs[-1]}", flush=True)
    speed_up = statistics.median(run.rate_with_drafts / run.rate for run in runs)
    same = sum(run.same_tokens for run in runs)
    print(f"median {speed_up:.2f}x; the same tokens in {same} of {len(runs)} answers")
    figures = {
        "model": args.model,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "temperature": args.temperature,
        "speed_up": speed_up,
        "runs": [asdict(run) for run in runs],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
