"""Every kernel: what it takes, what it needs, and where its code is. Importing this module needs no torch.

To add a kernel, write the module that computes and list a Kernel here, in `kernels_for` or `planned`.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lowmem.cards.find import cards_of, is_card
from lowmem.config import SLICE_WEIGHTS
from lowmem.errors import InvalidRequestError
from lowmem.kernels.contract import Kernel, LinearSpec
from lowmem.kernels.native.header import WIDTHS
from lowmem.kernels.triton.choice import FEW_ROWS, MOST_PARTS, scratch_columns
from lowmem.kernels.triton.presence import nvcc, why_not_triton

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowmem.kernels.gptqmodel import Backend

VARIABLE = "LOWMEM_CPU_KERNEL"
LEAN = frozenset({"SwordfishLinear", "MacheteLinear", "MarlinLinear"})
"""GPTQModel's kernels that hold no dequantized weight. They compete with ours where nvcc can build them."""


class Native(Kernel):
    """Our kernels in C (native/linear.py). They read a weight in the layout of its file, mapped or not."""

    row_invariant = True
    trusted = True

    def __init__(self, activation_bits: int | None = None) -> None:
        """activation_bits: see QuantLinear.use_native."""
        self.activation_bits = activation_bits

    @property
    def name(self) -> str:  # type: ignore[override]
        """With the instruction set, where the library is there."""
        from lowmem.kernels.native import library

        return f"lowmem {library.isa_name()}" if library.available() else "lowmem's own"

    @property
    def about(self) -> str:  # type: ignore[override]
        """With whose threads they run on."""
        from lowmem.kernels.native import library

        own = "torch's threads" if library.threads_are_torchs() else "threads of their own"
        return f"our own kernels, on {own}"

    def why_not(self, spec: LinearSpec, device: str, dtype: str) -> str:
        """See Kernel."""
        from lowmem.kernels.native import library

        if problem := _not_packed_on_cpu(spec, device):
            return problem
        if spec.format and spec.format.bits not in WIDTHS:
            return f"weights of {spec.format.bits} bits are not supported"
        return _odd_groups(spec) or library.why_not()

    def workspace(self, spec: LinearSpec, rows: int, itemsize: int) -> int:
        """Activations as integers of 2 bytes, or 6 for float32, with a scale and three sums for each group.

        As lm_linear_workspace of csrc/linear/linear.c, without the 300 KiB of each thread. AVX-512 takes half
        of it for float32.
        """
        size = spec.format.group_size if spec.format else 0
        group = min(size, 256) if size > 0 else 32
        values = rows * spec.in_features
        return values * (6 if itemsize == 4 else 2) + values // group * 16

    def prepare(self, linear: Any, dtype: torch.dtype) -> nn.Module:
        """See Kernel. linear: a QuantLinear."""
        module: nn.Module = linear
        linear.use_native(self.activation_bits)
        return module


class TorchOperators(Kernel):
    """torch's own operators for integer weights on a CPU (torch_ops.py): 4 and 8 bits in bfloat16."""

    name = "torch's operators"
    about = "torch's own operators on repacked weights"

    def why_not(self, spec: LinearSpec, device: str, dtype: str) -> str:
        """See Kernel."""
        if problem := _not_packed_on_cpu(spec, device):
            return problem
        if dtype != "bfloat16":
            return f"for bfloat16, not {dtype}"
        assert spec.format is not None
        if spec.format.desc_act:
            return "its inputs are not grouped in order"
        if spec.format.bits == 4:
            if spec.out_features % 16:
                return f"{spec.out_features} outputs are not a multiple of 16"
            return _odd_groups(spec)
        if spec.format.bits == 8 and spec.group_size == spec.in_features and spec.format.sym:
            return ""
        return "for 4 bits in groups of multiples of 32, or 8 bits without groups and zero-points"

    def workspace(self, spec: LinearSpec, rows: int, itemsize: int) -> int:
        """A slice of the weight as bytes and as two int32 copies; or a bfloat16 product without its bias."""
        return max(9 * min(spec.weights, SLICE_WEIGHTS), rows * spec.out_features * 2)

    def prepare(self, linear: Any, dtype: torch.dtype) -> nn.Module:
        """See Kernel. The result holds repacked copies."""
        from lowmem.kernels.torch_ops import TorchInt4Linear, TorchInt8Linear

        return (TorchInt4Linear if linear.bits == 4 else TorchInt8Linear)(linear)


