"""Run StarChat Alpha, and models like it, in little memory.

>>> import lowmem
>>> model, tokenizer = lowmem.load("HuggingFaceH4/starchat-alpha")   # doctest: +SKIP

Nothing is imported until it is asked for: `import lowmem` costs nothing.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "make_plan", "open_model"]


def __getattr__(name: str) -> Any:
    if name in ("load", "make_plan", "open_model"):
        from lowmem import api

        return getattr(api, name)
    raise AttributeError(f"module 'lowmem' has no attribute {name!r}")
