"""What a latency measurement times: lengths that the model has positions for, versions that fit in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowmem.benchmarks.common.lineup import Entrant
from lowmem.benchmarks.latency.roofline import Rates, decode_ceiling, prefill_ceiling
from lowmem.benchmarks.latency.tasks import Lengths, TimingTask

from lowmem.errors import InvalidRequestError
from lowmem.kernels.registry import USUAL_SUPPORT, KernelSupport
from lowmem.plan.memory import HOST_CONTEXT, bytes_read_a_token, need_on_device
from lowmem.text.units import format_bytes

PROMPTS = (32, 128, 512, 2048)
CONTEXTS = (128, 1024, 4096)


@dataclass(frozen=True)
class Budget:
    """Memory of the device that the versions run on."""

    device: str
    """As torch names it."""
    free: int
    """Bytes that may be used."""
    reason: str
    """Where that number comes from, as the end of a sentence: "8 GiB are free"."""
    own: int = HOST_CONTEXT
    """Bytes that a process needs before it loads anything, if `free` still includes them."""
    support: KernelSupport = USUAL_SUPPORT


@dataclass(frozen=True)
class PlannedVersion:
    """One version of the model, and how it is timed."""

    entrant: Entrant
    lengths: Lengths
    """Those that fit in memory."""
    needed_bytes: int
    reason: str = ""
    """Why it cannot be timed; "" if it can."""

    @property
    def label(self) -> str:
        """Of the version, unique in the measurement."""
        return self.entrant.subject.label

    @property
    def own_bytes(self) -> int:
        """Bytes of weights that a token reads."""
        return bytes_read_a_token(self.entrant.candidate.shape, self.entrant.candidate.form)

    def task(self, machine: TimingTask) -> TimingTask:
        """Create the task that times this version. machine: the task for the machine alone, on the same
        device.
        """
        candidate = self.entrant.candidate
        return replace(
            machine,
            dtype=candidate.form.dtype,
            own_bytes=self.own_bytes,
            path=str(candidate.path.resolve()),
            method=candidate.form.method,
            lengths=self.lengths,
        )

    def decode_ceiling(self, context: int, read: float) -> float:
        """Tokens per second of decode that reading `read` bytes per second allows."""
        shape, form = self.entrant.candidate.shape, self.entrant.candidate.form
        return decode_ceiling(shape, form, context, self.lengths.new_tokens, read)

    def prefill_ceiling(self, tokens: int, read: float, matmul: float) -> float:
        """Tokens per second of prefill that `read` and `matmul` operations per second allow."""
        shape, form = self.entrant.candidate.shape, self.entrant.candidate.form
        return prefill_ceiling(shape, form, tokens, read, matmul)

    def describe(self, rates: Rates) -> str:
        """Describe the version in one line: its speed limit on this machine, or why it does not fit."""
        if self.reason:
            return f"{self.label} does not fit: {self.reason}"
        decode = self.decode_ceiling(self.lengths.contexts[0], rates.read)
        prefill = self.prefill_ceiling(self.lengths.prompts[-1], rates.read, rates.matmul)
        return (
            f"{self.label}: a token reads {format_bytes(self.own_bytes)}, so memory allows {decode:,.0f} "
            f"tokens/s of decode and {prefill:,.0f} tokens/s of prefill"
        )


def choose_lengths(
    prompts: Sequence[int] | None,
    contexts: Sequence[int] | None,
    new_tokens: int,
    positions: int | None,
    together: int = 1,
) -> Lengths:
    """Choose the lengths that fit the model's positions; None takes the defaults.

    The first default context that is too long is cut to the longest possible. Lengths that the user named are
    omitted with a note if they are too long. together: answers at once to time, passed on. Raises
    InvalidRequestError if a number is out of range or no length is left.
    """
    if new_tokens < 2:
        raise InvalidRequestError("--new-tokens must be at least 2 to time a gap", "Use 64, for example")
    if any(number < 1 for number in [*(prompts or ()), *(contexts or ())]):
        raise InvalidRequestError("--prompts and --contexts must be at least 1", "Use 128,1024, for example")
    limit = positions or 1 << 31
    most = limit - new_tokens
    if contexts is None:
        wanted = [c for c in CONTEXTS if c <= most]
        contexts = wanted if len(wanted) == len(CONTEXTS) or most < 1 else [*wanted, most]
    asked = prompts if prompts is not None else [p for p in PROMPTS if p <= limit]
    notes = []
    if long := sorted({c for c in contexts if c > most}):
        notes.append(
            f"left out {_listed('context', long)}: longer than the model's {limit} positions with "
            f"{new_tokens} new tokens"
        )
    if long := sorted({p for p in asked if p > limit}):
        notes.append(f"left out {_listed('prompt', long)}: longer than the model's {limit} positions")
    found = Lengths(
        tuple(sorted({p for p in asked if p <= limit})),
        tuple(sorted({c for c in contexts if c <= most})),
        new_tokens,
        together,
        tuple(notes),
    )
    if not found.prompts or not found.contexts:
        raise InvalidRequestError(
            f"no length fits the model's {limit} positions with {new_tokens} new tokens",
            "Use shorter --prompts and --contexts, or fewer --new-tokens",
        )
    return found


def _listed(word: str, numbers: Sequence[int]) -> str:
    return f"{word}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def plan_version(entrant: Entrant, lengths: Lengths, budget: Budget) -> PlannedVersion:
    """Choose the lengths that this version can run within the budget."""

    def need(tokens: int) -> int:
        return need_on_device(
            entrant.candidate.shape,
            entrant.candidate.form,
            tokens,
            cuda=budget.device != "cpu",
            support=budget.support,
            own_context=budget.own,
        ).total

    new = lengths.new_tokens
    prompts = tuple(p for p in lengths.prompts if need(p) <= budget.free)
    contexts = tuple(c for c in lengths.contexts if need(c + new) <= budget.free)
    if not prompts or not contexts:
        tokens = max(min(lengths.prompts), min(lengths.contexts) + new)
        reason = f"needs {format_bytes(need(tokens))} with a context of {tokens}, and {budget.reason}"
        return PlannedVersion(entrant, lengths, need(tokens), reason)
    notes = []
    if left := len(lengths.prompts) + len(lengths.contexts) - len(prompts) - len(contexts):
        notes.append(
            f"{entrant.subject.label}: {left} of the lengths need too much memory; measured were prompts "
            f"up to {prompts[-1]} and contexts up to {contexts[-1]}"
        )
    fitting = Lengths(prompts, contexts, new, lengths.together, tuple(notes))
    most = max(fitting.context, fitting.all_together)
    if need(most) > budget.free:
        line = f"{entrant.subject.label}: {fitting.together} answers at once need too much memory"
        fitting, most = replace(fitting, together=1, notes=(*fitting.notes, line)), fitting.context
    return PlannedVersion(entrant, fitting, need(most))


def usual_dtype(planned: Sequence[PlannedVersion]) -> str:
    """Return the dtype of most versions."""
    return Counter(one.entrant.subject.dtype for one in planned).most_common(1)[0][0]
