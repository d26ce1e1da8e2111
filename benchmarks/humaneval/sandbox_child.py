"""The sandboxed processes: one runs the answer, the other the problem's tests.

They exchange plain values through two pipes: the tests' `candidate` is a proxy that sends its arguments to
the answer's process and returns the result. So the verdict is made in a process that never ran generated
code, and the answer's process has nothing to forge it with: no tests, no expected values, no pipe for the
verdict. Both processes are locked down in the same way.

This runs in a bare interpreter (`python -I -S`) and imports only the standard library, rarely used modules
where they are needed, because every check starts it twice.
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

assert sys.platform == "linux"  # and type checkers read on only there

from lowmem.benchmarks.humaneval.lockdown import Built, WallError, lock_down  # noqa: E402

MESSAGE_BYTES = 16 << 20
"""Longest message between the two processes."""
_ITEMS = 100_000
"""Items of an iterator that are sent; it may be infinite."""
_PLAIN_INT = 1 << 62
_TEST_FILE = "test.py"
_NUMBERS = (("fractions", "Fraction"), ("decimal", "Decimal"))


def main() -> None:
    """Read the job from standard input, lock down the process and run the job. Ends the process."""
    job = json.loads(sys.stdin.buffer.read())
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.close(nothing)
    report: BinaryIO | None = os.fdopen(job["report"], "wb") if "report" in job else None
    try:
        built = lock_down(
            Path(job["folder"]) if job["folder"] else None,
            cpu_seconds=job["cpu_seconds"],
            memory_bytes=job["memory_bytes"],
            file_bytes=job["file_bytes"],
            parent=job["parent"],
            namespaces=job["namespaces"],
        )
    except (WallError, OSError, ValueError, AttributeError) as error:
        if report is not None:
            _send(report, {"kind": "refused", "detail": str(error)})
        os._exit(3)
    if report is None:
        _answer(job)
    elif job["role"] == "tests":
        _tests(job, report)
    else:
        _probe(job, report, built)


# --- the answer --------------------------------------------------------------------------------------------


def _answer(job: dict[str, Any]) -> None:
    """Run the generated program, then serve calls of its function."""
    calls, results = os.fdopen(job["calls"], "rb"), os.fdopen(job["results"], "wb")
    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    problem: dict[str, Any] | None = None
    try:
        exec(_compiled(job["program"], "answer.py"), module.__dict__)
        function = module.__dict__[job["entry_point"]]
    except KeyError:
        problem = {"error": ["NameError", f"the answer defines no {job['entry_point']}"]}
    except BaseException as error:
        problem = _described(error)
    _send(results, problem or {"value": None})
    while problem is None and (line := calls.readline(MESSAGE_BYTES)):
        try:
            arguments, keywords = decode(json.loads(line))
            reply = {"value": encode(function(*arguments, **keywords))}
        except BaseException as error:
            reply = _described(error)
        _flush()
        _send(results, reply)
    _flush()
    os._exit(0)


def _compiled(text: str, name: str) -> types.CodeType:
    code: types.CodeType = compile(
        text, name, "exec", dont_inherit=True
    )  # without this file's __future__ imports
    return code


def _described(error: BaseException) -> dict[str, Any]:
    try:
        text = str(error)[:200]
    except BaseException:  # its __str__ is generated code, too
        text = ""
    return {"error": [type(error).__name__, text]}


def _flush() -> None:
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # the answer replaced or closed them
        pass


# --- the tests ---------------------------------------------------------------------------------------------


class _Ended(BaseException):
    """The answer's process ended or sent garbage. Tests' own `except Exception` must not catch this."""


def _tests(job: dict[str, Any], report: BinaryIO) -> None:
    """Run the problem's tests against the proxy, and report the verdict."""
    calls, results = os.fdopen(job["calls"], "wb"), os.fdopen(job["results"], "rb")
    os.dup2(0, 1)
    os.dup2(0, 2)

    def receive() -> Any:
        line = results.readline(MESSAGE_BYTES)
        if not line.endswith(b"\n"):
            raise _Ended("returned too much" if line else "ended before the tests finished")
        try:
            reply = json.loads(line)
            raised = _rebuilt(*map(str, reply["error"])) if "error" in reply else None
            value = None if raised else decode(reply["value"])
        except (LookupError, TypeError, ValueError, RecursionError, AttributeError, ArithmeticError) as error:
            raise _Ended("returned garbage") from error
        if raised is not None:
            raise raised
        return value

    def candidate(*arguments: Any, **keywords: Any) -> Any:
        try:
            _send(calls, encode((arguments, keywords)))
        except OSError as error:
            raise _Ended("ended before the tests finished") from error
        return receive()

    verdict = {"kind": "passed", "detail": ""}
    try:
        receive()  # the program has been read
        names: dict[str, Any] = {"__name__": "tests"}
        exec(_compiled(job["prompt"], "prompt.py"), names)  # its helper functions
        names[job["entry_point"]] = candidate
        exec(_compiled(job["test"], _TEST_FILE), names)
        names["check"](candidate)
    except _Ended as error:
        verdict = {"kind": "failed", "detail": f"the program {error}"}
    except BaseException as error:
        kind = "memory" if isinstance(error, MemoryError) else "failed"
        said = str(error) or _failed_line(error, job["test"])
        verdict = {"kind": kind, "detail": f"{type(error).__name__}: {said}"[:300].removesuffix(": ")}
    _send(report, verdict)
    os._exit(0)


