"""The format that a request asks for → a grammar: OpenAI's response_format, vLLM's and llama.cpp's fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lowmem.config import Grammar
from lowmem.server.api_errors import ApiError, invalid, short
from lowmem.server.protocol import SamplingFields

_PARTS = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "gbnf",
    "json_object": "json_object",
}
"""The keys of vLLM's structured_outputs that ask for a format."""
_FIELDS = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "gbnf",
    "json_schema": "json_schema",
    "grammar": "gbnf",
}
_TYPES = '"text", "json_object" or "json_schema"'


def requested_grammar(request: SamplingFields) -> tuple[Grammar, str] | None:
    """The grammar of a request, and the field that asks for it. None if there is none.

    Raises ApiError for a format that is not supported, and for two of them.
    """
    found: list[tuple[Grammar, str]] = []
    if request.response_format:
        found += _response_format(request.response_format)
    if request.structured_outputs:
        found += _structured_outputs(request.structured_outputs)
    for name, kind in _FIELDS.items():
        if (value := getattr(request, name)) is not None:
            found.append((_grammar(kind, value, name), name))
    if len(found) > 1:
        one, other = found[0][1], found[1][1]
        raise invalid(f"{other} cannot be combined with {one}. Leave one of them out", other)
    return found[0] if found else None


def _response_format(given: Mapping[str, Any]) -> list[tuple[Grammar, str]]:
    kind, where = given.get("type"), "response_format"
    if kind == "text":
        return []
    if kind == "json_object":  # llama.cpp's has a schema
        return [(_grammar("json_schema", given.get("schema") or {"type": "object"}, where), where)]
    if kind == "json_schema":
        named = given.get("json_schema")
        schema = named.get("schema") if isinstance(named, dict) else given.get("schema")
        if schema is None:
            raise invalid("response_format.json_schema.schema is missing. Send a JSON Schema", where)
        return [(_grammar("json_schema", schema, where), where)]
    raise _unsupported(f"response_format of type {short(str(kind))!r}", f"Use {_TYPES}", where)


def _structured_outputs(given: Mapping[str, Any]) -> list[tuple[Grammar, str]]:
    found: list[tuple[Grammar, str]] = []
    for name, value in given.items():
        where = f"structured_outputs.{short(name)}"
        if value in (None, False, "", []):
            continue
        if name not in _PARTS:
            raise _unsupported(where, f"Use one of {', '.join(_PARTS)}", "structured_outputs")
        found.append((_grammar(_PARTS[name], value, where), "structured_outputs"))
    return found


def _grammar(kind: str, value: Any, where: str) -> Grammar:
    if kind == "json_object":
        return Grammar.json_schema({"type": "object"})
    if kind == "json_schema":
        if not isinstance(value, dict | str | bool):
            raise invalid(f"{where} is not a JSON Schema. Send an object", where)
        try:
            return Grammar.json_schema(value)
        except (ValueError, RecursionError) as error:
            raise invalid(f"{where} is nested too deeply. Send a smaller schema", where) from error
    if kind == "choice":
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise invalid(f"{where} is not a list of texts", where)
        return Grammar("choice", json.dumps(value))
    if not isinstance(value, str):
        raise invalid(f"{where} is not a text", where)
    return Grammar.regex(value) if kind == "regex" else Grammar.gbnf(value)


def _unsupported(what: str, advice: str, param: str) -> ApiError:
    return invalid(f"{what} is not supported by this server. {advice}", param, "unsupported_parameter")
