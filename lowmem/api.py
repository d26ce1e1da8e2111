"""The Python API: `lowmem.load`, `lowmem.open_model`, `lowmem.make_plan`."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from lowmem.errors import InvalidRequestError
from lowmem.loading.loader import LoadedModel
from lowmem.loading.opening import open_model as _open_model
from lowmem.plan.planner import Plan
from lowmem.plan.request import ModelRequest, plan_for

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _with_parameters_of(
    request: Callable[_P, ModelRequest],
) -> Callable[[Callable[[ModelRequest], _T]], Callable[_P, _T]]:
    """Give a function of a ModelRequest the parameters of ModelRequest, which then are written once."""

    def decorate(function: Callable[[ModelRequest], _T]) -> Callable[_P, _T]:
        @functools.wraps(function)
        def call(*args: _P.args, **options: _P.kwargs) -> _T:
            return function(request(*args, **options))

        call.__signature__ = inspect.signature(request)  # type: ignore[attr-defined]
        return call

    return decorate


@_with_parameters_of(ModelRequest)
def load(request: ModelRequest) -> tuple[Any, Any]:
    """Load the best version of a model that fits, as a transformers model and its tokenizer.

    Takes the fields of ModelRequest: `load("starchat-alpha", bits=4, ram="16GiB")`. Both work in
    `transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)` like those of transformers'
    own from_pretrained; generation also stops at the end of a turn. Raises LowmemError for every mistake or
    limit that the caller can act on.
    """
    if request.draft is not None:
        raise InvalidRequestError(
            "load gives transformers' model, which drafts in its own way",
            "Use lowmem.open_model and lowmem.Session, or generate(assistant_model=...)",
        )
    loaded = _open(request)
    return loaded.model, loaded.tokenizer


@_with_parameters_of(ModelRequest)
def open_model(request: ModelRequest) -> LoadedModel:
    """As `load`, with everything that belongs to the model: plan, dialogue, stop tokens. For a Session."""
    return _open(request)


@_with_parameters_of(ModelRequest)
def make_plan(request: ModelRequest) -> Plan:
    """What `load` would choose, and what each version needs; reads headers only.

    `vram` may be that of a card that is not in this machine.
    """
    return plan_for(request, named_card=True)


def _open(request: ModelRequest) -> LoadedModel:
    return _open_model(request, _to_stderr if request.verbose else lambda line: None)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
