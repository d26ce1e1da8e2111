"""Limits on oneDNN's caches: on a CPU torch compiles a routine for every number of rows that it multiplies.

Prompts differ in length, and two caches keep 1024 routines each, of up to 0.3 MiB: a chat with a bfloat16
model grew by hundreds of MiB that the plan does not count. A step and its drafts need a few dozen.
"""

from __future__ import annotations

import os

MAX_ROUTINES = 64
_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and torch's


def limit_primitive_caches() -> None:
    """Let the caches keep MAX_ROUTINES, unless their environment variables are set.

    They are read at a process's first product; later calls have no effect.
    """
    for variable in _VARIABLES:
        os.environ.setdefault(variable, str(MAX_ROUTINES))