class Triton(Kernel):
    """Our kernels for cards in Triton (triton/). They read a weight in the layout of its file."""

    name = "lowmem Triton"
    about = "our own kernels in Triton"
    trial_rows = (1, 2, 3, 4, 8, 64, 160)  # each is compiled once, and not during an answer

    def why_not(self, spec: LinearSpec, device: str, dtype: str) -> str:
        """See Kernel."""
        if spec.format is None:
            return "its weight is not packed"
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "for a card only"
        if spec.weights * spec.format.bits // 32 >= 1 << 31 or spec.widest >= 1 << 22:
            return f"a linear of {spec.in_features} to {spec.out_features} features is not supported"
        return why_not_triton(device)

    def workspace(self, spec: LinearSpec, rows: int, itemsize: int) -> int:
        """A dequantized slice and its product, or the sums of programs that share inputs; x in order."""
        columns = scratch_columns(spec.in_features, spec.out_features)
        dense = columns * (spec.in_features + rows) * itemsize
        parts = MOST_PARTS * FEW_ROWS * spec.out_features * 4
        ordered = rows * spec.in_features * itemsize if spec.format and spec.format.desc_act else 0
        return max(dense, parts) + ordered

    def prepare(self, linear: Any, dtype: torch.dtype) -> nn.Module:
        """See Kernel. The result takes over the linear's tensors; scattered groups are copied into order."""
        from lowmem.kernels.triton.linear import TritonLinear
        from lowmem.kernels.triton.timing import choose

        module = TritonLinear(linear)
        module.choice = choose(module, dtype)
        return module


@dataclass(frozen=True)
class KernelSupport:
    """What a machine's kernels depend on beside the device."""

    packs_nf4: bool = False
    """bitsandbytes repacks NF4 weights on their first use on this CPU."""
    triton: bool = True
    """Our kernels for cards can run."""
    gptqmodel: bool = True
    """Where they cannot, GPTQModel's are tried; otherwise the reference runs."""


USUAL_SUPPORT = KernelSupport()


class GPTQModelKernel(Kernel):
    """One of GPTQModel's kernels (gptqmodel.py)."""

    about = "GPTQModel's best for this device that computes what the reference does"

    def __init__(self, backend: Backend | None = None, *, lean: bool = False) -> None:
        """Without a backend, only to ask for the workspace. lean: see LEAN."""
        self.name = backend.name if backend else "GPTQModel"
        self._backend = backend
        self._lean = lean

    def why_not(self, spec: LinearSpec, device: str, dtype: str) -> str:
        """See Kernel. Raises torch.OutOfMemoryError when the device is out of memory."""
        assert self._backend
        return self._backend.why_not(spec, device, dtype)

    def workspace(self, spec: LinearSpec, rows: int, itemsize: int) -> int:
        """Of the kernel that needs no compiler: a whole weight as 16-bit integers and in the dtype.

        The others take less; those of LEAN only sums, in float32, of at most four blocks of 64 rows and 256
        outputs for each of 256 multiprocessors, and locks.
        """
        return 64 << 20 if self._lean else spec.weights * (2 + itemsize)

    def prepare(self, linear: Any, dtype: torch.dtype) -> nn.Module:
        """See Kernel. The result takes over the linear's tensors and may repack them in place."""
        assert self._backend
        return self._backend.prepare(linear, dtype)


class Reference(Kernel):
    """Dequantize and multiply in plain torch (reference.py): any linear, anywhere, slowly."""

    name = "reference"
    about = "plain torch"
    trusted = True

    def why_not(self, spec: LinearSpec, device: str, dtype: str) -> str:
        """See Kernel."""
        return "" if spec.format else "its weight is not packed"

    def workspace(self, spec: LinearSpec, rows: int, itemsize: int) -> int:
        """A slice of the weight as integers, in float32 and in the activations' dtype."""
        return min(spec.weights, SLICE_WEIGHTS) * (8 + itemsize)

    def prepare(self, linear: Any, dtype: torch.dtype) -> nn.Module:
        """See Kernel. A QuantLinear uses the reference until another kernel replaces it."""
        module: nn.Module = linear
        return module


