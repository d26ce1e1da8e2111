"""GPTQModel's kernels for packed linears.

GPTQModel lists its kernels for a device from the best to the plainest (Marlin, ExLlamaV2, Triton, torch), and
its selection says of each whether it takes these bits, groups and dtype; see trial.py for what it cannot say.

Importing it takes seconds, prints a banner, logs to stdout and sets environment variables (HF_HOME to
a folder in /tmp among them). Here all of that is contained.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lowmem.cards.find import cards_of, is_card
from lowmem.checkpoint.dequantize import PackedLinear
from lowmem.checkpoint.formats import LinearFormat
from lowmem.checkpoint.packing import pack_zeros, unpack_zeros
from lowmem.kernels.contract import LinearSpec, Unsuitable
from lowmem.kernels.trial import exact_spec, no_chatter, plain
from lowmem.kernels.triton.presence import compiler


class Scratch:
    """ExLlamaV2's buffer for one dequantized weight, shared by its linears and as large as the largest.

    GPTQModel's own would also hold the outputs of 8 rows of 2048 tokens, which the kernel never uses: 1.6 GiB
    for StarChat Alpha. A kernel keeps a pointer into it, so it must never be replaced.
    """

    def __init__(self, weights: int) -> None:
        """weights: the number of weights of the largest linear."""
        self._bytes = 2 * weights + 256
        self._spaces: dict[torch.device, Any] = {}

    def on(self, device: torch.device) -> Any:
        """GPTQModel's ScratchSpace on the device, made on first use."""
        if device not in self._spaces:
            space = importlib.import_module("gptqmodel.utils.exllamav2").ScratchSpace
            self._spaces[device] = space(scratch_bytes=self._bytes, dev=device)
        return self._spaces[device]


class Backend:
    """Implements `registry.GPTQModelKernel` with one of GPTQModel's kernels."""

    def __init__(self, name: str, backend: Any = None, scratch: Scratch | None = None) -> None:
        """name: GPTQModel's class. backend: of GPTQModel's enum. scratch: shared by a model's linears."""
        self.name = name
        self._backend = backend
        self._scratch = scratch

    def select(self, format: LinearFormat, device: str, dtype: torch.dtype) -> type[nn.Module]:
        """Select GPTQModel's class, which may compile the kernel. Raises if the format is unsupported."""
        return _select(self._backend, format, device, dtype)

    def why_not(self, spec: LinearSpec, device: str, dtype: str) -> str:
        """See Kernel. Raises torch.OutOfMemoryError when the device is out of memory."""
        try:
            with no_chatter():
                self._empty(spec, device, getattr(torch, dtype))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # each kernel refuses in its own way; the next one is asked
            return plain(error)
        return ""

    def prepare(self, linear: PackedLinear, dtype: torch.dtype) -> nn.Module:
        """See Kernel."""
        with torch.no_grad(), no_chatter():
            kernel = self._empty(exact_spec(linear), str(linear.qweight.device), dtype)
            _hand_over(linear, kernel)
            self._repack(kernel, linear)
        return kernel  # type: ignore[no-any-return]

    def _empty(self, spec: LinearSpec, device: str, dtype: torch.dtype) -> Any:
        """GPTQModel's module for such a linear, on the meta device. Raises whatever it refuses with."""
        if spec.format is None:
            raise Unsuitable("its weight is not packed")
        cls = self.select(spec.format, device, dtype)
        planes = {"format": "gptq_p"} if spec.format.planar else {}
        with torch.device("meta"):
            return cls(
                **planes,
                bits=spec.format.bits,
                group_size=spec.format.group_size,
                desc_act=spec.format.desc_act,
                sym=spec.format.sym,
                in_features=spec.in_features,
                out_features=spec.out_features,
                bias=spec.bias,
                pack_dtype=torch.int32,
                register_buffers=True,
                dtype=dtype,
            ).eval()

    def _repack(self, kernel: Any, linear: PackedLinear) -> None:
        # Compiling dequantization once for each of hundreds of linears would take longer than it saves.
        kernel.optimized = True
        if "scratch_space" in inspect.signature(kernel.post_init).parameters:
            scratch = self._scratch or Scratch(linear.in_features * linear.out_features)
            space = scratch.on(kernel.qweight.device)
            kernel.post_init(scratch_space=space)
            kernel.scratch_space = space  # the kernel keeps only a pointer, so this keeps the memory
        else:
            kernel.post_init()
        left = [n for n, t in [*kernel.named_parameters(), *kernel.named_buffers()] if t.is_meta]
        if left:
            raise RuntimeError(f"it has no values for {left[0]}")


