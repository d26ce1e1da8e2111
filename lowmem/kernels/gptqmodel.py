"""What is asked of GPTQModel: which kernels it has for a device, in its order, as optimum asks for them.

Importing it takes seconds, prints a banner, logs to stdout and sets variables of the environment (HF_HOME to
a folder in /tmp among them): here all of that stays inside.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowmem.checkpoint.formats import LinearFormat


@dataclass(frozen=True)
class Candidate:
    """A kernel that may be asked for. select: its class; raises with a reason when it does not fit here."""

    name: str
    select: Callable[[], type[nn.Module]]


def gptqmodel_candidates(
    format: LinearFormat, device: torch.device, dtype: torch.dtype
) -> tuple[Candidate, ...]:
    """GPTQModel's kernels for the device, in its own order of preference.

    Each is selected when it is asked for: to select ExLlamaV2 is to build it. A GPTQModel that cannot be
    imported is one candidate that refuses with the reason.
    """
    try:
        importer, families = _import_gptqmodel()
        order = importer.AUTO_BACKEND_KERNEL_MAPPING["gptq"].get(format.layout, {})
        family = families(device.type)
    except Exception as error:  # it needs a dozen packages, each of which may be of a wrong version
        return (Candidate("GPTQModel", _refuses(error)),)

    def selection(backend: Any) -> Callable[[], type[nn.Module]]:
        def select() -> type[nn.Module]:
            with no_chatter():
                kernel: type[nn.Module] = importer.hf_select_quant_linear_v2(
                    bits=format.bits,
                    group_size=format.group_size,
                    desc_act=format.desc_act,
                    sym=format.sym,
                    format=format.layout,
                    quant_method="gptq",
                    dtype=dtype,
                    pack=False,
                    device_map={"": str(device)},
                    backend=backend,
                )
            return kernel

        return select

    return tuple(
        Candidate(kernel.__name__, selection(backend))
        for backend, kernel in order.items()
        if {family, families.ALL} & set(kernel.SUPPORTS_DEVICES)
    )


def compiler() -> str | None:
    """The C compiler that Triton would use, or None."""
    names = (os.environ.get("CC"), "gcc", "clang", "cc", "cl")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@contextlib.contextmanager
def no_chatter() -> Iterator[None]:
    """Keep what is printed off stdout, which is the answer's alone: kernels that build themselves talk."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _import_gptqmodel() -> tuple[Any, Any]:
    """(its importer module, its DEVICE enum), the environment as before."""
    before = dict(os.environ)
    try:
        with no_chatter():
            importer = importlib.import_module("gptqmodel.utils.importer")
            devices = importlib.import_module("gptqmodel.models._const").DEVICE
            logbar: Any = importlib.import_module("logbar")
        logbar.LogBar.shared().setLevel("ERROR")
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
    if not compiler():
        # Triton needs one to launch anything; without it the plain kernel would be lost as well.
        os.environ.setdefault("GPTQ_TORCH_TRITON_DEQUANT", "0")
    return importer, devices


def _refuses(error: Exception) -> Callable[[], type[nn.Module]]:
    def select() -> type[nn.Module]:
        raise ImportError(f"cannot be imported: {error}")

    return select
