"""Pages of other origins: which ones may use this server, and the CORS headers for their browsers."""

from __future__ import annotations

import re
from collections.abc import Sequence

ANY = "*"
_EXTENSION = re.compile(r"[a-z][a-z0-9+.-]*://\*")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#*]+")
SECONDS = 600
"""How long a browser may remember the answer to a preflight."""


class Origins:
    """The origins that `--allow-origin` names.

    names: origins such as "http://localhost:3000", "app://*" for every origin of a scheme, as extensions of
    editors need, "null" for pages from files, or "*" for all.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._names = {_normal(name) for name in names}

    def allow(self, origin: str) -> bool:
        """Whether pages of an origin may use the server."""
        origin = origin.lower()
        scheme, colon, _ = origin.partition("://")
        return bool(self._names & {ANY, origin, f"{scheme}{colon}*" if colon else origin})


def is_origin(name: str) -> bool:
    """Whether an option's value can be allowed: an origin, a scheme's "app://*", "null" or "*"."""
    name = _normal(name)
    if _EXTENSION.fullmatch(name):
        return not name.startswith(("http:", "https:"))  # "*" says that more clearly
    return name in (ANY, "null") or _ORIGIN.fullmatch(name) is not None


def _normal(name: str) -> str:
    """An option's value as browsers write origins."""
    return name.lower().rstrip("/")


def own_origin(origin: str, host: str) -> bool:
    """Whether an origin is this server's own page. A proxy in front of it may use another scheme."""
    scheme, _, place = origin.lower().partition("://")
    return scheme in ("http", "https") and place == host.lower()


def cors_headers(origin: str) -> dict[str, str]:
    """Headers of every response to an allowed origin."""
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Expose-Headers": "X-Request-Id, Retry-After",
        "Cross-Origin-Resource-Policy": "cross-origin",
        "Vary": "Origin",
    }


def preflight_headers(asked: str, private: bool) -> dict[str, str]:
    """Headers of the response to a preflight.

    asked: the request headers that the page wants to send. private: the browser asks whether a public page
    may reach this private address.
    """
    found = {
        "Access-Control-Allow-Methods": "GET, HEAD, POST, OPTIONS",
        "Access-Control-Allow-Headers": asked or "Authorization, Content-Type",
        "Access-Control-Max-Age": str(SECONDS),
    }
    return found | ({"Access-Control-Allow-Private-Network": "true"} if private else {})