class BitsAndBytes(Kernel):
    """bitsandbytes' int8 and NF4 linears, quantized from 16 bits (bitsandbytes.py)."""

    def __init__(self, method: Literal["int8", "nf4"], packs_nf4: bool = False) -> None:
        """packs_nf4: bitsandbytes repacks NF4 weights on their first use on this CPU."""
        self.method: Literal["int8", "nf4"] = method
        self.name = f"bitsandbytes {'int8' if method == 'int8' else 'NF4'}"
        self.packs_nf4 = packs_nf4

    def why_not(self, spec: LinearSpec, device: str, dtype: str) -> str:
        """See Kernel."""
        if spec.format:
            return "its weight is packed already"
        return "" if importlib.util.find_spec("bitsandbytes") else "bitsandbytes is not installed"

    def workspace(self, spec: LinearSpec, rows: int, itemsize: int) -> int:
        """int8: inputs in float16 and int8, products in int32 and float16. NF4: the weight in 16 bits.

        To repack NF4 takes the nibbles as int32, as bytes, in the new order, and both halves of the result.
        """
        if self.method == "int8":
            return rows * spec.widest * 9
        return (7 if self.packs_nf4 else 2) * spec.weights

    def prepare(self, linear: Any, dtype: torch.dtype) -> nn.Module:
        """See Kernel. linear: an nn.Linear; the loader quantizes slices of rows as it reads them instead."""
        from lowmem.kernels import bitsandbytes as bnb

        module: Any = bnb.empty_linear(self.method, linear)
        device = linear.weight.device
        bnb.quantize_into(module, iter([(0, linear.weight.detach().to(dtype))]), device, dtype)
        module.bias = linear.bias
        return module.eval()  # type: ignore[no-any-return]

    def tolerance(self, dtype: str) -> float:
        """int8 rounds weights and activations to 256 levels, NF4 weights to 16."""
        return {"int8": 0.03, "nf4": 0.15}[self.method]


REFERENCE = Reference.name
"""Shown where no kernel is better."""


def kernels_for(
    specs: Sequence[LinearSpec], device: torch.device, activation_bits: int | None = None
) -> tuple[Kernel, ...]:
    """Kernels to try for packed linears of one format on `device`, best first; after them, the reference.

    On a card this imports GPTQModel, which takes seconds. On a CPU the variable LOWMEM_CPU_KERNEL may name
    the only one to try: native, torch, triton (in its interpreter) or reference. Raises InvalidRequestError
    when it names no kernel.
    """
    if is_card(device):
        cards = cards_of(device)
        if why_not_triton(str(device)) and cards.triton:
            return gptqmodel_kernels(specs, device)
        # GPTQModel builds its fast kernels with nvcc. Its others are slower than ours, and larger.
        others = gptqmodel_kernels(specs, device) if cards.label == "CUDA" and nvcc() else ()
        return (Triton(), *(kernel for kernel in others if kernel.name in LEAN))
    on_cpu: dict[str, tuple[Kernel, ...]] = {
        "native": (Native(activation_bits),),
        "torch": (TorchOperators(),),
        "triton": (Triton(),),
        "reference": (),
    }
    asked = os.environ.get(VARIABLE) or "best"
    if asked == "best":
        return (*on_cpu["native"], *on_cpu["torch"])
    if asked not in on_cpu:
        raise InvalidRequestError(
            f"{VARIABLE}={asked} is not a kernel", "Use native, torch, triton or reference"
        )
    return on_cpu[asked]


def gptqmodel_kernels(specs: Sequence[LinearSpec], device: torch.device) -> tuple[Kernel, ...]:
    """GPTQModel's kernels for linears of one format on `device`, also a CPU, in its order of preference."""
    from lowmem.kernels.gptqmodel import backends

    return tuple(GPTQModelKernel(b, lean=b.name in LEAN) for b in backends(specs, device))


def planned(method: str, *, cuda: bool, support: KernelSupport = USUAL_SUPPORT) -> tuple[Kernel, ...]:
    """The kernels that a plan must leave room for, as any of them may be used.

    method: "dense", "gptq", "int8" or "nf4". On a card where ours cannot run these are GPTQModel's, of which
    the one that needs no compiler takes the most memory.
    """
    if method in ("int8", "nf4"):
        return (BitsAndBytes(method, support.packs_nf4 and not cuda),)  # type: ignore[arg-type]
    if method != "gptq":
        return ()
    if not cuda:
        return (Native(), TorchOperators(), Reference())
    if support.triton:
        return (Triton(), GPTQModelKernel(lean=True))
    return (GPTQModelKernel(),) if support.gptqmodel else (Reference(),)


def _not_packed_on_cpu(spec: LinearSpec, device: str) -> str:
    if spec.format is None:
        return "its weight is not packed"
    return "" if device == "cpu" else "for the CPU only"


def _odd_groups(spec: LinearSpec) -> str:
    """What is wrong with the groups, which must be of whole multiples of 32 inputs; "" if nothing is."""
    common = math.gcd(spec.in_features, spec.group_size)
    return f"groups of {common} inputs are not multiples of 32" if common % 32 else ""
