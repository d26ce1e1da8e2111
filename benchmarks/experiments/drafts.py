"""Draft models: how often drafts are right, and what that gains.

    python -m lowmem.benchmarks.experiments.drafts acceptance [--prompts 24] [--tokens 96]
    python -m lowmem.benchmarks.experiments.drafts speed [--work DIR] [--layers 4] [--rates 0,0.4,0.6,0.8]

`acceptance`: tiny-starchat answers held-out code and dialogues. At every token of its answers the
distribution is compared with that of its draft: how often the same noise gives the same token, and how often
rejection sampling would accept.

`speed`: a model of StarChat Alpha's dimensions with some of its 40 layers, and a draft of the dimensions of
bigcode/tiny_starcoder_py with as large a share of its 20. Weights are made up, 4 bits in groups of 128, so
acceptance is forced: the draft model computes, and each of its tokens is replaced by the right one with the
given probability. Without a draft and with one take turns; prompt lookup is off.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest import mock

import torch
from lowmem.benchmarks.experiments.common import say
from lowmem.benchmarks.experiments.data.draft import DRAFT, LARGE
from lowmem.benchmarks.experiments.pace.models import SMALL_VOCAB, make_ours, our_models
from lowmem.benchmarks.experiments.starchat.dimensions import Dimensions
from lowmem.benchmarks.experiments.starchat.random_weights import write_packed

from lowmem.config import SamplingParams
from lowmem.generate.draft_model import Ask, DraftModel
from lowmem.generate.engine import Engine
from lowmem.generate.lookup import Lookup
from lowmem.generate.sampling import distribution
from lowmem.loading.loader import LoadedModel, LoadOptions, load
from lowmem.models.dialogue import Message

PROMPT = 128
TEMPERATURES = (0.0, 0.2, 0.8)
STEPS = 192


def prompts(large: LoadedModel, count: int) -> dict[str, list[list[int]]]:
    """Token ids of held-out prompts by kind."""
    assert large.dialogue is not None
    code = large.tokenizer((LARGE / "heldout.txt").read_text("utf-8")).input_ids
    pairs = json.loads((LARGE / "dialogues_heldout.json").read_text("utf-8"))
    step = len(code) // count
    asked = [[Message("user", pair["prompt"])] for pair in pairs[:: len(pairs) // count][:count]]
    return {
        "code": [code[i * step : i * step + PROMPT] for i in range(count)],
        "dialogues": [large.dialogue.encode(large.tokenizer, turns, True) for turns in asked],
    }


def full(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution [vocab] that is sampled, in float64."""
    likely, ids = distribution(logits, params)
    whole = torch.zeros(logits.shape[-1], dtype=torch.float64)
    return whole.scatter(0, torch.arange(len(whole)) if ids is None else ids, likely.double())


def agreement(p: torch.Tensor, q: torch.Tensor) -> tuple[float, float, float]:
    """How often a draft is right whose distribution is q, for a model whose distribution is p.

    (With the same Gumbel noise, by rejection sampling, with the same point of both cumulative distributions.)
    The first is the sum over i of 1 / sum over j of max(p_j / p_i, q_j / q_i).
    """
    both, either = (p > 0) & (q > 0), (p > 0) | (q > 0)
    noise = 0.0
    for one, other in zip(p[both].tolist(), q[both].tolist(), strict=True):
        noise += 1 / float(torch.maximum(p[either] / one, q[either] / other).sum())
    p_end, q_end = p.cumsum(0), q.cumsum(0)
    point = torch.minimum(p_end, q_end) - torch.maximum(p_end - p, q_end - q)
    return noise, float(torch.minimum(p, q).sum()), float(point.clamp(min=0).sum())


@torch.inference_mode()
def acceptance(count: int, tokens: int) -> None:
    """Print a row for each kind of text and temperature."""
    large, small = (load(path, LoadOptions(dtype=torch.float32)) for path in (LARGE, DRAFT))
    engine = Engine(large.model, context=1024, stop_ids=large.stop_ids)
    names = ("text", "temperature", "same noise", "rejection sampling", "same point", "tokens")
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for kind, texts in prompts(large, count).items():
        for temperature in TEMPERATURES:
            rates: list[tuple[float, ...]] = []
            for seed, prompt in enumerate(texts):
                params = SamplingParams(temperature=temperature, seed=seed, max_new_tokens=tokens)
                answer = [token.id for token in engine.generate(prompt, params)]
                ids = torch.tensor([[*prompt, *answer]])
                first = len(prompt) - 1
                rows = [m.model(ids).logits[0, first:-1].float() for m in (large, small)]
                if temperature == 0:
                    rates += [(float(a.argmax() == b.argmax()),) * 3 for a, b in zip(*rows, strict=True)]
                else:
                    rates += [agreement(full(a, params), full(b, params)) for a, b in zip(*rows, strict=True)]
            means = " | ".join(f"{mean(part):.3f}" for part in zip(*rates, strict=True))
            print(f"| {kind} | {temperature:g} | {means} | {len(rates)} |", flush=True)


