"""A live server on loopback whose model answers from a script, or for itself if no script matches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn

from lowmem.api import open_model
from lowmem.config import SamplingParams
from lowmem.server.app import make_app
from lowmem.server.guard import GuardSettings
from lowmem.server.worker import Worker
from lowmem.session import Response, Session
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

    def continue_ids(
        self,
        ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        on_prefill: Callable[[int, int], None] | None = None,
        on_token: Callable[[], None] | None = None,
    ) -> Iterator[Response]:
        params = params or SamplingParams()
        prompt = self.loaded.tokenizer.decode(list(ids))
        self.prompts.append(prompt)
        self.params.append(params)
        question = prompt.rsplit("<|user|>", 1)[-1]
        for key, pieces in self.scripts.items():
            if key in question:
                return self._play(pieces, len(ids), params, on_prefill, on_token)
        return super().continue_ids(ids, params, on_prefill=on_prefill, on_token=on_token)

    def _play(self, pieces, prompt_tokens, params, on_prefill, on_token) -> Iterator[Response]:
        texts = [piece for piece in pieces if piece is not HOLD]
        said = 0
        for piece in pieces:
            if piece is HOLD:
                while not self.go.acquire(timeout=0.02):
                    on_prefill(0, 1)  # raises if the request was cancelled
                continue
            on_token()
            said += 1
            reason = "stop" if said == len(texts) else "length" if said == params.max_new_tokens else None
            yield Response(piece, reason, prompt_tokens, 0, said, 0.01, 100.0)
            if reason:
                return


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
