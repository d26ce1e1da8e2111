"""Rules of the code: imports go one way, files and functions stay small, nothing untrusted is executed."""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A package may import from itself and from packages of a lower rank.
RANKS = {
    "lowmem": 0,
    "lowmem.errors": 0,
    "lowmem.platform": 0,
    "lowmem.config": 1,
    "lowmem.debug": 1,
    "lowmem.cards": 1,
    "lowmem.text": 1,
    "lowmem.checkpoint": 2,
    "lowmem.models": 3,
    "lowmem.kernels": 4,
    "lowmem.plan": 5,
    "lowmem.generate": 6,
    "lowmem.engines": 6,
    "lowmem.export": 6,
    "lowmem.streaming": 6,
    "lowmem.loading": 7,
    "lowmem.prompts": 8,
    "lowmem.grammars": 8,
    "lowmem.answer": 9,
    "lowmem.session": 10,
    "lowmem.chat": 11,
    "lowmem.server": 11,
    "lowmem.doctor": 11,
    "lowmem.api": 11,
    "lowmem.transformers_patch": 11,
    "lowmem.commands": 12,
    "lowmem.cli": 13,
    "lowmem.__main__": 14,
    "lowmem.convert": 15,
    "lowmem.benchmarks": 16,
    "lowmem.benchmarks.experiments": 17,
}
FOLDERS = {"lowmem": "lowmem", "convert": "lowmem.convert", "benchmarks": "lowmem.benchmarks"}
FILES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))
SOURCES = sorted(
    p
    for folder in FOLDERS
    for p in (ROOT / folder).rglob("*")
    if p.suffix in (".py", ".c", ".h", ".js", ".css")
)
MOST_LINES = 400
MOST_PARAMETERS = 6
"""self and cls not counted."""
LONG_SIGNATURES = {
    "lowmem.generate.attention.row_attention": "transformers calls it with these arguments",
    "lowmem.generate.grouped_attention.grouped_attention": "transformers calls it with these arguments",
}
"""Functions past MOST_PARAMETERS, and why."""


def module_of(path: Path) -> str:
    """`convert/math/gptq.py` → `lowmem.convert.math.gptq`."""
    first, *parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[first], *(parts[:-1] if parts[-1] == "__init__" else parts)])


def room_of(module: str) -> str:
    """`lowmem.checkpoint.packing` → `lowmem.checkpoint`."""
    parts = module.split(".")
    return ".".join(parts[: 3 if parts[1:3] == ["benchmarks", "experiments"] else 2])


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> set[str]:
    """The modules of lowmem that a file imports, also inside functions; not under TYPE_CHECKING."""
    found = set()
    skipped = {
        id(node)
        for branch in ast.walk(tree_of(path))
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree_of(path)):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module_of(path).split(".")[: -node.level] if node.level else []
            module = ".".join([*parts, *filter(None, [node.module])])
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else module for name in names}
    return {name for name in found if name.split(".")[0] == "lowmem"}


MODULES = {module_of(path): path for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = room_of(module_of(path))
    assert own in RANKS, f"{own} is a new package: give it a rank here and a place in ARCHITECTURE.md"
    for name in imports_of(path):
        other = room_of(name)
        assert other == own or RANKS[other] < RANKS[own], f"{path.name} of {own} imports {name}"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan's algorithm)."""
    found: list[list[str]] = []
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_circles_finds_a_circle():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]


def test_no_import_circles():
    graph = {module: imports_of(path) & MODULES.keys() - {module} for module, path in MODULES.items()}
    assert circles(graph) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_long(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{path.relative_to(ROOT)} has {lines} lines: split it"


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Triton's language passes pointers, sizes and constants one by one."""
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def test_no_function_takes_many_parameters():
    long = {}
    for module, path in MODULES.items():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                count = sum(a.arg not in ("self", "cls") for a in arguments)
                if count > MOST_PARAMETERS:
                    long[f"{module}.{node.name}"] = count
    assert long.keys() == LONG_SIGNATURES.keys(), long


def test_no_pickle_but_torchs_own_safe_loading():
    """Nothing untrusted is executed: no pickle, no eval, no remote code anywhere."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {"marshal", "shelve", "dill", "cloudpickle"} & {a.name for a in node.names}, path
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                assert node.attr == "UnpicklingError", path  # torch's refusal; nothing is unpickled by us
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                # One place runs generated code, and nothing else: behind benchmarks/humaneval/lockdown.py.
                assert name not in ("eval", "exec") or path.name == "sandbox_child.py", path
                if name == "torch.load":
                    flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert flags.get("weights_only") == "True", path
                for keyword in node.keywords:
                    if keyword.arg == "trust_remote_code":
                        assert ast.unparse(keyword.value) == "False", path


def test_only_the_platform_package_needs_an_operating_system() -> None:
    """Modules that some systems lack are imported there alone, and inside the sandbox, which is Linux's."""
    lacking = {"fcntl", "grp", "msvcrt", "posix", "pty", "pwd", "resource", "termios", "tty", "winreg"}
    allowed = ("lowmem.platform.", "lowmem.benchmarks.humaneval.lockdown", "lowmem.benchmarks.experiments.")
    found = {
        f"{module_of(path)} imports {name}"
        for path in FILES
        if not module_of(path).startswith(allowed)
        for node in ast.walk(tree_of(path))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
        if name.partition(".")[0] in lacking
    }
    assert found == set()


def test_every_package_is_installed() -> None:
    """The list in pyproject.toml names every folder with an __init__.py, or a wheel would lack it."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    roots = {"lowmem": "lowmem", "convert": "lowmem.convert", "benchmarks": "lowmem.benchmarks"}
    found = {
        ".".join((roots[root], *file.parent.relative_to(ROOT / root).parts))
        for root in roots
        for file in (ROOT / root).rglob("__init__.py")
        if "experiments" not in file.parts
    }
    assert set(listed) == found
