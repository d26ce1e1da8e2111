"""Task and result of a timing process. Both are sent through a pipe as JSON."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.benchmarks.latency.roofline import SECONDS, Rates


@dataclass(frozen=True)
class Lengths:
    """Token counts to time, rising."""

    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    new_tokens: int
    """Decoded after each context."""
    together: int = 1
    """Answers at once that are timed behind the shortest context too; 1: none."""
    notes: tuple[str, ...] = ()
    """Requested lengths that were left out, and the reasons."""

    @property
    def each(self) -> int:
        """Tokens of each of the answers at once, its context included."""
        return self.contexts[0] + self.new_tokens + 1

    @property
    def all_together(self) -> int:
        """Tokens of all answers at once; 0 if none are timed."""
        return self.together * self.each if self.together > 1 else 0

    @property
    def context(self) -> int:
        """Tokens that the KV cache must hold."""
        decoded = max(self.contexts) + self.new_tokens if self.contexts else 0
        return max(decoded, max(self.prompts, default=0))


@dataclass(frozen=True)
class TimingTask:
    """The measurement of one process: the machine and, if `path` is given, one version of a model."""

    device: str
    """As torch names it."""
    dtype: str
    """Of the activations, and of the machine's matrix products."""
    own_bytes: int
    """Bytes of weights that a token reads."""
    threads: int = 0
    """CPU threads; 0 leaves the number to torch."""
    seconds: float = SECONDS
    """For one figure of the roofline."""
    path: str = ""
    method: str = "dense"
    lengths: Lengths = Lengths((), (), 0)


@dataclass(frozen=True)
class PromptTime:
    """Seconds from request to first token, for a prompt of `tokens`."""

    tokens: int
    ttft: float


@dataclass(frozen=True)
class DecodeTime:
    """Decode after a context of `context` tokens."""

    context: int
    gaps: tuple[float, ...]
    """Seconds between tokens: one fewer than new tokens."""
    joules: float | None
    """Energy of all new tokens; None if the machine does not report energy."""

    @property
    def tpot(self) -> float:
        """(end - first token) / (n - 1)."""
        return sum(self.gaps) / len(self.gaps)


@dataclass(frozen=True)
class BatchTime:
    """Decode of several answers at once, each after a context of `context` tokens."""

    sequences: int
    context: int
    steps: tuple[float, ...]
    """Seconds of steps in which each answer gets a token."""


@dataclass(frozen=True)
class Timings:
    """The results of one process. If the task has no version, they hold only the machine's figures."""

    threads: int
    """That torch used."""
    rates: tuple[Rates, ...]
    """Of the machine: before the load, and after all."""
    free_bytes: int
    """Free memory of the device before the load."""
    kernel: str = ""
    load_seconds: float = 0.0
    prompts: tuple[PromptTime, ...] = ()
    decodes: tuple[DecodeTime, ...] = ()
    batch: BatchTime | None = None
    peak_host_bytes: int = 0
    peak_device_bytes: int = 0

    def describe(self) -> str:
        """One line: load, and the longest prompt and context."""
        prompt, decode = self.prompts[-1], self.decodes[-1]
        return (
            f"load {self.load_seconds:.2f} s, prefill of {prompt.tokens}: "
            f"{prompt.tokens / prompt.ttft:,.0f} tokens/s, "
            f"decode at {decode.context}: {1 / decode.tpot:,.1f} tokens/s"
        )
