"""Run StarChat Alpha, and models like it, in little memory.

>>> import lowmem
>>> model, tokenizer = lowmem.load("HuggingFaceH4/starchat-alpha")   # doctest: +SKIP

Each name below is imported on first use, so that `import lowmem` costs nothing. `__init__.pyi` has the types.
"""

__version__ = "0.1.0"

_MODULES = {
    "Grammar": "config",
    "LowmemError": "errors",
    "ModelRequest": "plan.request",
    "QuantConfig": "config",
    "SamplingParams": "config",
    "Session": "session",
    "load": "api",
    "make_plan": "api",
    "open_model": "api",
    "patch_transformers": "transformers_patch",
}
"""Public name → the module of lowmem that defines it. `convert` is a subpackage: lowmem.convert.convert."""

__all__ = [
    "Grammar",
    "LowmemError",
    "ModelRequest",
    "QuantConfig",
    "SamplingParams",
    "Session",
    "__version__",
    "load",
]
__all__ += ["make_plan", "open_model", "patch_transformers"]


def __getattr__(name: str) -> object:
    import importlib

    if name == "convert":
        return importlib.import_module("lowmem.convert")
    if name in _MODULES:
        return getattr(importlib.import_module(f"lowmem.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'lowmem' has no attribute {name!r}")
