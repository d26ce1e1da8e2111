"""Writes the tables of request fields in docs/serve.md, from the request schemas and `lowmem.server.fields`.

python -m tests.docs.fields
"""

from __future__ import annotations

import json
from pathlib import Path

from lowmem.server.fields import ACCEPTED, CHAT, REFUSED, TEXT, Refused
from lowmem.server.infill import InfillRequest
from lowmem.server.protocol import ChatRequest, CompletionRequest, SamplingFields
from lowmem.server.responses import ACCEPTED as ACCEPTED_HERE
from lowmem.server.responses import REFUSED as REFUSED_HERE
from lowmem.server.responses import RESPONSES, ResponsesRequest
from lowmem.server.tokens import DetokenizeRequest, TokenizeRequest

FILE = Path(__file__).parents[2] / "docs" / "serve.md"
START, END = "<!-- fields: start -->", "<!-- fields: end -->"


def tables() -> str:
    """The lists of used and accepted fields, and the tables of refused ones."""
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
        "",
        f"**`{RESPONSES}`** treats fields as `{CHAT}` does, but for these. It uses "
        f"{_names(_used_by_responses())}. It accepts "
        f"{_names(tuple(name for row in ACCEPTED_HERE for name in row.names))}.",
        "",
        "| refused by name | which would mean | accepted values | the next step |",
        "|---|---|---|---|",
        *(_row(row, where=False) for row in REFUSED_HERE),
        "",
        f"**`/tokenize`** uses {_names(set(TokenizeRequest.model_fields))}; **`/detokenize`** "
        f"{_names(set(DetokenizeRequest.model_fields))}.",
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


def _used_by_responses() -> set[str]:
    elsewhere = {name for row in (*REFUSED_HERE, *ACCEPTED_HERE) for name in row.names}
    return set(ResponsesRequest.model_fields) - elsewhere


def _row(row: Refused, where: bool = True) -> str:
    place = f" (in `{row.routes[0]}`)" if where and len(row.routes) == 1 else ""
    values = ", ".join(f"`{json.dumps(value)}`" for value in row.neutral)
    return f"| {_names(row.names)}{place} | {row.what} | {values} | {row.advice} |"


if __name__ == "__main__":
    FILE.write_text(page(FILE.read_text()))
