"""Lines about a model and about an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowmem.plan.device import MemoryUse, memory_use
from lowmem.text.units import format_bytes

if TYPE_CHECKING:
    from lowmem.loading.loader import LoadedModel
    from lowmem.session import Response


def describe(loaded: LoadedModel, context: int | None = None) -> str:
    """The loaded model: version, weights, dtype, device, kernel, context, and time to load."""
    parts = [
        loaded.label or "unquantized",
        f"{format_bytes(loaded.weight_bytes)} of weights",
        f"{str(loaded.dtype).removeprefix('torch.')} on {loaded.device}",
    ]
    if loaded.cpu_layers:
        parts.append(f"{loaded.cpu_layers} layers on the CPU")
    if loaded.kernel:
        parts.append(f"kernel {loaded.kernel}")
    if context:
        parts.append(f"context of {context:,} tokens")
    if loaded.draft is not None:
        parts.append(f"drafts by a model of {format_bytes(loaded.draft.weight_bytes)}")
    return ", ".join(parts) + f"; loaded in {loaded.load_seconds:.1f} s"


def figures(response: Response, memory: MemoryUse, *, stopped: bool = False) -> str:
    """An answer: tokens of prompt and answer, TTFT, tokens/s, memory, and why it was cut."""
    parts = [
        f"{response.prompt_tokens} + {response.new_tokens} tokens",
        f"TTFT {response.ttft_seconds:.2f} s",
    ]
    if response.tokens_per_second:
        parts.append(f"{response.tokens_per_second:.1f} tokens/s")
    parts.append(f"{format_bytes(memory.card)} on the card" if memory.card else format_bytes(memory.host))
    if stopped:
        parts.append("stopped")
    elif response.finish_reason == "length":
        parts.append(f"cut at {response.new_tokens} new tokens")
    elif response.finish_reason == "context":
        parts.append("cut: the context is full")
    return " · ".join(parts)


def memory_now(loaded: LoadedModel) -> MemoryUse:
    """The memory of this process, and of the model's card."""
    return memory_use(loaded.device)


def dropped_note(turns: int) -> str:
    """A line about the turns that were left out to fit the context."""
    what = "the oldest turn was" if turns == 1 else f"the oldest {turns} turns were"
    return f"{what} left out to fit the context"
