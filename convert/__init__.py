"""Quantize checkpoints with GPTQ, one decoder layer at a time.

>>> from lowmem.convert import convert
>>> from lowmem.config import QuantConfig
>>> convert("./starchat-alpha", "./starchat-4bit", QuantConfig(bits=4))   # doctest: +SKIP

The converter, and torch with it, is imported when one of these names is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowmem.convert.calibration import CalibrationSpec as CalibrationSpec
    from lowmem.convert.pipeline import convert as convert
    from lowmem.convert.progress import Reporter as Reporter
    from lowmem.convert.recipe import ConvertOptions as ConvertOptions
    from lowmem.convert.recipe import LinearSettings as LinearSettings
    from lowmem.convert.recipe import Recipe as Recipe
    from lowmem.convert.result.finish import ResultSummary as ResultSummary

_MODULES = {
    "CalibrationSpec": "calibration",
    "ConvertOptions": "recipe",
    "LinearSettings": "recipe",
    "Recipe": "recipe",
    "Reporter": "progress",
    "ResultSummary": "result.finish",
    "convert": "pipeline",
}
__all__ = [
    "CalibrationSpec",
    "ConvertOptions",
    "LinearSettings",
    "Recipe",
    "Reporter",
    "ResultSummary",
    "convert",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"lowmem.convert.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'lowmem.convert' has no attribute {name!r}")
