"""Checks every request and response: host, origin, key, size, headers; writes the log.

A page in a browser can send requests to every address that the browser can reach, including this server.
Therefore the Host header must name this server (against DNS rebinding), the Origin must be this server's own
page, and a body must be declared as JSON, which pages of other origins may not send without CORS permission.
Only origins that `--allow-origin` names get CORS headers.
"""

from __future__ import annotations

import asyncio
import secrets
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lowmem import debug
from lowmem.errors import LowmemError
from lowmem.server.answers import to_json
from lowmem.server.api_errors import ApiError, failed, short
from lowmem.server.cors import Origins, cors_headers, own_origin, preflight_headers
from lowmem.server.metrics import Metrics, Note, put_note
from lowmem.server.paths import as_meant
from lowmem.text.addresses import OWN_NAMES, host_name, same_address
from lowmem.text.api_keys import WrongKeyError, digest, number_of_key

BODY_SECONDS = 60.0
"""Seconds for a request's body to arrive."""
BODIES_AT_ONCE = 4
"""All bodies in memory together may have this many times the size of the largest allowed body."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_MOST_TOLD = 100  # origins
# Messages of these describe memory or devices; messages of other errors may quote a request.
_TELLING = (RuntimeError, OSError, MemoryError, LowmemError)


@dataclass(frozen=True)
class GuardSettings:
    """What the guard accepts."""

    hosts: tuple[str, ...] = ()
    """Allowed Host names, besides the loopback names and the address of the connection."""
    keys: tuple[str, ...] = ()
    """API keys, each of which is valid; empty if no key is needed."""
    max_body: int = 2 << 20
    """Bytes of the largest body."""
    origins: tuple[str, ...] = ()
    """Further origins whose pages may use the server; see `cors.Origins`."""


class Guard:
    """The outermost ASGI layer of the application."""

    def __init__(
        self, app: ASGIApp, settings: GuardSettings, metrics: Metrics, log: Callable[[str], None]
    ) -> None:
        self._app, self._settings, self._metrics, self._log = app, settings, metrics, log
        self._names = {name.lower() for name in (*OWN_NAMES, *settings.hosts)}
        self._digests = [digest(key) for key in settings.keys]
        self._origins = Origins(settings.origins)
        self._told: set[str] = set()  # refused origins that are in the log
        self._bodies = 0  # bytes of all bodies in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            return
        client = scope["client"][0] if scope["client"] else "local"
        note = Note(f"req_{secrets.token_hex(8)}", scope["method"], client)
        put_note(scope, note)
        started = False
        held: list[bytes] = []  # the body, part by part
        headers = Headers(scope=scope)
        origin = headers.get("origin", "")
        cors = cors_headers(origin) if self._origins.allow(origin) else {}
        scope = as_meant(scope)

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                note.status = message["status"]
                _add_headers(message, note, cors)
            await send(message)

        async def refuse(error: ApiError) -> None:
            await _send_error(error, sending)

        try:
            self._check_host(scope, headers)
            self._check_origin(scope, headers)
            if scope["method"] == "OPTIONS":
                await _send_options(headers, bool(cors), sending)
                return
            self._check(scope, headers, note)
            if scope["method"] == "POST":
                await self._read(headers, receive, held)
            await self._app(scope, _replayed(b"".join(held), receive), sending)
        except ApiError as error:
            if not started:
                await refuse(error)
        except Exception as error:
            self._log(explain(error, note.id))
            if not started:
                await refuse(failed())
        finally:
            self._bodies -= sum(map(len, held))
            note.route = getattr(scope.get("route"), "path", "-")
            self._metrics.ended(note)
            self._log(note.line())

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """Require that a page which sends more than GET is this server's own, or of an allowed origin."""
        origin = headers.get("origin")
        if origin is None or scope["method"] in ("GET", "HEAD") or self._origins.allow(origin):
            return
        if own_origin(origin, headers.get("host", "")):
            return
        message = (
            f"Pages of {short(origin)!r} may not use this server. "
            f"Start it with --allow-origin {short(origin) or 'ORIGIN'} to allow them"
        )
        if origin not in self._told and len(self._told) < _MOST_TOLD:
            self._told.add(origin)
            self._log(message)  # browsers do not show the response
        raise ApiError(403, message, code="origin_not_allowed")

    def _check(self, scope: Scope, headers: Headers, note: Note) -> None:
        if self._digests and not is_open(scope["method"], scope["path"]):
            note.client = self._key(headers)
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json" or "content-encoding" in headers:
                raise ApiError(
                    415,
                    "Send the body as JSON, with Content-Type: application/json and without Content-Encoding",
                    code="unsupported_media_type",
                )

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        """Require one Host header with a known name or the address of the connection."""
        given = headers.getlist("host")
        name = host_name(given[0]) if len(given) == 1 else None
        if name is None or (name not in self._names and not same_address(name, scope.get("server"))):
            raise ApiError(
                403,
                f"The host name {short(', '.join(given))!r} is not allowed. "
                "Start the server with --allow-host NAME to allow it",
                code="host_not_allowed",
            )

    def _key(self, headers: Headers) -> str:
        """The client of a key; raises ApiError if the key is wrong or missing."""
        try:
            return f"key {number_of_key(headers.get('authorization', ''), self._digests)}"
        except WrongKeyError as error:
            bearer = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, str(error), code="invalid_api_key", headers=bearer) from None

    async def _read(self, headers: Headers, receive: Receive, held: list[bytes]) -> None:
        """Read the body into `held`; raises ApiError as soon as it exceeds a limit of size or time."""
        most = self._settings.max_body
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > most:
            raise _too_large(most)
        size = 0
        loop = asyncio.get_running_loop()
        until = loop.time() + BODY_SECONDS
        while True:
            try:
                message = await asyncio.wait_for(receive(), until - loop.time())
            except TimeoutError:
                raise ApiError(
                    408, f"The request did not arrive within {BODY_SECONDS:g} s", code="body_timeout"
                ) from None
            if message["type"] == "http.disconnect":
                raise ApiError(499, "the client has disconnected", code="left")
            part = message.get("body", b"")
            size += len(part)
            if size > most:
                raise _too_large(most)
            if self._bodies + len(part) > BODIES_AT_ONCE * most:
                raise ApiError(
                    503,
                    "The server receives too much data at once. Try again in a moment",
                    kind="server_error",
                    code="overloaded",
                    headers={"Retry-After": "2"},
                )
            self._bodies += len(part)
            held.append(part)
            if not message.get("more_body"):
                return


