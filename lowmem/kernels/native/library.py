"""Our own kernels for the CPU (csrc/), loaded with ctypes: one library, one workspace, torch's threads.

The library is compiled when lowmem is installed. It reads GPTQ's tensors where they lie, also mapped from
their file, and runs on the threads of torch's own OpenMP, so that the two never compete for cores. What it
computes is written in csrc/lowmem.h: a row's result depends neither on the rows beside it nor on threads or
instruction sets.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lowmem.kernels.native.lost_files import library_path

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""LM_F32, LM_F16, LM_BF16."""
CONTRACT = 5
"""LM_CONTRACT of csrc/lowmem.h."""
_INSTALL = "install a C compiler (gcc or clang), then install lowmem again"
_POINTER, _INT, _LONG, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_DECLARED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "lm_set_threads": (None, (_INT, _POINTER)),
    "lm_threads": (_INT, ()),
    "lm_isa_name": (ctypes.c_char_p, ()),
    "lm_use_isa": (_INT, (ctypes.c_char_p,)),
    "lm_contract": (_INT, ()),
    "lm_kernel_group": (ctypes.c_int32, (ctypes.c_int32,)),
    "lm_linear_workspace": (_SIZE, (_POINTER, _LONG, _INT)),
    "lm_linear": (None, (_POINTER, _POINTER, _INT, _LONG, _INT, _POINTER, _INT, _POINTER)),
    "lm_dense_linear": (None, (_POINTER, _POINTER, _INT, _LONG, _POINTER, _INT, _POINTER)),
    "lm_prompt_attention_workspace": (_SIZE, (_POINTER, _LONG)),
    "lm_prompt_attention": (
        None,
        (_POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG, ctypes.c_float, _POINTER, _POINTER),
    ),
    "lm_to_panels": (None, (_POINTER, _POINTER, _POINTER, _POINTER)),
    "lm_read": (ctypes.c_uint64, (_POINTER, _SIZE)),
    "lm_step_workspace": (_SIZE, (_POINTER, _LONG)),
    "lm_step": (None, (_POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER)),
    "lm_gemm_workspace": (_SIZE, ()),
    "lm_gemm_run": (None, (_POINTER, _POINTER)),
    "lm_gemm_name": (ctypes.c_char_p, ()),
    "lm_gemm_use": (_INT, (ctypes.c_char_p,)),
    "lm_mirror": (None, (_POINTER, _LONG, _LONG, ctypes.c_float)),
    "lm_permute": (None, (_POINTER, _LONG, _LONG, _POINTER, _POINTER)),
    "lm_round_workspace": (_SIZE, ()),
    "lm_round_run": (None, (_POINTER, _POINTER)),
    "lm_tell_bus_errors": (_INT, (ctypes.c_char_p, _INT)),
}


class _Native:
    """The library and what all its callers share: one at a time, one workspace."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, (result, arguments) in _DECLARED.items():
            function = getattr(library, name)  # raises AttributeError for a library of another version
            function.restype, function.argtypes = result, arguments
        if library.lm_contract() != CONTRACT:
            raise OSError("it is of another version of lowmem")
        self.library = library
        self.lock = threading.Lock()
        self.gomp = _gomp_parallel()
        self.threads = 0
        self.space = torch.empty(0, dtype=torch.uint8, device="cpu")

    def set_threads(self) -> None:
        """As many as torch has, and its own."""
        count = torch.get_num_threads()
        if count != self.threads:
            self.library.lm_set_threads(count, self.gomp)
            self.threads = count


@functools.cache
def _load() -> _Native | str:
    """The library, or why there is none."""
    path = library_path()
    if path is None:
        if os.name == "nt":
            return "lowmem's own kernels are not made for Windows"
        return f"lowmem's own kernels were not compiled when it was installed: {_INSTALL}"
    try:
        return _Native(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be used ({str(error).splitlines()[0]}): {_INSTALL}"


def _gomp_parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP that torch runs on; None where torch has another."""
    # A name is looked up in the whole process first, then in what torch's own library was linked with.
    libraries: list[str | None] = [None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")]
    if "OpenMP" not in torch.__config__.parallel_info() or not hasattr(os, "RTLD_NOLOAD"):
        return None
    for name in libraries:
        with contextlib.suppress(OSError, AttributeError):
            handle = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW) if name else ctypes.CDLL(None)
            return ctypes.cast(handle.GOMP_parallel, ctypes.c_void_p).value
    return None


def available() -> bool:
    """Whether the library is there and can be used."""
    return isinstance(_load(), _Native)


def why_not() -> str:
    """Why the library cannot be used, and what to do; nothing when it can."""
    native = _load()
    return native if isinstance(native, str) else ""


def loaded() -> _Native:
    """The library and what its callers share. Raises RuntimeError (`why_not`) where there is none."""
    native = _load()
    if isinstance(native, str):
        raise RuntimeError(native)
    return native


def library() -> ctypes.CDLL:
    """The library, its functions declared. Raises RuntimeError (`why_not`) where there is none."""
    return loaded().library


def isa_name() -> str:
    """The instruction set that is used: "AVX-512 VNNI", "AVX2" or "portable C"."""
    name: bytes = library().lm_isa_name()
    return name.decode()


def threads_are_torchs() -> bool:
    """Whether the library runs on torch's own threads."""
    return loaded().gomp is not None


def set_threads() -> None:
    """Give the library as many threads as torch has now. Every `running` does it by itself."""
    loaded().set_threads()


@contextlib.contextmanager
def running() -> Iterator[ctypes.CDLL]:
    """The library for one caller, its threads set: whatever calls into it does so inside."""
    native = loaded()
    with native.lock:
        native.set_threads()
        yield native.library


def workspace(nbytes: int) -> int:
    """The address of the process's one workspace, of so many bytes or more; only inside `running`."""
    native = loaded()
    if native.space.numel() < nbytes:
        native.space = torch.empty(0, dtype=torch.uint8, device="cpu")  # the old one goes first
        native.space = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    return native.space.data_ptr()


def read(tensor: torch.Tensor) -> int:
    """Read a contiguous tensor once with all threads, at the CPU's best; the exclusive or of its words."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("a contiguous tensor on the CPU expected")
    with running() as lib:
        result: int = lib.lm_read(tensor.data_ptr(), tensor.nbytes)
    return result
