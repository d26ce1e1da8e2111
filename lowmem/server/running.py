"""Runs an application with uvicorn until a signal ends it; stalled connections are closed."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lowmem.errors import InvalidRequestError
from lowmem.platform import system
from lowmem.server.worker import Worker

MOST_CONNECTIONS = 512
"""Most open connections; further ones are closed at once."""
STALLED_SECONDS = 30.0
"""A connection is closed if its client does not read, or sends no complete request head, for this long."""
_SEND_BUFFER = 128 << 10  # bytes of kernel memory per connection; the default is megabytes
_LAST_WORDS = 5  # seconds to send errors after the time for answers is over
_INTERRUPTED = 130


class Connection(H11Protocol):
    """A connection that is closed when its client neither reads nor sends."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept the connection, or close it if there are too many."""
        super().connection_made(transport)
        own: socket.socket = transport.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._stalled: asyncio.TimerHandle | None = None
        self._idle: object = self  # the last request, if it was over at the last look
        self._look = self.loop.call_later(STALLED_SECONDS, self._end_if_idle)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up after the connection."""
        self._look.cancel()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads too slowly: close the connection unless it resumes in time."""
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _end_if_idle(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._idle is self.cycle:
            self.transport.abort()
            return
        self._idle = self.cycle if idle else self
        self._look = self.loop.call_later(STALLED_SECONDS, self._end_if_idle)


class Server(uvicorn.Server):
    """Shuts down gracefully at the first signal, and exits at once at the second."""

    def __init__(
        self,
        app: Any,
        worker: Worker,
        *,
        shutdown_seconds: float,
        listening: Callable[[], None] = lambda: None,
        notify: Callable[[str], None] = lambda line: None,
    ) -> None:
        """shutdown_seconds: time for running answers. listening: called once requests are accepted."""
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # clients are identified by the address of the connection
                timeout_graceful_shutdown=int(shutdown_seconds) + _LAST_WORDS,
            )
        )
        self._worker, self._shutdown_seconds = worker, shutdown_seconds
        self._listening, self._notify = listening, notify

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then call `listening`."""
        await super().startup(sockets)
        self._listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse waiting requests, finish running answers, and stop them when the time is over."""
        self._worker.close()
        timer = asyncio.get_running_loop().call_later(self._shutdown_seconds, self._worker.abandon)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
            self._worker.abandon()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle Ctrl-C and SIGTERM while the server runs."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in system.END_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal shuts down gracefully, the second exits at once."""
        if self.should_exit:
            sys.stderr.flush()
            os._exit(_INTERRUPTED)  # the model's thread may be in the middle of a forward pass
        self.should_exit = True
        if self._worker.busy:
            self._notify("finishing the current answer; press Ctrl-C again to exit at once")


def bind(host: str, port: int) -> socket.socket:
    """A bound socket. Raises InvalidRequestError if the address cannot be used."""
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:  # UnicodeError: not a host name
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise InvalidRequestError(
                f"{where} is in use", "Choose another --port, or 0 for a free one"
            ) from error
        reason = (isinstance(error, OSError) and error.strerror) or "it is not an address"
        raise InvalidRequestError(
            f"cannot listen at {where}: {reason}", "Use --host 127.0.0.1, or an address of this machine"
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """The URL of the server."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
