"""Quantize checkpoints with GPTQ, one decoder layer at a time: `convert.convert(source, out, ...)`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowmem.convert.pipeline import convert as convert

__all__ = ["convert"]


def __getattr__(name: str) -> Any:
    """Import the converter, and torch with it, when it is first asked for: `lowmem --help` is not."""
    if name == "convert":
        from lowmem.convert.pipeline import convert

        return convert
    raise AttributeError(f"module 'lowmem.convert' has no attribute {name!r}")
