"""Load the model of a request: plan, load, and try the next version when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

from lowmem.cards.find import empty_caches
from lowmem.checkpoint import cache
from lowmem.checkpoint.verify.digests import check_all
from lowmem.errors import MemoryBudgetError
from lowmem.loading.loader import LoadedModel, LoadOptions, load
from lowmem.models.vocabulary import check_draft
from lowmem.plan.device import is_out_of_memory
from lowmem.plan.drafts import Draft
from lowmem.plan.planner import Option, Plan
from lowmem.plan.request import ModelRequest, find_card, plan_or_download

Notify = Callable[[str], None]
Progress = Callable[[int, int], None]


def open_model(
    request: ModelRequest, notify: Notify = lambda line: None, progress: Progress | None = None
) -> LoadedModel:
    """Plan, and load the best version that fits; a hub id that is not on this machine is downloaded first.

    notify: receives a line on what was chosen, and on each fallback. progress: bytes read, and in total.
    Raises LowmemError for every mistake or limit that the user can act on.
    """
    plan = plan_or_download(request, notify)
    notify(plan.reason)
    return load_plan(plan, request, notify, progress)


def load_plan(
    plan: Plan, request: ModelRequest, notify: Notify = lambda line: None, progress: Progress | None = None
) -> LoadedModel:
    """Load the chosen version of a plan, or the next one where memory runs out; see `open_model`."""
    failure: Exception | None = None
    for option in (plan.chosen, *plan.fallbacks):
        try:
            loaded = load_option(option, plan, request, progress, notify)
            return (
                loaded
                if plan.draft is None
                else replace(loaded, draft=load_draft(plan.draft, loaded, notify))
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = error.with_traceback(None)  # the frames of which hold what was loaded so far
        _free()
        notify(f"{option.candidate.label} does not fit after all: out of memory. Trying the next version")
    raise MemoryBudgetError(
        f"no version of {request.model} could be loaded: {str(failure).splitlines()[0]}",
        "Close other programs, or use a shorter --context",
    )


def load_option(
    option: Option,
    plan: Plan,
    request: ModelRequest,
    progress: Progress | None = None,
    notify: Notify = lambda line: None,
) -> LoadedModel:
    """Load one option of a plan; with `request.check` its files are compared with their digests first.

    Raises torch's own errors when memory is short.
    """
    import torch

    candidate = option.candidate
    if request.check:
        notify(f"comparing the files of {candidate.path} with their digests")
        count = check_all(candidate.path, progress)
        notify(f"{count} files match their digests")
    form, layers = candidate.form, candidate.shape.layers
    card = None if option.device == "cpu" else find_card(request.device)
    loaded = load(
        candidate.path,
        LoadOptions(
            device=card or "cpu",
            dtype=getattr(torch, form.dtype),
            on_the_fly=form.method if form.method in ("int8", "nf4") else None,
            context=plan.context,
            split=layers - option.cpu_layers if option.device == "split" else None,
            activation_bits=request.activation_bits,
            head_bits=form.head_bits,
        ),
        progress=progress,
        notify=notify,
    )
    cache.mark_used(candidate.path)
    return replace(loaded, plan=plan, option=option)


def load_draft(draft: Draft, large: LoadedModel, notify: Notify = lambda line: None) -> LoadedModel:
    """Load a draft model where the large model's first layers are.

    Raises SourceError if its vocabulary is another one, torch's own errors when memory is short.
    """
    import torch

    form = draft.candidate.form
    # On a CPU that the plan fell back to, float16 is slow: see `default_dtype`.
    name = "bfloat16" if large.device.type == "cpu" and form.dtype == "float16" else form.dtype
    options = LoadOptions(device=large.device, dtype=getattr(torch, name), context=large.context)
    loaded = load(draft.candidate.path, options, notify=notify)
    check_draft(large.tokenizer, loaded.tokenizer)
    cache.mark_used(draft.candidate.path)
    return loaded


def _free() -> None:
    """Free the memory of a failed load."""
    gc.collect()
    empty_caches()