def backends(specs: Sequence[LinearSpec], device: torch.device) -> tuple[Backend, ...]:
    """GPTQModel's kernels for linears of one format on `device`, in its own order of preference.

    A GPTQModel that cannot be imported is one backend that refuses with the reason.
    """
    format = specs[0].format
    assert format is not None
    try:
        importer, families = _import_gptqmodel()
        order = importer.AUTO_BACKEND_KERNEL_MAPPING["gptq"].get(_layout(format), {})
        rocm = is_card(device) and cards_of(device).label == "ROCm"
        family = families("rocm" if rocm else device.type)
    except Exception as error:  # it needs a dozen packages, each of which may be of a wrong version
        return (_Missing(error),)
    scratch = Scratch(max(spec.weights for spec in specs))
    return tuple(
        Backend(kernel.__name__, backend, scratch)
        for backend, kernel in order.items()
        if {family, families.ALL} & set(kernel.SUPPORTS_DEVICES)
    )


class _Missing(Backend):
    """A GPTQModel that cannot be imported."""

    def __init__(self, error: Exception) -> None:
        super().__init__("GPTQModel")
        self._problem = f"cannot be imported: {error}"

    def select(self, format: LinearFormat, device: str, dtype: torch.dtype) -> type[nn.Module]:
        """Raises the reason."""
        raise ImportError(self._problem)


@functools.cache
def _select(backend: Any, format: LinearFormat, device: str, dtype: torch.dtype) -> type[nn.Module]:
    importer, _ = _import_gptqmodel()
    cls: type[nn.Module] = importer.hf_select_quant_linear_v2(
        bits=format.bits,
        group_size=format.group_size,
        desc_act=format.desc_act,
        sym=format.sym,
        format=_layout(format),
        quant_method="gptq",
        dtype=dtype,
        pack=False,
        device_map={"": device},
        backend=backend,
    )
    return cls


def _layout(format: LinearFormat) -> str:
    """The layout of the format's words by the name that most kernels take."""
    return "gptq_v2" if format.layout == "gptq_p" and not format.planar else format.layout


def _hand_over(linear: PackedLinear, kernel: Any) -> None:
    """Put the linear's tensors into the kernel, not yet repacked, with zero-points as it expects them."""
    bits, wants_v2 = linear.bits, getattr(kernel, "REQUIRES_FORMAT_V2", False)
    qzeros = linear.qzeros
    if wants_v2 != linear.format.zeros_v2:
        # Field by field: adding to whole words carries where a zero-point of 0 is stored.
        zeros = unpack_zeros(qzeros, bits, linear.format.layout)
        qzeros = pack_zeros(zeros, bits, "gptq_v2" if wants_v2 else "gptq")
    tensors = {
        "qweight": linear.qweight,
        "qzeros": qzeros,
        "scales": linear.scales.to(kernel.scales.dtype),
        "g_idx": linear.g_idx,
        "bias": linear.bias,
    }
    for part, tensor in tensors.items():
        if tensor is None:
            continue
        tensor = tensor.detach()  # an alias: a kernel that sets .data must not change the linear's
        if part in kernel._parameters:
            setattr(kernel, part, nn.Parameter(tensor, requires_grad=False))
        else:
            setattr(kernel, part, tensor)


@functools.cache
def _import_gptqmodel() -> tuple[Any, Any]:
    """(its importer module, its DEVICE enum), the environment left as it was."""
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
        # Triton needs a compiler to launch anything; without this the plain kernel would be lost as well.
        os.environ.setdefault("GPTQ_TORCH_TRITON_DEQUANT", "0")
    return importer, devices
