"""A package imports only from packages of a lower rank, and no file runs untrusted data."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A package may import from itself and from packages of a lower rank.
RANKS = {
    "lowmem": 0,
    "lowmem.errors": 0,
    "lowmem.config": 1,
    "lowmem.text": 1,
    "lowmem.checkpoint": 2,
    "lowmem.models": 3,
    "lowmem.kernels": 4,
    "lowmem.plan": 6,
    "lowmem.generate": 7,
    "lowmem.streaming": 7,
    "lowmem.loading": 8,
    "lowmem.prompts": 8.5,
    "lowmem.session": 9,
    "lowmem.chat": 10,
    "lowmem.server": 10,
    "lowmem.doctor": 10,
    "lowmem.api": 10,
    "lowmem.commands": 11,
    "lowmem.cli": 12,
    "lowmem.__main__": 13,
    "lowmem.convert": 14,
    "lowmem.benchmarks": 15,
    "lowmem.benchmarks.experiments": 16,
}
FOLDERS = {"lowmem": "lowmem", "convert": "lowmem.convert", "benchmarks": "lowmem.benchmarks"}
FILES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    """`convert/math/gptq.py` → `lowmem.convert.math.gptq`."""
    first, *parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[first], *(parts[:-1] if parts[-1] == "__init__" else parts)])


def room_of(module: str) -> str:
    """`lowmem.checkpoint.packing` → `lowmem.checkpoint`; the longest entry of RANKS that contains it."""
    parts = module.split(".")
    room = ".".join(parts[:2])
    return ".".join(parts[:3]) if room == "lowmem.benchmarks" and parts[2:3] == ["experiments"] else room


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] == "lowmem"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = room_of(module_of(path))
    assert own in RANKS, f"{own} is new: give it a rank here and an entry in ARCHITECTURE.md"
    for name in imports_of(path):
        other = room_of(name)
        assert other == own or RANKS[other] < RANKS[own], f"{path.name} of {own} imports {name}"


def test_every_package_is_in_architecture_md():
    picture = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for path in FILES:
        if path.name != "__init__.py":
            assert path.name in picture, f"{path.name} is missing in ARCHITECTURE.md"


def test_no_source_executes_untrusted_data():
    """Nothing untrusted is executed: the sources use no pickle, no eval and no remote code."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {"marshal", "shelve", "dill", "cloudpickle"} & {a.name for a in node.names}, path
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                assert node.attr == "UnpicklingError", path  # the error of torch's restricted unpickler
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                # Only the HumanEval sandbox runs generated code, behind benchmarks/humaneval/lockdown.py.
                assert name not in ("eval", "exec") or path.name == "sandbox_child.py", path
                if name == "torch.load":
                    flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert flags.get("weights_only") == "True", path
                for keyword in node.keywords:
                    if keyword.arg == "trust_remote_code":
                        assert ast.unparse(keyword.value) == "False", path
