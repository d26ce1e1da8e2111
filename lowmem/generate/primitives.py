"""oneDNN's caches, kept small: on a CPU torch compiles a routine for every number of rows it multiplies.

Every prompt has another length, and two caches keep 1024 routines each, of up to 0.3 MiB each: a chat with a
model in bfloat16 grew by hundreds of MiB that no plan had counted. A step and its drafts need a few dozen.
"""

from __future__ import annotations

import os

MOST_ROUTINES = 64
_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and that of torch


def keep_few() -> None:
    """Let the caches keep MOST_ROUTINES, unless their variables are set.

    They are read at the first product of a process: after that this changes nothing.
    """
    for variable in _VARIABLES:
        os.environ.setdefault(variable, str(MOST_ROUTINES))
