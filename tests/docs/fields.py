"""Writes the tables of request fields in docs/serve.md, from the request schemas and `lowmem.server.fields`.

python -m tests.docs.fields
"""

from __future__ import annotations

import json
from pathlib import Path

from lowmem.server.fields import ACCEPTED, CHAT, REFUSED, TEXT, Refused
from lowmem.server.infill import InfillRequest
from lowmem.server.protocol import ChatRequest, CompletionRequest, SamplingFields

FILE = Path(__file__).parents[2] / "docs" / "serve.md"
START, END = "<!-- fields: start -->", "<!-- fields: end -->"


def tables() -> str:
    """The lists of used and accepted fields, and the table of refused ones."""
    chat, text = set(ChatRequest.model_fields), set(CompletionRequest.model_fields)
    lines = [
        f"**Used** by both: {_names(chat & text)}. By `{CHAT}` alone: {_names(chat - text)}. "
        f"By `{TEXT}` alone: {_names(text - chat)}. By `/infill`, besides those of both but `logprobs`: "
        f"{_names(set(InfillRequest.model_fields) - set(SamplingFields.model_fields))}; its other fields are "
        f"treated as those of `{TEXT}`.",
        "",
        "| accepted, since they change no answer | |",
        "|---|---|",
        *(f"| {_names(row.names)} | {row.why} |" for row in ACCEPTED),
        "",
        "| refused by name | which would mean | accepted values | the next step |",
        "|---|---|---|---|",
        *(_row(row) for row in REFUSED),
    ]
    return "\n".join(lines)


def page(text: str) -> str:
    """The page `text` with today's tables."""
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    return f"{head}{START}\n\n{tables()}\n\n{END}{tail}"


def _names(names: object) -> str:
    assert isinstance(names, set | tuple)
    return ", ".join(f"`{name}`" for name in (sorted(names) if isinstance(names, set) else names))


def _row(row: Refused) -> str:
    where = f" (in `{row.routes[0]}`)" if len(row.routes) == 1 else ""
    values = ", ".join(f"`{json.dumps(value)}`" for value in row.neutral)
    return f"| {_names(row.names)}{where} | {row.what} | {values} | {row.advice} |"


if __name__ == "__main__":
    FILE.write_text(page(FILE.read_text()))
