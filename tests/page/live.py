"""A live server on loopback whose model answers from a script, or for itself if no script matches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import uvicorn

from lowmem.answer import Answer, Response
from lowmem.api import open_model
from lowmem.config import SamplingParams
from lowmem.server.app import make_app
from lowmem.server.guard import GuardSettings
from lowmem.server.worker import Worker
from lowmem.session import Session
from tests.helpers import TINY_STARCHAT

HOLD = object()
"""In a script: wait until the test sets `go`."""


class ScriptedSession(Session):
    """tiny-starchat. If the last question contains the key of a script, the answer is that script's
    pieces."""

    def __init__(self, loaded: Any, scripts: Mapping[str, Sequence[object]]) -> None:
        super().__init__(loaded)
        self.scripts = scripts
        self.go = threading.Semaphore(0)
        self.prompts: list[str] = []
        """The model's input for each request."""
        self.params: list[SamplingParams] = []

    def begin(
        self, ids: Sequence[int], params: SamplingParams | None = None, **options: Any
    ) -> Answer | ScriptedAnswer:
        params = params or SamplingParams()
        prompt = self.loaded.tokenizer.decode(list(ids))
        self.prompts.append(prompt)
        self.params.append(params)
        question = prompt.rsplit("<|user|>", 1)[-1]
        for key, pieces in self.scripts.items():
            if key in question:
                return ScriptedAnswer(self, pieces, len(ids), params.max_new_tokens)
        return super().begin(ids, params, **options)


class ScriptedAnswer:
    """An answer of a script's pieces, one at a time."""

    def __init__(self, session: ScriptedSession, pieces: Sequence[object], prompt: int, most: int) -> None:
        self._session, self._pieces, self._prompt, self._most = session, list(pieces), prompt, most
        self.sequence = SimpleNamespace(new_tokens=0, drafted_tokens=0, accepted_tokens=0)

    def ready(self) -> Iterator[Response]:
        if self._pieces[0] is HOLD:
            if self._session.go.acquire(timeout=0.02):
                del self._pieces[0]
            return
        text, said = self._pieces.pop(0), self.sequence.new_tokens + 1
        self.sequence.new_tokens = said
        over = all(piece is HOLD for piece in self._pieces)
        reason: Any = "stop" if over else "length" if said == self._most else None
        yield Response(str(text), reason, self._prompt, 0, said, 0.01, 100.0)

    def close(self) -> None:
        """Nothing to free."""


class LiveServer:
    """A server in a thread. It can drop its connections, stop, and start again on the same port."""

    def __init__(self, scripts: Mapping[str, Sequence[object]], **options: Any) -> None:
        self.scripts, self.options = scripts, options
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self, loaded: Any = None) -> None:
        queue_limit = self.options.get("queue_limit", 32)
        loaded = loaded or open_model(TINY_STARCHAT, device="cpu")
        self.worker = Worker(lambda: ScriptedSession(loaded, self.scripts), queue_limit=queue_limit)
        self.session: Any = self.worker.start()
        guard = GuardSettings(keys=tuple(self.options.get("keys", ())))
        app = make_app(self.worker, ("tiny-starchat",), guard=guard)
        config = uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="error", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def cut_off(self) -> None:
        """Drop every connection, as if the process had died."""
        for connection in list(self.server.server_state.connections):
            connection.loop.call_soon_threadsafe(connection.transport.abort)

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.worker.abandon()
        self.thread.join(20)
        assert not self.thread.is_alive()
        assert self.worker.join(20)

    def restart(self) -> None:
        """Start another server on the same port with the same model."""
        self.start(self.session.loaded)


@contextmanager
def live_server(scripts: Mapping[str, Sequence[object]], **options: Any) -> Iterator[LiveServer]:
    server = LiveServer(scripts, **options)
    try:
        yield server
    finally:
        if server.thread.is_alive():
            server.stop()


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until the condition holds. The limit is generous: its duration is not part of the test."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.01)
