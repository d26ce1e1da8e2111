"""Types of request fields that also take the harmless variants that clients send: 256.0, "256", -1."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

NO_LIMIT = (1 << 31) - 1
"""The number of tokens that -1 stands for."""
_NUMBER = re.compile(r"[+-]?\d{1,18}(\.\d{0,18})?([eE][+-]?\d{1,3})?")


def _number(value: Any) -> Any:
    """A number in a text becomes a number."""
    text = value.strip() if isinstance(value, str) else ""
    return float(text) if _NUMBER.fullmatch(text) else value


def _whole(value: Any) -> Any:
    """256.0 becomes 256, and so does "256"."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,20}\s*", value):
        return int(value)  # a float would round a large seed
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _flag(value: Any) -> Any:
    """1 and "true" become true, 0 and "false" false."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower(), value)
    return bool(value) if type(value) is int and value in (0, 1) else value


def _unset(value: Any) -> Any:
    """-1 becomes null."""
    return None if type(_whole(value)) is int and _whole(value) == -1 else value


def _limit(value: Any) -> Any:
    """-1, and llama.cpp's -2, become no limit."""
    return NO_LIMIT if type(_whole(value)) is int and _whole(value) in (-1, -2) else value


def _count(value: Any) -> Any:
    """false becomes null, true becomes 1: the chat route's way to ask for log-probabilities."""
    return (1 if value else None) if isinstance(value, bool) else value


def _empty(value: Any) -> Any:
    """An empty list becomes null."""
    return None if value == [] else value


def _nothing(value: Any) -> Any:
    """An empty text, list or object becomes null."""
    return None if value in ("", [], {}) else value


def _texts(value: Any) -> Any:
    """An empty text becomes null, and goes out of a list."""
    if isinstance(value, list):
        return [text for text in value if text not in ("", None)]
    return None if value == "" else value


Whole = BeforeValidator(_whole)
Number = BeforeValidator(_number)
Flag = Annotated[bool, BeforeValidator(_flag)]
MinusOneIsUnset = BeforeValidator(_unset)
MinusOneIsNoLimit = BeforeValidator(_limit)
FlagIsCount = BeforeValidator(_count)
EmptyTextIsUnset = BeforeValidator(_texts)
EmptyIsUnset = BeforeValidator(_empty)
NothingIsUnset = BeforeValidator(_nothing)
