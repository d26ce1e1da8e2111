"""The roofline (Williams, Waterman and Patterson 2009): what the machine can do, and the tokens/s it allows.

Decode reads every weight once per token, so memory bandwidth limits it. Prefill multiplies all tokens of a
prompt by every weight, so matrix products limit it. A small model stays in the processor's caches between
tokens, so its limit is the measured rate of reading as many bytes as it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem.cards.find import synchronize
from lowmem.plan.bandwidth import best
from lowmem.plan.memory import Form, bytes_read_a_token, kv_cache_bytes

if TYPE_CHECKING:
    import torch

    from lowmem.plan.shape import ModelShape

SECONDS = 0.25
"""Spent on one figure. The best pass counts: other passes are slowed by other processes."""
LARGE_READ = 256 << 20
"""Bytes of a buffer that no cache holds; larger buffers are read at the same rate."""
_PASS_BYTES = 64 << 20  # read by one pass at least, so that the cost of starting it is negligible
_CPU_SIZES = (512, 1024, 2048)
_CARD_SIZES = (2048, 4096, 8192)


@dataclass(frozen=True)
class Rates:
    """The machine's rates at one moment."""

    read: float
    """Memory bandwidth: bytes per second of a buffer that no cache holds."""
    own: float
    """Bytes per second of a buffer as large as the weights that a token reads."""
    matmul: float
    """Floating-point operations per second in the version's dtype."""


def look(own_bytes: int, dtype: torch.dtype, device: torch.device, seconds: float = SECONDS) -> Rates:
    """Measure the rates on `device`, on a CPU with torch's number of threads, in about 3 × `seconds`."""
    large = _large_read(device)
    read = read_rate(large, device, seconds)
    own = read if own_bytes >= large else read_rate(own_bytes, device, seconds)
    return Rates(read, own, matmul_rate(dtype, device, seconds))


def read_rate(nbytes: int, device: torch.device, seconds: float = SECONDS) -> float:
    """Measure bytes per second of reading `nbytes` repeatedly: with torch's number of threads, or on the
    card.
    """
    if device.type != "cpu":
        return copy_rate(nbytes, device, seconds)
    import torch

    from lowmem.kernels.native import library as native

    # torch's largest value is vectorized and threaded, but some CPUs read faster than that.
    read_once: Callable[[torch.Tensor], object] = native.read if native.available() else torch.max
    buffer = torch.ones(max(1, nbytes // 8), dtype=torch.int64)  # filled: unfilled pages would all be one
    repeats = max(1, _PASS_BYTES // buffer.nbytes)

    def read() -> None:
        for _ in range(repeats):
            read_once(buffer)

    return buffer.nbytes * repeats / best(read, seconds)


def copy_rate(nbytes: int, device: torch.device, seconds: float = SECONDS) -> float:
    """Measure the bytes per second that a card reads and writes together, in copies between two halves of
    `nbytes`.
    """
    import torch

    half = max(1, nbytes // 2)
    repeats = max(8, _PASS_BYTES // half)
    source = torch.ones(half, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(repeats):
            target.copy_(source)
        synchronize(device)

    return 2 * half * repeats / best(copy, seconds)


def matmul_rate(dtype: torch.dtype, device: torch.device, seconds: float = SECONDS) -> float:
    """Measure operations per second of the fastest square product among several sizes: 2 n³ each.

    After a size whose product took longer than `seconds`, and than a second, no further one is tried: some
    CPUs multiply 16-bit numbers a thousand times slower than others.
    """
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
                synchronize(device)

            shortest = best(multiply, seconds / 3)
        fastest = max(fastest, 2 * size**3 / shortest)
        if shortest > max(seconds, 1.0):
            break
    return fastest


def _large_read(device: torch.device) -> int:
    """LARGE_READ, or an eighth of the free memory if that is less."""
    from lowmem.plan.device import card_memory_free, host_memory_available

    free = host_memory_available() if device.type == "cpu" else card_memory_free(device)
    return max(min(LARGE_READ, free // 8), 1 << 20)


# --- ceilings of a model ----------------------------------------------------------------------------------


def decode_bytes(shape: ModelShape, form: Form, context: int, new_tokens: int) -> int:
    """Bytes that a token reads, averaged over the new tokens after the first.

    These are the weights, without lookup tables, and the KV cache including the token itself.
    """
    # The step for token i + 1 of n attends to context + i tokens; the mean of i = 1..n-1 is n / 2.
    kv = kv_cache_bytes(shape, form, 2 * context + new_tokens) // 2
    return bytes_read_a_token(shape, form) + kv


def decode_ceiling(shape: ModelShape, form: Form, context: int, new_tokens: int, read: float) -> float:
    """Tokens per second of decode at `read` bytes per second."""
    return read / decode_bytes(shape, form, context, new_tokens)


def prefill_flops(shape: ModelShape, tokens: int) -> int:
    """Floating-point operations of a prompt: linears for every token, causal attention, the head once."""
    linears = 2 * shape.linear_weights * tokens
    # Token i: i dot products with keys and i weighted values, of 2 × head_dim operations each.
    attention = 4 * shape.layers * shape.heads * shape.head_dim * (tokens * (tokens + 1) // 2)
    return linears + attention + 2 * shape.vocab * shape.hidden


def prefill_ceiling(shape: ModelShape, form: Form, tokens: int, read: float, matmul: float) -> float:
    """Tokens per second of prefill: products at `matmul`, or one read of all weights if that is slower."""
    arithmetic = prefill_flops(shape, tokens) / matmul
    return tokens / max(arithmetic, bytes_read_a_token(shape, form) / read)
