"""A live server on the loopback address with tiny-starchat, whose model a test can hold."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import openai
import torch

from lowmem.answer import Answer, Response
from lowmem.config import SamplingParams
from lowmem.generate.prefix_store import PrefixStore
from lowmem.generate.sequence import Token
from lowmem.loading.loader import LoadedModel, LoadOptions, load
from lowmem.server.app import TIME_LIMIT, make_app
from lowmem.server.guard import GuardSettings
from lowmem.server.running import Server, bind, url_of
from lowmem.server.worker import Worker
from lowmem.session import Session
from tests.helpers import TINY_STARCHAT

MODEL = "tiny-starchat"
PATIENCE = 60.0
"""Seconds until a test stops waiting for an event. No event should take this long."""


@lru_cache(1)
def tiny() -> LoadedModel:
    """tiny-starchat, loaded once per process.

    In float32, where a cached prefix changes the logits of an unquantized model by only about 1e-6.
    """
    return load(TINY_STARCHAT, LoadOptions(dtype=torch.float32))


@lru_cache(1)
def oracle() -> Session:
    """A separate session to compare with. It shares no engine with a server."""
    return Session(load(TINY_STARCHAT, LoadOptions(dtype=torch.float32)))


HERMES = """\
{%- if tools -%}
{{- 'Tools: ' + (tools | tojson) + ' Answer: <tool_call>{"name": N, "arguments": A}</tool_call>' -}}
{%- endif -%}
{%- for m in messages -%}
{{- '<|' + m.role + '|>' + (m.content or '') -}}
{%- for c in m.tool_calls or [] %}{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor -%}
{{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif -%}
"""


def with_tools() -> LoadedModel:
    """tiny-starchat with a chat template that shows tools."""
    tokenizer = copy.deepcopy(tiny().tokenizer)
    tokenizer.chat_template = HERMES
    return replace(tiny(), tokenizer=tokenizer, dialogue=None)


class Gate:
    """A gate that holds the model's thread until the test lets it continue."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._closed_at: int | None = None
        self._at = 0
        self.fault: Exception | None = None
        """An exception to raise once, at the next token."""

    def close(self, at: int = 0) -> None:
        """Hold the model after `at` tokens of an answer; 0 holds it before the prefill."""
        with self._condition:
            self._closed_at = at

    def open(self) -> None:
        """Let the model continue."""
        with self._condition:
            self._closed_at = None
            self._condition.notify_all()

    def wait_until_held(self) -> None:
        """Wait until the model is held at the gate."""
        with self._condition:
            came = self._condition.wait_for(
                lambda: self._closed_at is not None and self._at >= self._closed_at, PATIENCE
            )
            assert came, "the model did not reach the gate"

    def start(self) -> None:
        """An answer begins."""
        with self._condition:
            self._at = -1

    def pass_through(self) -> None:
        """Called at each step of the model; waits here while the gate is closed."""
        with self._condition:
            self._at += 1
            self._condition.notify_all()
            opened = self._condition.wait_for(
                lambda: self._closed_at is None or self._at < self._closed_at, PATIENCE
            )
            assert opened, "the gate was not opened"
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault


class GatedSession(Session):
    """A session that passes the gate before its prefill and after every token."""

    gate: Gate

    def begin(
        self,
        ids: Sequence[int],
        params: SamplingParams = SamplingParams(),  # noqa: B008
        **options: Any,
    ) -> Answer:
        self.gate.start()
        self.gate.pass_through()
        answer = super().begin(ids, params, **options)
        push = answer._push

        def gated(token: Token) -> Response | None:
            self.gate.pass_through()
            return push(token)

        answer._push = gated  # type: ignore[method-assign]
        return answer


@dataclass
class Live:
    """A running server, its worker and its clients."""

    url: str
    worker: Worker
    gate: Gate
    server: Server
    log: list[str] = field(default_factory=list)

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """OpenAI's client, without retries unless `options` say otherwise."""
        options = {"max_retries": 0, "timeout": PATIENCE, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **options)


@contextmanager
def live_server(
    *,
    queue_limit: int = 32,
    time_limit: float = TIME_LIMIT,
    guard: GuardSettings | None = None,
    context: int | None = None,
    host: str = "127.0.0.1",
    shutdown_seconds: float = 30.0,
    names: tuple[str, ...] = (MODEL,),
    ignored: tuple[str, ...] = (),
    loaded: LoadedModel | None = None,
    slots: int = 1,
) -> Iterator[Live]:
    """Run a server in a thread of this process, and stop it at the end of the context.

    loaded: by default tiny-starchat.
    """
    gate, log = Gate(), []
    GatedSession.gate = gate

    def open_session() -> Session:
        session = GatedSession(loaded or tiny(), context=context, slots=slots)
        session.gate = gate
        session.engine.store = PrefixStore(16 << 20)
        return session

    worker = Worker(open_session, queue_limit=queue_limit, report=lambda error: log.append(repr(error)))
    worker.start()
    app = make_app(
        worker,
        names,
        guard=guard or GuardSettings(),
        time_limit=time_limit,
        log=log.append,
        ignored=ignored,
    )
    listening = threading.Event()
    with bind(host, 0) as listener:
        server = Server(app, worker, shutdown_seconds=shutdown_seconds, listening=listening.set)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        url = url_of(listener)
        thread.start()
        assert listening.wait(PATIENCE)
        try:
            yield Live(url, worker, gate, server, log)
        finally:
            gate.open()
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the server did not end"
            assert worker.join(PATIENCE), "the model's thread did not end"


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until another thread makes the condition true."""
    waiting = threading.Event()
    for _ in range(int(PATIENCE * 100)):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("the condition did not become true")
