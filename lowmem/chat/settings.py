"""The sampling settings by name: what /set takes, and what a saved conversation holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError
from lowmem.generate.sampling import check_sampling

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
    """`top-k` or `top_k` → `top_k`; InvalidRequestError for what is no setting."""
    name = text.lower().replace("-", "_")
    if name not in NAMES:
        raise InvalidRequestError(f"{text!r} is not a setting", f"There are {', '.join(NAMES)}")
    return name


def with_setting(params: SamplingParams, name: str, text: str) -> SamplingParams:
    """`params` with one setting as a person types it; InvalidRequestError for a value that means nothing.

    A seed may be `none`. Stop texts are separated by blanks, with \\n for a line's end; `none` is none.
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
            raise InvalidRequestError(f"{name} is {kind}, not {text!r}", f"Type /set {name} VALUE") from None
    return _checked(params, {name: value})


def show_settings(params: SamplingParams) -> list[str]:
    """One line a setting."""
    lines = []
    for name in NAMES:
        value = getattr(params, name)
        if name == "stop":
            value = " ".join(repr(text)[1:-1] for text in value) or "none"
        lines.append(f"{name:<19}{'random' if value is None else value}")
    return lines


def settings_record(params: SamplingParams) -> dict[str, Any]:
    """The settings as JSON holds them."""
    return {name: getattr(params, name) for name in NAMES}


def settings_from(record: Mapping[str, Any], params: SamplingParams) -> SamplingParams:
    """`params` with the settings of a file, whose names and types are anybody's; unknown names are ignored.

    Raises InvalidRequestError naming the setting that is not what it should be.
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
            raise InvalidRequestError(f"its setting {name} is not what it should be")
        try:
            found[name] = value if name in (*_WHOLE_NUMBERS, "stop") else float(value)
        except OverflowError:  # JSON's numbers have no end
            raise InvalidRequestError(f"its setting {name} is not what it should be") from None
    return _checked(params, found)


def _checked(params: SamplingParams, values: Mapping[str, object]) -> SamplingParams:
    changed = replace(params, **values)  # type: ignore[arg-type]
    check_sampling(changed)
    check_seed(changed)
    return changed


def check_seed(params: SamplingParams) -> None:
    """Raises InvalidRequestError for a seed that torch's generators cannot take."""
    if params.seed is not None and not 0 <= params.seed < _SEEDS:
        raise InvalidRequestError("the seed is out of range", f"Use a number from 0 to {_SEEDS - 1}")