class Forced(DraftModel):
    """Computes its drafts, and proposes tokens that are right at a given rate instead."""

    truth: Sequence[int] = ()
    """The tokens of prompt and answer."""
    rate = 0.0

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """See `DraftModel`; the tokens that the draft reads are those that it proposes."""
        return super().propose([replace(ask, guess=self._forced(ask)) for ask in asks])

    def _forced(self, ask: Ask) -> Any:
        choice = random.Random(len(ask.ids))

        def guess(logits: torch.Tensor, ahead: int) -> int:
            ask.guess(logits, ahead)
            place = len(ask.ids) + ahead
            right = self.truth[place] if place < len(self.truth) else 1
            return right if choice.random() < self.rate else (right + 1) % SMALL_VOCAB

        return guess


def run(engine: Engine, prompt: list[int], params: SamplingParams) -> tuple[list[int], float]:
    """(the answer, tokens/s after the first one)."""
    tokens = engine.generate(prompt, params)
    ids = [next(tokens).id]
    started = time.perf_counter()
    ids += [token.id for token in tokens]
    return ids, (len(ids) - 1) / (time.perf_counter() - started)


def models(work: Path, layers: int) -> tuple[Any, Any]:
    """The large model, and the draft with as large a share of its layers."""
    (wanted,) = [m for m in our_models(work) if m.kind == "4-bit g128" and m.head == "small"]
    make_ours([wanted], work, layers)
    draft = work / f"draft-{layers}"
    if not (draft / "config.json").is_file():
        shape = Dimensions(max(1, layers // 2), n_embd=768, heads=12, vocab=SMALL_VOCAB)
        write_packed(draft, shape, 4, 128)
    options = LoadOptions(dtype=torch.bfloat16)
    return load(wanted.path, options).model, load(draft, options).model


def speed(work: Path, layers: int, rates: list[float], rounds: int) -> None:
    """Print a row for each rate: tokens/s with the draft in those without."""
    work.mkdir(parents=True, exist_ok=True)
    large, small = models(work, layers)
    plain = Engine(large, context=PROMPT + STEPS + 8)
    plain.repacking.finish()
    params = SamplingParams(temperature=1.0, top_k=50, top_p=1, max_new_tokens=STEPS)
    ratios: dict[float, list[float]] = {rate: [] for rate in rates}
    forecasts: dict[float, float] = {}
    for turn in range(rounds):
        prompt = random.Random(turn).choices(range(1, SMALL_VOCAB), k=PROMPT)
        settings = replace(params, seed=turn)
        run(plain, prompt, settings)
        for rate in rates:
            answer, alone = run(plain, prompt, settings)
            engine = Engine(large, context=PROMPT + STEPS + 8)
            draft = Forced(small, context=PROMPT + STEPS + 8, slots=1, vocabulary=SMALL_VOCAB)
            draft.truth, draft.rate = [*prompt, *answer], rate
            engine.drafting.model = draft
            again, drafted = run(engine, prompt, settings)
            if again != answer:
                raise RuntimeError("drafts have changed a token")
            ratios[rate].append(drafted / alone)
            sequence, pace = engine.sequence, engine.drafting.paces[1]
            assert sequence is not None
            lengths = range(1, 11)
            each = draft.step_seconds / pace.single
            forecasts[rate] = max(
                sum(rate**place for place in range(length + 1)) / (pace.cost(length) + length * each)
                for length in lengths
            )
            say(f"round {turn + 1}, acceptance {rate}: {alone:.2f} tokens/s, with drafts {drafted:.2f}; "
                f"{sequence.accepted_tokens} of {sequence.drafted_tokens} accepted; a draft's token costs "
                f"{each:.3f} steps, 2 rows {pace.cost(2) - 1:.2f}, 5 {pace.cost(5) - 1:.2f}")  # fmt: skip
    print("| acceptance | speed with the draft, of without | forecast |\n|---|---|---|")
    for rate, found in ratios.items():
        print(f"| {rate:g} | {median(found):.2f} ({min(found):.2f} to {max(found):.2f}) "
              f"| {max(1.0, forecasts[rate]):.2f} |")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("acceptance", "speed"))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lowmem-pace")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rates", default="0,0.4,0.6,0.8")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    if args.what == "acceptance":
        acceptance(args.prompts, args.tokens)
    else:
        rates = [float(rate) for rate in args.rates.split(",")]
        # A made-up model repeats itself, so that prompt lookup would draft everything.
        with mock.patch.object(Lookup, "draft", lambda self, ids, length: []):
            speed(args.work, args.layers, rates, args.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
