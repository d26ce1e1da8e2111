"""Every causal language model of transformers as tiny random models: lowmem's results beside transformers'.

    python -m lowmem.benchmarks.experiments.families                    all of them, in a few minutes
    python -m lowmem.benchmarks.experiments.families llama qwen3        some
    python -m lowmem.benchmarks.experiments.families --show

docs/models.md, which a run over all families writes beside benchmarks/results/families.json, says what is
compared.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from lowmem.benchmarks.experiments.common import say
from lowmem.benchmarks.experiments.families.record import EXPERIMENT, PAGE, page, record
from lowmem.benchmarks.experiments.families.variants import families


def main() -> int:
    """The command; returns its exit code: 1 where a family is wrong."""
    parser = EXPERIMENT.parser(__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="model types (default: all)")
    args = parser.parse_args()
    if unknown := set(args.families) - set(families()):
        parser.error(f"{min(unknown)!r} is not a causal language model of transformers")
    with tempfile.TemporaryDirectory() as work:
        names = args.families or families()
        code = EXPERIMENT.run(args, lambda: record(names, Path(work)), keep=not args.families)
    if not args.families and not args.show and code == 0:
        PAGE.write_text(page(EXPERIMENT.read(args.out)), encoding="utf-8")
        say(f"wrote {PAGE}")
    return code


if __name__ == "__main__":
    sys.exit(main())
