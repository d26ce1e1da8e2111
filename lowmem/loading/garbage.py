"""Python's collector of cyclic garbage, left out where it only costs time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collection() -> Iterator[None]:
    """No automatic collection inside; afterwards as it was. Also a decorator.

    For what makes many objects that stay: libraries that are imported, a model that is built. The collector
    looks through all of them again and again, a fifth of the time of importing torch and transformers, a
    third of loading a tokenizer and a model of 40 layers, and finds nothing.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
