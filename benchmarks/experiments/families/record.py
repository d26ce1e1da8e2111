"""The record of the sweep, and docs/models.md, which is made from it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lowmem.benchmarks.common.processes import ROOT
from lowmem.benchmarks.common.records import Origin
from lowmem.benchmarks.experiments.common import (
    RESULTS,
    Experiment,
    made_with,
    origin_here,
    say,
    table,
)
from lowmem.benchmarks.experiments.families.trial import (
    KLD,
    LONG,
    NEW,
    OK,
    REFUSED,
    SHORT,
    Outcome,
    try_variant,
)
from lowmem.benchmarks.experiments.families.variants import Variant, variants

from lowmem.config import PREFILL_CHUNK
from lowmem.errors import ArchitectureError
from lowmem.models.layer_state import check_layer_state

PAGE = ROOT / "docs" / "models.md"
_LARGEST = 100_000_000
"""Parameters; what is larger in spite of tiny settings holds another model, such as an image's encoder."""


@dataclass(frozen=True)
class Record:
    """What the sweep found."""

    origin: Origin
    outcomes: tuple[Outcome, ...]


def record(names: Sequence[str], work: Path) -> Record:
    """Try every model of the families `names`, in the folder `work`."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    origin = origin_here("families", sys.argv[1:], "tiny random models")
    outcomes = []
    for family in names:
        for variant in variants(family):
            outcomes.append(_tried(variant, work))
            say(f"{variant.name}: {describe(outcomes[-1])}")
    return Record(origin, tuple(outcomes))


def _tried(variant: Variant, work: Path) -> Outcome:
    try:
        text = text_type(variant)
        if not text:
            return try_variant(variant, work)
    except Exception as error:  # a config that rejects the sweep's sizes
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    try:  # a config alone may be enough
        check_layer_state({**variant.settings, "model_type": variant.family})
    except ArchitectureError as error:
        return Outcome(variant.name, refused=str(error))
    return Outcome(variant.name, untried=text)


def text_type(variant: Variant) -> str:
    """Why the model is not tried by itself: it is a text model beside an encoder of images or sound."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[variant.family](**variant.settings)
    text = config.get_text_config()
    if text is not config:
        return f"the text model is `{text.model_type}`"
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        count = sum(p.numel() for p in auto.from_config(config).parameters())
    return "" if count < _LARGEST else f"{count:,} parameters in spite of tiny settings"


def describe(outcome: Outcome) -> str:
    """An outcome in one line."""
    if outcome.untried:
        return f"not tried: {outcome.untried}"
    if outcome.refused:
        return f"refused: {outcome.refused}"
    steps = {"plan": outcome.shape, "short prompt": outcome.short, "long prompt": outcome.long}
    wrong = [f"{name}: {said}" for name, said in (steps | {"convert": outcome.convert}).items() if said != OK]
    return "; ".join(wrong) or f"right; KL divergence {outcome.kld:.1e} in 8 bits"


def render(found: Record) -> str:
    """The record as Markdown: a table for each kind of outcome."""
    parts = []
    both = [o for o in found.outcomes if o.right]
    if both:
        worst = max((o.kld or 0.0, o.name) for o in both)
        names = ", ".join(f"`{o.name}`" for o in both)
        parts.append(
            f"## Run and converted\n\n{len(both)} models; the largest KL divergence in 8 bits is "
            f"{worst[0]:.1e} nats (`{worst[1]}`).\n\n{names}."
        )
    for title, chosen, why in (
        ("Run, but not converted", [o for o in found.outcomes if o.only_runs], "convert says"),
        ("Refused by plan, run and convert", [o for o in found.outcomes if o.refused], "reason"),
        ("Not tried", [o for o in found.outcomes if o.untried], "reason"),
        ("Wrong", [o for o in found.outcomes if o.fault], "what"),
    ):
        if chosen:
            cells = [(f"`{o.name}`", _reason(o)) for o in chosen]
            parts.append(f"## {title}\n\n{table(('model', why), cells, numbers=False)}")
    return "\n\n".join([*parts, made_with(found.origin)])


def _reason(outcome: Outcome) -> str:
    """One sentence: the hint of a refusal is left out."""
    if outcome.fault:
        return describe(outcome)
    said: str = outcome.untried or outcome.refused or outcome.convert.removeprefix(REFUSED)
    return said.split(". ")[0]


EXPERIMENT = Experiment("families", Record, RESULTS / "families.json", render)


_HEAD = f"""\
# Models

`python -m lowmem.benchmarks.experiments.families` makes this page. For each model type that has a causal
language model in transformers, and for options that change its arithmetic, it makes a tiny model with random
weights, and compares lowmem with transformers:

- `lowmem plan` must find the model's own layers, linears, numbers and KV cache;
- the {NEW} greedy tokens after prompts of {SHORT} and {LONG} tokens must be transformers' in float32 (prompts
  are computed in chunks of {PREFILL_CHUNK});
- converted to 8 bits, `lowmem verify` must pass, and the folder must load again with a KL divergence
  of at most {KLD} nats;
- or plan, run and convert must refuse it for one and the same reason.

A tiny model shows that the arithmetic is right. It says nothing of the quality of a trained model.

"""


def page(found: Record) -> str:
    """docs/models.md."""
    return _HEAD + render(found) + "\n"
