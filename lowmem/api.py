"""What a Python program calls: `lowmem.load`, `lowmem.open_model`, `lowmem.make_plan`."""

from __future__ import annotations

import sys
from typing import Any

from lowmem.loading.loader import LoadedModel
from lowmem.loading.opening import open_model as _open_model
from lowmem.plan.device import parse_bytes
from lowmem.plan.planner import Plan
from lowmem.plan.request import Request, plan_for


def load(
    model: str,
    *,
    context: int | None = None,
    bits: int | None = None,
    device: str = "auto",
    vram: str | None = None,
    ram: str | None = None,
    dtype: str | None = None,
    activation_bits: int | None = None,
    check: bool = False,
    verbose: bool = False,
) -> tuple[Any, Any]:
    """The best form of `model` that fits, as a transformers model and its tokenizer.

    They work in `transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)` as from
    transformers' own from_pretrained; generation also stops at the end of a turn. The arguments are the
    options of `lowmem run`; sizes are texts such as "12GiB". check: compare all files with their digests
    first. verbose: say on standard error what was chosen.
    Raises LowmemError for everything that the caller can mend.
    """
    loaded = open_model(
        model,
        context=context,
        bits=bits,
        device=device,
        vram=vram,
        ram=ram,
        dtype=dtype,
        activation_bits=activation_bits,
        check=check,
        verbose=verbose,
    )
    return loaded.model, loaded.tokenizer


def open_model(
    model: str,
    *,
    context: int | None = None,
    bits: int | None = None,
    device: str = "auto",
    vram: str | None = None,
    ram: str | None = None,
    dtype: str | None = None,
    activation_bits: int | None = None,
    check: bool = False,
    verbose: bool = False,
) -> LoadedModel:
    """As `load`, with all that belongs to the model: plan, dialogue, stop tokens. A Session takes it."""
    request = _request(model, context, bits, device, vram, ram, dtype, activation_bits, check)
    return _open_model(request, _to_stderr if verbose else lambda line: None)


def make_plan(
    model: str,
    *,
    context: int | None = None,
    bits: int | None = None,
    device: str = "auto",
    vram: str | None = None,
    ram: str | None = None,
    dtype: str | None = None,
) -> Plan:
    """What `load` would choose, and what every form needs; no weight is read. `vram` may be of any card."""
    return plan_for(_request(model, context, bits, device, vram, ram, dtype), named_card=True)


def _request(
    model: str,
    context: int | None,
    bits: int | None,
    device: str,
    vram: str | None,
    ram: str | None,
    dtype: str | None,
    activation_bits: int | None = None,
    check: bool = False,
) -> Request:
    return Request(
        model=str(model),
        context=context,
        bits=bits,
        device=device,
        vram=parse_bytes(vram, "vram") if vram else None,
        ram=parse_bytes(ram, "ram") if ram else None,
        dtype=dtype,
        activation_bits=activation_bits,
        check=check,
    )


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
