"""JSON Schemas from a seeded generator, of the keywords that requests use most."""

from __future__ import annotations

import random
from typing import Any


def make_schema(seed: int) -> dict[str, Any]:
    """A schema whose JSON is short: bounded texts and lists, at most three levels."""
    numbers = random.Random(seed)
    definitions = {f"d{at}": _value(numbers, 2) for at in range(numbers.randrange(3))}
    schema = _object(numbers, 0, list(definitions)) if numbers.random() < 0.8 else _value(numbers, 0)
    return {**schema, "$defs": definitions} if definitions else schema


def _value(numbers: random.Random, depth: int, names: list[str] | None = None) -> dict[str, Any]:
    kinds = [_text, _whole, _number, _fixed, lambda _: {"type": "boolean"}, lambda _: {"type": "null"}]
    pick = numbers.randrange(len(kinds) + (4 if depth < 3 else 0))
    if pick < len(kinds):
        return kinds[pick](numbers)
    if pick == len(kinds):
        return _object(numbers, depth + 1, names)
    if pick == len(kinds) + 1:
        least = numbers.randrange(3)
        items = _value(numbers, depth + 1, names)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + numbers.randrange(3)}
    if pick == len(kinds) + 2 and names:
        return {"$ref": f"#/$defs/{numbers.choice(names)}"}
    return {"anyOf": [_value(numbers, depth + 1, names) for _ in range(numbers.randint(2, 3))]}


def _object(numbers: random.Random, depth: int, names: list[str] | None = None) -> dict[str, Any]:
    keys = numbers.sample(
        ["a", "name", "größe", "two words", 'q"uote', "x/y", "$", "list"], numbers.randint(1, 4)
    )
    found: dict[str, Any] = {
        "type": "object",
        "properties": {key: _value(numbers, depth + 1, names) for key in keys},
        "required": [key for key in keys if numbers.random() < 0.6],
    }
    if numbers.random() < 0.8:
        found["additionalProperties"] = False
    return found


def _text(numbers: random.Random) -> dict[str, Any]:
    patterns = ["^[a-z]{1,5}$", "^\\d{3}-\\d{4}$", "^(foo|bar)+$", "[0-9]", '^é?[^"]{2}$']
    kind = numbers.randrange(4)
    if kind == 0:
        return {"type": "string", "pattern": numbers.choice(patterns), "maxLength": 12}
    if kind == 1:
        return {"type": "string", "format": numbers.choice(["date", "uuid", "ipv4"])}
    least = numbers.randrange(3)
    return {"type": "string", "minLength": least, "maxLength": least + numbers.randrange(8)}


def _whole(numbers: random.Random) -> dict[str, Any]:
    low = numbers.randint(-1000, 1000)
    found: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": low + numbers.randrange(3000)}
    if numbers.random() < 0.3:
        found = {"type": "integer", "exclusiveMinimum": low, "maximum": low + 20, "multipleOf": 3}
    return found


def _number(numbers: random.Random) -> dict[str, Any]:
    low = round(numbers.uniform(-100, 100), 2)
    return {"type": "number", "minimum": low, "maximum": low + numbers.choice([0.5, 10, 1e4])}


def _fixed(numbers: random.Random) -> dict[str, Any]:
    values: list[Any] = ["red", "green", "", 7, -1.5, None, True, [1, "two"], {"k": "v"}, '\n\t\\"', "日本"]
    if numbers.random() < 0.3:
        return {"const": numbers.choice(values)}
    return {"enum": numbers.sample(values, numbers.randint(1, 4))}
