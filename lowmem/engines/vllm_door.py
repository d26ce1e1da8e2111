"""What every request to vLLM must pass: host name, origin, API key, size. vLLM imports this file, not lowmem.

vLLM's own key guards only some of its paths (not /invocations, which answers prompts), and it takes every
Host header, so that a web page can reach it by DNS rebinding. The rules are those of our own server's guard
(lowmem/server/guard.py). Only Python's standard library is used, and what `copy_door` copies beside this file
into a folder that vLLM's environment imports from; so imports among those files are relative.
"""

from __future__ import annotations

import json
import os
from typing import Any

from ..text.addresses import OWN_NAMES, host_name, same_address
from ..text.api_keys import WrongKeyError, digest, number_of_key
from . import vllm_trim

VARIABLE = "LOWMEM_DOOR"
OPEN = ("/health",)
"""Paths that need no key."""


class Refused(Exception):
    """A request that is not passed on."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Door:
    """An ASGI layer around vLLM's application; its rules are JSON in $LOWMEM_DOOR."""

    def __init__(self, app: Any) -> None:
        rules = json.loads(os.environ.get(VARIABLE) or "{}")
        self._app = app
        self._names = {name.lower() for name in (*OWN_NAMES, *rules["hosts"])}
        self._keys = [digest(key) for key in rules["keys"]]
        self._trims = bool(rules.get("trims"))
        self._origins, self._most = set(rules["origins"]), int(rules["max_body"])

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it. Connections of other kinds than HTTP's (WebSocket) are closed."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        started = False
        too_large: list[Refused] = []

        async def sending(message: Any) -> None:
            nonlocal started
            if too_large and not started:
                raise too_large[0]  # FastAPI has made an answer of its own of what `receive` raised
            started = True
            await send(message)

        try:
            self._check(scope, _headers(scope))
            trims = self._trims and scope["path"] == vllm_trim.PATH
            passed = vllm_trim.Trimmed(sending) if trims else sending
            await self._app(scope, self._limited(receive, too_large), passed)
        except Refused as refused:
            if not started:
                await _send_refusal(refused, send)

    def _check(self, scope: Any, headers: dict[str, list[str]]) -> None:
        hosts = headers.get("host", [])
        name = host_name(hosts[0]) if len(hosts) == 1 else None
        if name is None or (name not in self._names and not same_address(name, scope.get("server"))):
            message = "The host name is not allowed. Start the server with --allow-host NAME to allow it"
            raise Refused(403, message, "host_not_allowed")
        self._check_origin(scope, headers, hosts[0])
        if scope["method"] == "OPTIONS":
            return
        if self._keys and not (scope["method"] in ("GET", "HEAD") and scope["path"] in OPEN):
            self._check_key(headers)
        length = headers.get("content-length", ["0"])[0]
        if length.isdecimal() and int(length[:20]) > self._most:
            raise self._too_large()

    def _check_origin(self, scope: Any, headers: dict[str, list[str]], host: str) -> None:
        """Require that a page which sends more than GET is of an allowed origin, or the server's own."""
        origin = headers.get("origin", [""])[0]
        own = origin in (f"http://{host}", f"https://{host}")
        if not origin or own or scope["method"] in ("GET", "HEAD") or {origin, "*"} & self._origins:
            return
        message = (
            "Pages of this origin may not use this server. Start it with --allow-origin ORIGIN to allow them"
        )
        raise Refused(403, message, "origin_not_allowed")

    def _check_key(self, headers: dict[str, list[str]]) -> None:
        try:
            number_of_key(headers.get("authorization", [""])[0], self._keys)
        except WrongKeyError as error:
            raise Refused(401, str(error), "invalid_api_key") from None

    def _limited(self, receive: Any, too_large: list[Refused]) -> Any:
        size = 0

        async def receiving() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._most:
                too_large.append(self._too_large())
                raise too_large[0]
            return message

        return receiving

    def _too_large(self) -> Refused:
        return Refused(413, f"The request is larger than {self._most} bytes", "request_too_large")


def _headers(scope: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


async def _send_refusal(refused: Refused, send: Any) -> None:
    error = {"message": str(refused), "type": "invalid_request_error", "param": None, "code": refused.code}
    content = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refused.status == 413:
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
