"""The C headers and lowmem/kernels/native/header.py are equal: constants, structures and functions."""

from __future__ import annotations

import ctypes
import re

import pytest

from lowmem.config import BITS
from lowmem.kernels.native import header
from tests.helpers import REPO

CSRC = REPO / "lowmem" / "kernels" / "csrc"
TEXT = re.sub(r"/\*.*?\*/", "", "\n".join(p.read_text() for p in sorted(CSRC.rglob("*.h"))), flags=re.DOTALL)
C_TYPES = {"int16_t": "int16", "int32_t": "int32", "int64_t": "int64", "uint64_t": "uint64", "size_t": "size"}
STRUCTURES = {
    name: value
    for name, value in vars(header).items()
    if isinstance(value, type) and issubclass(value, ctypes.Structure)
}
CONSTANTS = {name: value for name, value in vars(header).items() if isinstance(value, int)}


def c_name(structure: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", structure).lower()


def kind(declaration: str) -> str:
    """The key of header.TYPES of a parameter or result, such as `const void *x`."""
    if re.search(r"\bchar \*", declaration) and "void" not in declaration:
        return "char*"
    if "*" in declaration:
        return "pointer"
    words = [word for word in declaration.split() if word != "const"]
    return C_TYPES.get(words[0], words[0])


def c_constants() -> dict[str, int]:
    """The constants of the headers' enumerations that are integer literals."""
    bodies = re.findall(r"enum \{(.*?)\}", TEXT, flags=re.DOTALL)
    return {
        name: int(value) for body in bodies for name, value in re.findall(r"(LM_\w+) = (\d+)\s*(?:,|$)", body)
    }


def c_fields(structure: str) -> list[tuple[str, object]]:
    """(name, ctypes type) of the fields of a structure in the headers."""
    bodies = re.findall(r"typedef struct \{([^}]*)\} " + structure + ";", TEXT)
    assert len(bodies) == 1, structure
    fields: list[tuple[str, object]] = []
    for declaration in bodies[0].split(";")[:-1]:
        base, names = re.fullmatch(r"\s*((?:const )?\w+) (.*?)\s*", declaration, flags=re.DOTALL).groups()  # type: ignore[union-attr]
        for declarator in names.split(","):
            name, length = re.fullmatch(r"[\s*]*(\w+)(?:\[(\w+)\])?", declarator).groups()  # type: ignore[union-attr]
            inner = STRUCTURES.get("".join(part.title() for part in base.removeprefix("const ").split("_")))
            if "*" in declarator:
                of: object = ctypes.c_void_p
            elif inner is not None:
                of = inner
            else:
                of = header.TYPES[kind(base)]
            if length is not None:
                of = of * c_constants()[length]  # type: ignore[operator]
            fields.append((name, of))
    return fields


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_is_the_headers(name: str) -> None:
    assert c_constants()[f"LM_{name}"] == CONSTANTS[name]


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_has_the_headers_fields_in_order(name: str) -> None:
    expected = c_fields(c_name(name))
    found = [
        (field, ctypes.c_void_p if issubclass(of, ctypes._Pointer) else of)
        for field, of in STRUCTURES[name]._fields_
    ]
    assert found == expected


def test_every_exported_function_is_declared_with_its_types() -> None:
    exported = {
        name: " ".join([kind(result + " "), *(kind(p) for p in parameters.split(",") if p.strip() != "void")])
        for result, name, parameters in re.findall(
            r"LM_EXPORT ((?:const )?\w+ \*?)(lm_\w+)\(([^)]*)\);", TEXT.replace("\n", " ")
        )
    }
    assert len(exported) == TEXT.count("LM_EXPORT ") - TEXT.count("#define LM_EXPORT ")
    assert exported == header.FUNCTIONS


def test_the_widths_are_those_of_the_kernels() -> None:
    """linear.h names the widths that the kernels support; the reference multiplies the others."""
    comment = re.search(r"int32_t bits; +/\* (.*?) \*/", (CSRC / "linear" / "linear.h").read_text())
    assert comment is not None
    assert tuple(map(int, re.findall(r"\d+", comment.group(1)))) == header.WIDTHS
    assert set(header.WIDTHS) <= set(BITS)
