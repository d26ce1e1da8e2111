"""The names of `import lowmem`: imported on first use, typed, each signature written once."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lowmem
from lowmem.errors import RecipeError
from lowmem.plan.request import ModelRequest


def test_import_lowmem_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import lowmem; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['lowmem']"


def test_the_stub_declares_every_public_name() -> None:
    stub = ast.parse(Path(lowmem.__file__).with_suffix(".pyi").read_text())
    imported = {
        alias.asname: (node.module, alias.name)
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(imported) == {*lowmem.__all__, "convert"} - {"__version__"}
    for name, (module, _) in imported.items():
        assert getattr(lowmem, name) is not None
        if name != "convert":
            assert getattr(lowmem, name).__module__ == module
    with pytest.raises(AttributeError, match="no attribute 'covnert'"):
        _ = lowmem.covnert  # type: ignore[attr-defined]


def test_the_functions_take_the_fields_of_a_request() -> None:
    for function in (lowmem.load, lowmem.open_model, lowmem.make_plan):
        assert inspect.signature(function).parameters == inspect.signature(ModelRequest).parameters
        with pytest.raises(RecipeError, match="vram 'much'"):
            function("model", vram="much")
    assert ModelRequest("m", ram="2GiB").ram_bytes == ModelRequest("m", ram=2 << 30).ram_bytes == 2 << 30
    assert callable(lowmem.convert.convert)
