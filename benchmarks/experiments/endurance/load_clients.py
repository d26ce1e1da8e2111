"""The clients of `serve_load`: what they ask, and how they judge the answers."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

SERVED = "model"
"""The model's name."""


FUNCTION = {
    "name": "function",
    "schema": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "arguments": {"type": "integer"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    },
}
"""Some answers must match this."""


def _chat(rest: str) -> bytes:
    return b'{"model": "model", "messages": [{"role": "user", "content": ' + rest.encode() + b"}"


MALFORMED: tuple[tuple[str, bytes], ...] = (
    ("no JSON", b'{"model": '),
    ("brackets", b"[" * 50_000),
    ("no messages", b'{"model": "model", "messages": []}'),
    ("no text", _chat('{"a": 1}') + b"]}"),
    ("no number", _chat('"x"') + b'], "temperature": "hot"}'),
    ("no such model", _chat('"x"').replace(b'"model": "model"', b'"model": "other"') + b"]}"),
    ("a forced tool", _chat('"x"') + b'], "tool_choice": "required"}'),
    ("too long", _chat('"' + "word " * 50_000 + '"') + b"]}"),
    ("too large", b" " * (3 << 20)),
)
"""Bodies that must be answered with a 4xx."""


@dataclass(frozen=True)
class Asked:
    """A request, and the answer that it got alone."""

    path: str
    body: dict[str, Any]
    answer: str = ""


@dataclass
class Tally:
    """What came of all requests."""

    right: int = 0
    wrong: int = 0
    left: int = 0
    """Clients that disconnected."""
    malformed: int = 0
    """Malformed requests that were refused."""
    busy: int = 0
    """429s: the queue was full."""
    tokens: int = 0
    unexpected: Counter[str] = field(default_factory=Counter)
    """Statuses and errors that must not occur, by kind."""
    first_token: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    def compare(self, text: str, asked: Asked) -> None:
        """Count an answer as right or wrong."""
        self.right += text == asked.answer
        self.wrong += text != asked.answer


def requests_of(count: int, seed: int) -> list[Asked]:
    """Different requests of every kind: chats, also with a schema, completions, fill-in; greedy or seeded."""
    dice = random.Random(seed)
    things = ("list", "dictionary", "file", "string", "socket", "thread", "matrix", "date", "queue", "tree")
    deeds = ("sorts", "reverses", "reads", "copies", "prints", "merges", "counts", "checks")
    made = []
    for number in range(count):
        what = f"Write function number {number} that {dice.choice(deeds)} a {dice.choice(things)}."
        sampling = {"temperature": 1.0, "seed": number} if number % 3 == 1 else {"temperature": 0}
        body: dict[str, Any] = {"model": SERVED, "max_tokens": dice.choice((8, 24, 60)), **sampling}
        path = "/v1/chat/completions"
        if number % 4 == 3:
            path = "/v1/completions"
            body["prompt"] = f"def function_{number}(a, b):\n    "
            if number % 8 == 7:
                body["suffix"] = f"\n\nprint(function_{number}(1, 2))\n"
        else:
            body["messages"] = [{"role": "user", "content": what}]
            if number % 5 == 2:
                body["response_format"] = {"type": "json_schema", "json_schema": FUNCTION}
        made.append(Asked(path, body))
    return made


async def whole_answer(client: httpx.AsyncClient, asked: Asked) -> tuple[str, int]:
    """An answer and its tokens; httpx.HTTPStatusError for any status but 200."""
    response = await client.post(asked.path, json=asked.body)
    response.raise_for_status()
    data = response.json()
    choice = data["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text, data["usage"]["completion_tokens"]


async def streamed_answer(
    client: httpx.AsyncClient, asked: Asked, *, leave_after: int | None = None
) -> tuple[str, float]:
    """The text of a stream and the seconds to its first event; disconnects after `leave_after` events."""
    start, first, events = time.perf_counter(), 0.0, 0
    parts: list[str] = []
    async with client.stream("POST", asked.path, json={**asked.body, "stream": True}) as response:
        if response.status_code != 200:
            await response.aread()
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                return "".join(parts), first
            data = json.loads(line.removeprefix("data: "))
            if "error" in data:
                raise ValueError(f"error event {data['error']['code']}")
            first = first or time.perf_counter() - start
            choice = data["choices"][0]
            parts.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
            events += 1
            if events == leave_after:
                return "".join(parts), first
    raise ValueError("a stream ended without [DONE]")


async def malformed(client: httpx.AsyncClient, asked: Asked, tally: Tally, dice: random.Random) -> None:
    """Send a malformed request."""
    name, body = dice.choice(MALFORMED)
    try:
        response = await client.post(asked.path, content=body, headers={"Content-Type": "application/json"})
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        if name != "too large":  # the server closes the connection unread, which may lose its answer
            raise
        tally.malformed += 1
        return
    if 400 <= response.status_code < 500 and response.json()["error"]["message"]:
        tally.malformed += 1
    else:
        tally.unexpected[f"{name}: {response.status_code}"] += 1


async def visit(client: httpx.AsyncClient, known: Sequence[Asked], tally: Tally, dice: random.Random) -> None:
    """One request of one client, of a random kind."""
    asked, kind = dice.choice(known), dice.random()
    start = time.perf_counter()
    try:
        if kind < 0.15:
            await malformed(client, asked, tally, dice)
        elif kind < 0.25:
            try:
                await asyncio.wait_for(whole_answer(client, asked), dice.uniform(0.01, 0.5))
            except TimeoutError:
                pass
            tally.left += 1
        elif kind < 0.35:
            await streamed_answer(client, asked, leave_after=dice.randint(1, 4))
            tally.left += 1
        else:
            if kind < 0.7:
                text, first = await streamed_answer(client, asked)
                tally.first_token.append(first)
            else:
                text, tokens = await whole_answer(client, asked)
                tally.tokens += tokens
            tally.compare(text, asked)
            tally.whole.append(time.perf_counter() - start)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == 429 and int(error.response.headers["retry-after"]) >= 1:
            tally.busy += 1
            await asyncio.sleep(dice.uniform(0.2, 1.0))
        else:
            tally.unexpected[f"status {error.response.status_code}"] += 1
    except (httpx.HTTPError, ValueError) as error:
        tally.unexpected[f"{type(error).__name__} {str(error)[:60]}"] += 1
