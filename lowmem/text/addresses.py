"""Host names and addresses, as they appear in requests and options.

vLLM's process imports a copy (lowmem/engines/vllm_door.py), so only Python's standard library is used.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Any

OWN_NAMES = ("localhost", "127.0.0.1", "::1")
"""What a Host header may always name."""


def host_name(host: str) -> str | None:
    """The lower-case name in a Host header, without the port; None if it is not valid."""
    host = host.strip().lower()
    if host.startswith("["):
        name, bracket, port = host[1:].partition("]")
        port = port.removeprefix(":")
        if not bracket:
            return None
    else:
        name, _, port = host.partition(":")
    if not re.fullmatch(r"[a-z0-9._:%-]+", name) or (port and not (port.isascii() and port.isdecimal())):
        return None
    return name.rstrip(".")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listening address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def same_address(name: str, server: Sequence[Any] | None) -> bool:
    """Whether a name is the numeric address of the connection. A web page cannot forge that."""
    try:
        return server is not None and _address(name) == _address(str(server[0]))
    except ValueError:
        return False


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