def is_open(method: str, path: str) -> bool:
    """Whether a request needs no key: the files of the page, and /health."""
    if method not in ("GET", "HEAD"):
        return False
    return path in ("/", "/health") or (path.startswith("/page/") and path != "/page/status")


def explain(error: BaseException, about: str) -> str:
    """The log entry of an internal error: its place, and its message unless that may quote a request.

    With --debug a traceback follows.
    """
    message = f": {str(error).splitlines()[0][:300]}" if isinstance(error, _TELLING) and str(error) else ""
    line = f"{about}: internal error: {type(error).__name__}{message}{debug.place_of(error)}"
    frames = "".join(traceback.format_tb(error.__traceback__)) if debug.enabled() else ""
    return f"{line}\n{frames}".rstrip("\n")


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"The request is larger than {most} bytes", code="request_too_large")


def _add_headers(message: Message, note: Note, cors: dict[str, str]) -> None:
    headers = MutableHeaders(raw=message.setdefault("headers", []))
    for name, value in (_HEADERS | cors).items():
        headers[name] = value
    headers.setdefault("Cache-Control", "no-store")
    headers["X-Request-Id"] = note.id


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive`, preceded by the body that has been read."""
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay


async def _send_options(headers: Headers, cors: bool, send: Send) -> None:
    """Answer OPTIONS, which needs no key: a browser asks before it sends one. cors: the origin is allowed."""
    found = {"Allow": "GET, HEAD, POST, OPTIONS"}
    if cors and "access-control-request-method" in headers:
        private = headers.get("access-control-request-private-network") == "true"
        found |= preflight_headers(headers.get("access-control-request-headers", ""), private)
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in found.items()]
    await send({"type": "http.response.start", "status": 204, "headers": raw})
    await send({"type": "http.response.body", "body": b""})


async def _send_error(error: ApiError, send: Send) -> None:
    content = to_json(error.body())
    headers = {"content-type": "application/json", "content-length": str(len(content)), **error.headers}
    if error.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": content})
