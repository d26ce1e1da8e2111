"""The roofline: what memory and arithmetic allow here, measured, and the tokens/s that follow for a model.

Decode reads every weight once a token, so the rate of reads bounds it; prefill multiplies all of a prompt's
tokens by every weight, so the rate of matrix products bounds it (Williams, Waterman and Patterson 2009). A
small model's weights stay in the processor's caches between two tokens: the rate that bounds it is that of
reads of as many bytes as it has, and that is what is measured for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem.plan.memory import Form, bytes_read_a_token, kv_cache_bytes

if TYPE_CHECKING:
    import torch

    from lowmem.plan.shape import ModelShape

SECONDS = 0.25
"""Of passes for one figure. The best pass is taken: it is what the machine can, between its neighbours."""
LARGE_READ = 256 << 20
"""Bytes of a buffer that no cache holds; larger models read at the same rate."""
_PASS_BYTES = 64 << 20  # read by one pass at least, so that starting it costs nothing beside it
_CPU_SIZES = (512, 1024, 2048)
_CARD_SIZES = (2048, 4096, 8192)


@dataclass(frozen=True)
class Rates:
    """One look at the machine. read: bytes a second of a buffer that no cache holds; own: of one with as many
    bytes as the form reads a token. matmul: floating-point operations a second in the form's dtype."""

    read: float
    own: float
    matmul: float


def look(own_bytes: int, dtype: torch.dtype, device: torch.device, seconds: float = SECONDS) -> Rates:
    """Measure all three on `device`, on a CPU with as many threads as torch uses; about 3 × `seconds`."""
    large = _large_read(device)
    read = read_rate(large, device, seconds)
    own = read if own_bytes >= large else read_rate(own_bytes, device, seconds)
    return Rates(read, own, matmul_rate(dtype, device, seconds))


def read_rate(nbytes: int, device: torch.device, seconds: float = SECONDS) -> float:
    """Bytes a second of reading `nbytes` again and again: by torch's number of threads, or by the card."""
    if device.type == "cpu":
        import torch

        from lowmem.kernels.native import library as native

        if native.available():
            return _native_read_rate(nbytes, seconds)
        return _host_read_rate(nbytes, torch.get_num_threads(), seconds)
    return copy_rate(nbytes, device, seconds)


def _native_read_rate(nbytes: int, seconds: float) -> float:
    """By our library's loop, tuned for nothing else, on the threads that torch uses."""
    import torch

    from lowmem.kernels.native import library as native

    buffer = torch.ones(max(1, nbytes // 8), dtype=torch.int64)  # filled: unfilled pages would all be one
    repeats = max(1, _PASS_BYTES // buffer.nbytes)

    def read() -> None:
        for _ in range(repeats):
            native.read(buffer)

    return buffer.nbytes * repeats / best(read, seconds)


def _host_read_rate(nbytes: int, threads: int, seconds: float) -> float:
    """Without the library each thread finds the largest value of its own part: vectorized, and without the
    interpreter's lock, but some CPUs read faster than that."""
    import numpy

    part = max(1, nbytes // threads // 8)
    repeats = max(1, _PASS_BYTES // (part * 8 * threads))
    with ThreadPoolExecutor(threads) as pool:
        # Each thread fills its own part, which lies near its core then; unfilled pages would all be one.
        parts = list(pool.map(lambda _: numpy.full(part, 1, dtype=numpy.int64), range(threads)))

        def read(values: numpy.ndarray) -> None:
            for _ in range(repeats):
                numpy.max(values)

        fastest = best(lambda: list(pool.map(read, parts)), seconds)
    return threads * part * 8 * repeats / fastest


def copy_rate(nbytes: int, device: torch.device, seconds: float = SECONDS) -> float:
    """Bytes a second that a card reads and writes, together, in copies between two halves of `nbytes`."""
    import torch

    half = max(1, nbytes // 2)
    repeats = max(8, _PASS_BYTES // half)
    source = torch.ones(half, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(repeats):
            target.copy_(source)
        wait(device)

    return 2 * half * repeats / best(copy, seconds)


def matmul_rate(dtype: torch.dtype, device: torch.device, seconds: float = SECONDS) -> float:
    """Operations a second of the fastest among square products of several sizes: 2 n³ each."""
    import torch

    fastest = 0.0
    for size in _CPU_SIZES if device.type == "cpu" else _CARD_SIZES:
        with torch.inference_mode():
            left, right = (torch.rand((size, size), device=device).to(dtype) for _ in range(2))
            product = torch.empty_like(left)

            def multiply(
                left: torch.Tensor = left, right: torch.Tensor = right, product: torch.Tensor = product
            ) -> None:
                torch.mm(left, right, out=product)
                wait(device)

            fastest = max(fastest, 2 * size**3 / best(multiply, seconds / 3))
    return fastest


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given; a CPU always has. The one place that knows."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def best(one_pass: Callable[[], object], seconds: float) -> float:
    """The shortest time of passes for `seconds`, of two at least; the first only warms up."""
    one_pass()
    start, shortest, count = time.perf_counter(), float("inf"), 0
    while count < 2 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        one_pass()
        shortest = min(shortest, time.perf_counter() - before)
        count += 1
    return shortest


def _large_read(device: torch.device) -> int:
    """LARGE_READ, or an eighth of what is free."""
    from lowmem.plan.device import card_memory_free, host_memory_available

    free = host_memory_available() if device.type == "cpu" else card_memory_free(device)
    return max(min(LARGE_READ, free // 8), 1 << 20)


# --- what follows for a model -----------------------------------------------------------------------------


def decode_bytes(shape: ModelShape, form: Form, context: int, new_tokens: int) -> int:
    """Bytes that a token reads, in the mean over the new tokens after the first: the weights, without tables
    that are looked up, and the keys and values so far, those of the token itself included."""
    # The step that makes token i + 1 of n attends to context + i tokens; the mean of i = 1..n-1 is n / 2.
    kv = kv_cache_bytes(shape, form, 2 * context + new_tokens) // 2
    return bytes_read_a_token(shape, form) + kv


def decode_ceiling(shape: ModelShape, form: Form, context: int, new_tokens: int, read: float) -> float:
    """Tokens a second that reads at `read` bytes a second allow."""
    return read / decode_bytes(shape, form, context, new_tokens)


def linear_weights(shape: ModelShape) -> int:
    """Weights of all linears in decoder layers, packed or not; the head is not among them."""
    bits = shape.format.default.bits if shape.format else 32
    packed = sum(t.numel * 32 // bits for t in shape.tensors if t.packed and t.name.endswith(".qweight"))
    return packed + sum(t.numel for t in shape.tensors if t.linear)


def prefill_flops(shape: ModelShape, tokens: int) -> int:
    """Floating-point operations of a prompt: every linear for every token, causal attention, and the head for
    the last token alone."""
    linears = 2 * linear_weights(shape) * tokens
    # Token i has i dot products with keys and i weighted values, of 2 × head_dim operations each.
    attention = 4 * shape.layers * shape.heads * shape.head_dim * (tokens * (tokens + 1) // 2)
    return linears + attention + 2 * shape.vocab * shape.hidden


def prefill_ceiling(shape: ModelShape, form: Form, tokens: int, read: float, matmul: float) -> float:
    """Tokens a second of a prompt: products at `matmul`, but no faster than reading all weights once."""
    arithmetic = prefill_flops(shape, tokens) / matmul
    return tokens / max(arithmetic, bytes_read_a_token(shape, form) / read)