def _failed_line(error: BaseException, test: str) -> str:
    """The line of the tests that failed."""
    import traceback

    lines = [at for frame, at in traceback.walk_tb(error.__traceback__) if _is_test(frame)]
    return test.splitlines()[lines[-1] - 1].strip() if lines else ""


def _is_test(frame: types.FrameType) -> bool:
    return frame.f_code.co_filename == _TEST_FILE


def _rebuilt(name: str, text: str) -> Exception:
    """The answer's exception, if it is a built-in one; else a RuntimeError."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # some need more arguments
            pass
    return RuntimeError(f"{name}: {text}")


# --- values between the two --------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """Convert a value to JSON types; a value that is not plain data becomes {"opaque": its type}.

    Numbers keep every bit. Iterators are read up to a limit and arrive as iterators. Instances of subclasses
    arrive as the built-in type, so that their own `==` cannot decide a test.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < _PLAIN_INT else {"int": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(item) for item in list.__iter__(value)]
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in tuple.__iter__(value)]}
    if isinstance(value, set):
        return {"set": [encode(item) for item in set.__iter__(value)]}
    if isinstance(value, frozenset):
        return {"frozenset": [encode(item) for item in frozenset.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [encode(part) for part in (value.start, value.stop, value.step)]}
    for module, name in _NUMBERS:
        if module in sys.modules and isinstance(value, getattr(sys.modules[module], name)):
            return {module: str(value)}
    if isinstance(value, Iterator):
        return {"iterator": [encode(item) for item in islice(value, _ITEMS)]}
    return {"opaque": type(value).__name__}


def decode(data: Any) -> Any:
    """The inverse of `encode`. Raises KeyError, TypeError or ValueError if `encode` cannot have produced the
    data.
    """
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, list):
        return [decode(item) for item in data]
    ((name, content),) = data.items()
    for module, number in _NUMBERS:
        if name == module:
            return getattr(importlib.import_module(module), number)(content)
    return _DECODERS[name](content)


def _decoded(content: list[Any]) -> Iterator[Any]:
    return (decode(item) for item in content)


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda content: int(content, 16),
    "tuple": lambda content: tuple(_decoded(content)),
    "set": lambda content: set(_decoded(content)),
    "frozenset": lambda content: frozenset(_decoded(content)),
    "dict": lambda content: {decode(key): decode(item) for key, item in content},
    "bytes": bytes.fromhex,
    "complex": lambda content: complex(*content),
    "range": lambda content: range(*_decoded(content)),
    "iterator": lambda content: iter([decode(item) for item in content]),
    "opaque": lambda content: object(),
}


def _send(stream: BinaryIO, message: Any) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


# --- the probe ---------------------------------------------------------------------------------------------


def _probe(job: dict[str, Any], report: BinaryIO, built: Built) -> None:
    """Try everything that must be impossible, and report what was refused."""
    import socket
    import threading

    other = job["other"]  # a file of the parent, outside the folder

    def fork() -> None:
        if os.fork() == 0:
            os._exit(0)

    def write() -> None:
        with open(other, "a") as file:
            file.write("written by a sandboxed program\n")

    families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
    path = Path(other)
    held = {
        "network": _all_refused(*(partial(socket.socket, family) for family in families)),
        "files": _all_refused(write, path.read_bytes, path.unlink),
        "processes": _all_refused(fork, threading.Thread(target=_flush).start),
        "signals": _all_refused(lambda: os.kill(job["parent"], 0)),
    }
    Path("own").write_text("a program's own folder can be written to")
    kind = {
        "namespaces": built.namespaces,
        "own_filesystem": built.own_filesystem,
        "landlock": built.landlock,
    }
    _send(report, {"kind": "probed", "held": held, **kind})
    os._exit(0)


def _all_refused(*actions: Callable[[], object]) -> bool:
    """Try all of them; True if all were refused."""
    possible = 0
    for action in actions:
        try:
            action()
        except (OSError, RuntimeError):
            continue
        possible += 1
    return not possible
