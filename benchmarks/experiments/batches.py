"""Several sequences in a step: tokens/s of all together, and how long a request waits beside a long prompt.

    python -m lowmem.benchmarks.experiments.batches [--work DIR] [--layers 4] [--rounds 5]

The model has StarChat Alpha's dimensions, four layers of made-up weights at 4 bits and a small head. Numbers
of sequences are measured in turns, so that a ratio compares the same minute.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from lowmem.benchmarks.experiments.common import say
from lowmem.benchmarks.experiments.pace.models import SMALL_VOCAB, make_ours, our_models

from lowmem.config import SamplingParams
from lowmem.generate.engine import Engine
from lowmem.loading.loader import LoadOptions, load

KIND = "4-bit g128"
TOGETHER = (1, 2, 4, 8)
PROMPT, STEPS, LONG = 256, 16, 4000


def decode_rate(engine: Engine, count: int) -> float:
    """Tokens/s of `count` sequences together, prompts not counted."""
    greedy = SamplingParams(temperature=0, max_new_tokens=STEPS + 8)
    choice = random.Random(count)
    running = [engine.start(choice.choices(range(1, SMALL_VOCAB), k=PROMPT), greedy) for _ in range(count)]
    while any(sequence.new_tokens < 1 for sequence in running):
        engine.advance()
    for sequence in running:
        sequence.tokens.clear()
    started, before = time.perf_counter(), sum(sequence.new_tokens for sequence in running)
    for _ in range(STEPS):
        engine.advance()
        for sequence in running:
            sequence.tokens.clear()
    seconds = time.perf_counter() - started
    tokens = sum(sequence.new_tokens for sequence in running) - before
    for sequence in running:
        engine.end(sequence)
    return tokens / seconds


def first_token(engine: Engine, beside: bool) -> float:
    """Seconds to the first token of a prompt of 32 tokens, alone or while one of LONG tokens is read.

    It comes when a part of the long prompt has just begun, so that this part is waited for.
    """
    greedy = SamplingParams(temperature=0, max_new_tokens=4)
    engine.reset()
    choice = random.Random(7)
    long = None
    if beside:
        long = engine.start(choice.choices(range(1, SMALL_VOCAB), k=LONG), greedy)
        for _ in range(3):
            engine.advance()
    started = time.perf_counter()
    engine.advance()
    short = engine.start(choice.choices(range(1, SMALL_VOCAB), k=32), greedy)
    while not short.tokens:
        engine.advance()
    seconds = time.perf_counter() - started
    if long is not None and not long.reads:
        raise RuntimeError("the long prompt was read too soon")
    engine.reset()
    return seconds


def main(argv: list[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lowmem-pace")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    wanted = [m for m in our_models(args.work) if m.kind == KIND and m.head == "small"]
    make_ours(wanted, args.work, args.layers)
    model = load(wanted[0].path, LoadOptions(dtype=torch.bfloat16)).model
    engine = Engine(model, context=LONG + 64, slots=max(TOGETHER), speculate=False)
    engine.repacking.finish()
    rates: dict[int, list[float]] = {count: [] for count in TOGETHER}
    waits: dict[bool, list[float]] = {False: [], True: []}
    decode_rate(engine, 1)
    for turn in range(args.rounds):
        for count in TOGETHER:
            rates[count].append(decode_rate(engine, count))
        for beside, found in waits.items():
            found.append(first_token(engine, beside))
        say(f"round {turn + 1} of {args.rounds}")
    print("| sequences | tokens/s together | of one |\n|---|---|---|")
    for count in TOGETHER:
        ratio = median(many / one for many, one in zip(rates[count], rates[1], strict=True))
        print(f"| {count} | {median(rates[count]):.1f} | {ratio:.2f} x |")
    print(f"\nfirst token of 32 tokens: alone {median(waits[False]):.2f} s, beside a prompt of {LONG} tokens "
          f"{median(waits[True]):.2f} s")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
