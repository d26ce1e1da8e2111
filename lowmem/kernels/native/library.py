"""lowmem's own CPU kernels (csrc/), loaded with ctypes: one library, one workspace, torch's threads.

The library is compiled when lowmem is installed. It reads GPTQ's tensors in place, also mapped from their
file, and runs on the threads of torch's OpenMP, so that the two do not compete for cores. A row's result
depends neither on the other rows nor on threads; csrc/linear/linear.h defines it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from lowmem.kernels.native import header
from lowmem.kernels.native.lost_files import library_path

TYPES = {torch.float32: header.F32, torch.float16: header.F16, torch.bfloat16: header.BF16}
"""The library's number types."""
_INSTALL = "install a C compiler (gcc, clang or ziglang), then install lowmem again"


class _Native:
    """The library and what its callers share: a lock and one workspace."""

    def __init__(self, library: ctypes.CDLL) -> None:
        header.declare(library)
        self.library = library
        self.lock = threading.Lock()
        self.gomp = _gomp_parallel()
        self.threads = 0
        self.space = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.x, self.y = header.LmMatrix(), header.LmMatrix()
        """Arguments of `linear`, while it holds the lock."""

    def set_threads(self) -> None:
        """Use as many threads as torch does, and torch's own if possible."""
        count = torch.get_num_threads()
        if count != self.threads:
            self.library.lm_set_threads(count, self.gomp)
            self.threads = count


@functools.cache
def _load() -> _Native | str:
    """The library, or why it cannot be used."""
    path = library_path()
    if path is None:
        return f"lowmem's own kernels were not compiled when it was installed: {_INSTALL}"
    try:
        return _Native(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be used ({str(error).splitlines()[0]}): {_INSTALL}"


def _gomp_parallel() -> int | None:
    """The address of GOMP_parallel in torch's OpenMP library; None if torch uses another one."""
    # Look in the whole process first, then in the libraries that torch's own was linked with.
    libraries: list[str | None] = [None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")]
    if "OpenMP" not in torch.__config__.parallel_info() or not hasattr(os, "RTLD_NOLOAD"):
        return None
    for name in libraries:
        with contextlib.suppress(OSError, AttributeError):
            handle = ctypes.CDLL(name, mode=os.RTLD_NOLOAD) if name else ctypes.CDLL(None)
            return ctypes.cast(handle.GOMP_parallel, ctypes.c_void_p).value
    return None


def available() -> bool:
    """Whether the library can be used."""
    return isinstance(_load(), _Native)


def why_not() -> str:
    """Why the library cannot be used, and what to do; "" if it can."""
    native = _load()
    return native if isinstance(native, str) else ""


def loaded() -> _Native:
    """The library and what its callers share. Raises RuntimeError (`why_not`) if it cannot be used."""
    native = _load()
    if isinstance(native, str):
        raise RuntimeError(native)
    return native


def library() -> ctypes.CDLL:
    """The library with its functions declared. Raises RuntimeError (`why_not`) if it cannot be used."""
    return loaded().library


def isa_name() -> str:
    """The selected instruction set, such as "AVX2"."""
    name: bytes = library().lm_isa_name()
    return name.decode()


def isa_names() -> tuple[str, ...]:
    """All instruction sets that the library was compiled for, best first; this CPU may lack some."""
    found: Iterator[bytes] = iter(map(library().lm_isa_at, itertools.count()).__next__, None)
    return tuple(name.decode() for name in found)


def threads_are_torchs() -> bool:
    """Whether the library runs on torch's own threads."""
    return loaded().gomp is not None


def set_threads() -> None:
    """Use as many threads as torch does now. `running` calls this."""
    loaded().set_threads()


@contextlib.contextmanager
def running() -> Iterator[ctypes.CDLL]:
    """The library for one caller, with its threads set. Call its functions only inside."""
    native = loaded()
    with native.lock:
        native.set_threads()
        yield native.library


def workspace(nbytes: int) -> int:
    """The address of the process's workspace, of `nbytes` or more. Call it only inside `running`."""
    native = loaded()
    if native.space.numel() < nbytes:
        native.space = torch.empty(0, dtype=torch.uint8, device="cpu")  # free the old one first
        native.space = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    return native.space.data_ptr()


def read(tensor: torch.Tensor) -> int:
    """Read a contiguous CPU tensor once with all threads at full bandwidth; the exclusive or of its words."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("read() takes a contiguous tensor on the CPU")
    with running() as lib:
        result: int = lib.lm_read(tensor.data_ptr(), tensor.nbytes)
    return result
