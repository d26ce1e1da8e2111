"""Linears at StarChat Alpha's dimensions: our kernels beside GPTQModel's, bitsandbytes' and torch's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lowmem.benchmarks.experiments.common import say
from lowmem.benchmarks.experiments.gpu_day.record import Product
from torch import nn

from lowmem.cards.find import is_timed
from lowmem.checkpoint.formats import LinearFormat
from lowmem.config import BITS
from lowmem.kernels.card_timing import product_seconds
from lowmem.kernels.contract import Kernel, LinearSpec
from lowmem.kernels.registry import BitsAndBytes, gptqmodel_kernels, kernels_for
from lowmem.kernels.trial import large_sample, no_chatter, plain, trial


@dataclass(frozen=True)
class Sizes:
    """What is multiplied."""

    shapes: tuple[tuple[int, int], ...] = ((6144, 24576), (24576, 6144), (6144, 6400), (6144, 6144))
    """(inputs, outputs): of StarChat Alpha's linears."""
    rows: tuple[int, ...] = (1, 4, 16, 64, 512)
    group: int = 128


TINY = Sizes(((128, 64),), (1, 5), 32)
"""For Triton's interpreter."""


@dataclass(frozen=True)
class Bench:
    """Where products are timed."""

    device: torch.device
    dtype: torch.dtype
    """Of activations."""
    rows: tuple[int, ...]

    def timed(self, product: Product, module: Any) -> Iterator[Product]:
        """The product with each number of rows. product: all but rows and seconds."""
        for count in self.rows:
            x = torch.randn(count, product.inputs, device=self.device).to(self.dtype)
            try:
                yield replace(product, rows=count, seconds=clock(self.device)(module, x))
            except Exception as error:  # each kernel fails in its own way
                yield replace(product, rows=count, problem=plain(error))

    def packed(self, kernel: Kernel, spec: LinearSpec) -> Iterator[Product]:
        """A packed linear, after a trial."""
        assert spec.format is not None
        linear = large_sample(spec, self.device, self.dtype)
        nbytes = sum(t.nbytes for t in (linear.qweight, linear.qzeros, linear.scales))
        found = Product(kernel.name, spec.format.label, spec.in_features, spec.out_features, 0, 0.0, nbytes)
        try:
            with no_chatter():
                module, problem = trial(kernel, linear, self.dtype)
        except Exception as error:
            module, problem = None, plain(error)
        if module is None:
            yield replace(found, problem=problem)
        else:
            yield from self.timed(found, module)

    def by_bitsandbytes(self, method: Literal["int8", "nf4"], shape: tuple[int, int]) -> Iterator[Product]:
        """A linear in int8 or NF4."""
        kernel, (inputs, outputs) = BitsAndBytes(method), shape
        nbytes = inputs * outputs // (1 if method == "int8" else 2)
        found = Product(kernel.name, method, inputs, outputs, 0, 0.0, nbytes)
        try:
            module = kernel.prepare(self.dense(shape), self.dtype)
        except Exception as error:  # it may not be installed, or not work here
            yield replace(found, problem=plain(error))
            return
        yield from self.timed(found, module)

    def dense(self, shape: tuple[int, int]) -> nn.Linear:
        """A linear in the dtype of the activations."""
        return nn.Linear(*shape, bias=False, device=self.device, dtype=self.dtype).requires_grad_(False)


def all_products(sizes: Sizes, device: torch.device, dtype: torch.dtype, borrowed: bool) -> Iterator[Product]:
    """Every width and kernel, then bitsandbytes' forms and a dense weight. borrowed: also GPTQModel's."""
    bench = Bench(device, dtype, sizes.rows)
    for shape in sizes.shapes:
        for bits in BITS:
            say(f"    {shape[0]} to {shape[1]}, {bits} bits …")
            spec = LinearSpec(*shape, format=LinearFormat(bits, sizes.group))
            for kernel in _kernels(spec, device, borrowed):
                yield from bench.packed(kernel, spec)
        yield from bench.by_bitsandbytes("int8", shape)
        yield from bench.by_bitsandbytes("nf4", shape)
        linear = bench.dense(shape)
        name = str(dtype).removeprefix("torch.")
        yield from bench.timed(Product("torch", name, *shape, 0, 0.0, linear.weight.nbytes), linear)


def _kernels(spec: LinearSpec, device: torch.device, borrowed: bool) -> Sequence[Kernel]:
    """Ours, and with `borrowed` all of GPTQModel's, each once."""
    ours = kernels_for([spec], device)
    theirs = gptqmodel_kernels([spec], device) if borrowed else ()
    names = {kernel.name for kernel in ours}
    return (*ours, *(kernel for kernel in theirs if kernel.name not in names))


def clock(device: torch.device) -> Callable[[nn.Module, torch.Tensor], float]:
    """Measures the seconds of a product."""
    return product_seconds if is_timed(device) else _on_the_host


@torch.no_grad()
def _on_the_host(module: nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    module(x)
    return time.perf_counter() - start
