"""A user's request → a model that runs: plan, load, and the next best if the memory is gone meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lowmem.checkpoint import cache
from lowmem.checkpoint.files.reading import is_hub_id
from lowmem.checkpoint.verify.digests import check_all
from lowmem.errors import MemoryBudgetError, SourceError
from lowmem.loading.loader import LoadedModel, load
from lowmem.plan.device import is_out_of_memory
from lowmem.plan.planner import Option, Plan
from lowmem.plan.request import Request, find_card, plan_for

Notify = Callable[[str], None]
Progress = Callable[[int, int], None]


def open_model(
    request: Request, notify: Notify = lambda line: None, progress: Progress | None = None
) -> LoadedModel:
    """Load the best form that fits; `LoadedModel.plan` tells what was chosen and why.

    notify: hears in one line what was chosen, and when something else has to be. progress: bytes read, and in
    all. A hub id that is not on this machine is downloaded first. Raises LowmemError for everything that the
    user can mend.
    """
    plan = _plan(request, notify)
    notify(plan.reason)
    failure: Exception | None = None
    for option in (plan.chosen, *plan.fallbacks):
        try:
            return load_option(option, plan, request, progress, notify)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = error.with_traceback(None)  # whose frames hold what was loaded so far
        _free()
        notify(f"{option.candidate.label} does not fit after all: the memory is taken. Trying the next form")
    raise MemoryBudgetError(
        f"no form of {request.model} could be loaded: {str(failure).splitlines()[0]}",
        "Close other programs, or ask for a shorter --context",
    )


def _plan(request: Request, notify: Notify) -> Plan:
    try:
        return plan_for(request)
    except SourceError:
        if Path(request.model).expanduser().exists() or not is_hub_id(request.model):
            raise
        return plan_for(replace(request, model=str(_download(request.model, notify))))


def _download(model: str, notify: Notify) -> Path:
    from lowmem.checkpoint.source.hub import download

    try:
        return download(model, progress=notify)
    except SourceError as error:
        raise SourceError(
            f"no form of {model} is on this machine, converted or as published: {error.message}", error.hint
        ) from error


def load_option(
    option: Option,
    plan: Plan,
    request: Request,
    progress: Progress | None = None,
    notify: Notify = lambda line: None,
) -> LoadedModel:
    """Load one option of a plan, its files compared before where that is asked.

    Raises torch's own errors where memory is short.
    """
    import torch

    candidate = option.candidate
    if request.check:
        notify(f"comparing the files of {candidate.path} with their digests")
        count = check_all(candidate.path, progress)
        notify(f"{count} files are what they were")
    form, layers = candidate.form, candidate.shape.layers
    card = None if option.device == "cpu" else find_card(request.device)
    loaded = load(
        candidate.path,
        device=card or "cpu",
        dtype=getattr(torch, form.dtype),
        on_the_fly=form.method if form.method in ("int8", "nf4") else None,
        context=plan.context,
        split=layers - option.cpu_layers if option.device == "split" else None,
        activation_bits=request.activation_bits,
        progress=progress,
        notify=notify,
    )
    cache.mark_used(candidate.path)
    return replace(loaded, plan=plan, option=option)


def _free() -> None:
    """Give back what a failed load has taken."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
