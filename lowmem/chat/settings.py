"""The sampling settings by name, for /set and for saved conversations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lowmem.config import SamplingParams, check_sampling
from lowmem.errors import InvalidRequestError

NAMES = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
    "seed",
    "stop",
)
_WHOLE_NUMBERS = ("top_k", "max_new_tokens", "seed")
_SEEDS = 1 << 63
_NONE = ("none", "off", "random")


def setting_name(text: str) -> str:
    """`top-k` or `top_k` → `top_k`. Raises InvalidRequestError for an unknown name."""
    name = text.lower().replace("-", "_")
    if name not in NAMES:
        raise InvalidRequestError(f"{text!r} is not a setting", f"Use one of {', '.join(NAMES)}")
    return name


def with_setting(params: SamplingParams, name: str, text: str) -> SamplingParams:
    """`params` with one setting as a user types it. Raises InvalidRequestError for an invalid value.

    A seed may be `none`. Stop texts are separated by spaces and may contain \\n and \\t;
    `none` clears them.
    """
    name = setting_name(name)
    value: object
    if name == "stop":
        texts = [] if text.lower() in _NONE else text.split()
        value = tuple(part.replace("\\n", "\n").replace("\\t", "\t") for part in texts)
    elif name == "seed" and text.lower() in _NONE:
        value = None
    else:
        try:
            value = int(text) if name in _WHOLE_NUMBERS else float(text)
        except ValueError:
            kind = "a whole number" if name in _WHOLE_NUMBERS else "a number"
            raise InvalidRequestError(
                f"{name} takes {kind}, not {text!r}", f"Type /set {name} VALUE"
            ) from None
    return _checked(params, {name: value})


def show_settings(params: SamplingParams) -> list[str]:
    """One line per setting."""
    lines = []
    for name in NAMES:
        value = getattr(params, name)
        if name == "stop":
            value = " ".join(repr(text)[1:-1] for text in value) or "none"
        lines.append(f"{name:<19}{'random' if value is None else value}")
    return lines


def settings_record(params: SamplingParams) -> dict[str, Any]:
    """The settings as a JSON object."""
    return {name: getattr(params, name) for name in NAMES}


def settings_from(record: Mapping[str, Any], params: SamplingParams) -> SamplingParams:
    """`params` with the settings of a file. Ignores unknown names.

    Raises InvalidRequestError for a value of the wrong type, or out of range.
    """
    found: dict[str, object] = {}
    for name in NAMES:
        if name not in record:
            continue
        value = record[name]
        if name == "stop":
            good = isinstance(value, list) and all(isinstance(text, str) for text in value)
            value = tuple(value) if good else None
        elif name in _WHOLE_NUMBERS:
            good = type(value) is int or (name == "seed" and value is None)
        else:
            good = type(value) in (int, float)
        if not good:
            raise InvalidRequestError(f"its setting {name} has an invalid value")
        try:
            found[name] = value if name in (*_WHOLE_NUMBERS, "stop") else float(value)
        except OverflowError:  # JSON numbers are unbounded
            raise InvalidRequestError(f"its setting {name} has an invalid value") from None
    return _checked(params, found)


def _checked(params: SamplingParams, values: Mapping[str, object]) -> SamplingParams:
    changed = replace(params, **values)  # type: ignore[arg-type]
    check_sampling(changed)
    check_seed(changed)
    return changed


def check_seed(params: SamplingParams) -> None:
    """Raises InvalidRequestError for a seed out of range."""
    if params.seed is not None and not 0 <= params.seed < _SEEDS:
        raise InvalidRequestError(f"the seed is {params.seed}", f"Use a number from 0 to {_SEEDS - 1}")
