"""API keys, as requests carry them.

vLLM's process imports a copy (lowmem/engines/vllm_door.py), so only Python's standard library is used.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence


class WrongKeyError(Exception):
    """A request has no key, or a wrong one; the message is for its sender."""


def digest(key: str) -> bytes:
    """A digest of fixed length, so that comparing takes the same time for all keys."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def number_of_key(authorization: str, digests: Sequence[bytes]) -> int:
    """Which of the keys an Authorization header has, counted from 1. Raises WrongKeyError."""
    kind, _, given = authorization.partition(" ")
    found = digest(given.strip())
    # Compare with all keys, so that the time does not depend on which one matches.
    same = [hmac.compare_digest(found, known) for known in digests]
    if kind.lower() != "bearer" or True not in same:
        what = "Incorrect API key provided" if given else "You didn't provide an API key"
        raise WrongKeyError(f"{what}. Send it as Authorization: Bearer KEY")
    return same.index(True) + 1
