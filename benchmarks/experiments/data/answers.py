"""One prompt, answered greedily by every form of a model: `python -m lowmem.benchmarks.experiments.data.answers MODEL`.

Markdown: a line on each form (its weights, tokens and tokens/s), and its answer.
"""

from __future__ import annotations

import argparse
import sys

from lowmem.config import SamplingParams
from lowmem.loading.opening import load_option
from lowmem.plan.request import ModelRequest, plan_for
from lowmem.session import Session
from lowmem.text.units import format_bytes

PROMPT = "How do I sort a list in Python?"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="as for `lowmem run`")
    parser.add_argument("-p", "--prompt", default=PROMPT, help="(%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--context", type=int, default=512, metavar="N")
    args = parser.parse_args()
    request = ModelRequest(args.model, device="cpu", context=args.context)
    plan = plan_for(request)
    params = SamplingParams(max_new_tokens=args.max_new_tokens, temperature=0)
    print(f"{args.prompt!r}, greedy, at most {args.max_new_tokens} tokens")
    for option in plan.options:
        loaded = load_option(option, plan, request)
        answer = Session(loaded).complete(args.prompt, params)
        size, rate = format_bytes(loaded.weight_bytes), f"{answer.tokens_per_second:.1f} tokens/s"
        figures = f"{size} of weights, {answer.new_tokens} tokens, {answer.finish_reason}, {rate}"
        print(f"\n**{loaded.label}** ({figures})\n\n{answer.text.strip()}", flush=True)
        del loaded
    return 0


if __name__ == "__main__":
    sys.exit(main())
