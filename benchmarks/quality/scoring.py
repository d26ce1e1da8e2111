"""One version of a model against the reference: its figures on every text, and its greedy answers.

A version is streamed one decoder layer at a time like the reference, so a model of any size is measured in a
few GiB. Or it is loaded as `lowmem run` loads it, so that the kernels that answer are measured with it.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lowmem.benchmarks.common.currency import made_with
from lowmem.benchmarks.common.lineup import Entrant
from lowmem.benchmarks.common.progress import Progress
from lowmem.benchmarks.common.records import GreedyAgreement, SubjectQuality, TextQuality
from lowmem.benchmarks.quality.agreement import NEW_TOKENS, agreement
from lowmem.benchmarks.quality.divergence import compare, summarize
from lowmem.benchmarks.quality.reference_states import Reference
from lowmem.benchmarks.quality.texts import Text

from lowmem.checkpoint.source.open import open_source
from lowmem.errors import LowmemError, MemoryBudgetError
from lowmem.streaming.forward import StreamedModel, head_of
from lowmem.streaming.hidden_states import HiddenStates
from lowmem.streaming.pass_folder import working

_VALUES_AT_A_TIME = 1 << 23
"""Logits of one model that are held together."""
Logits = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states [tokens, hidden] → logits [tokens, vocabulary]."""


@dataclass(frozen=True)
class Rows:
    """The last hidden states of one text: the rows from `first` on."""

    states: HiddenStates
    first: int = 0

    def row(self, row: int) -> torch.Tensor:
        """[row_length, hidden]."""
        return self.states.read(self.first + row, self.first + row + 1)[0]


@dataclass(frozen=True)
class Opened:
    """A version that is ready to be compared."""

    states: dict[str, Rows]
    """By text."""
    logits: Logits
    kernel: str = ""
    """What multiplies its linears; "" if they are dequantized."""


@dataclass(frozen=True)
class Scorer:
    """Scores versions against one reference, on the same texts."""

    reference: StreamedModel
    kept: Reference
    """The reference's hidden states."""
    texts: tuple[Text, ...]
    folder: Path
    """For work in progress."""
    device: str
    """That models run on, as torch names it."""
    progress: Progress
    kernels: bool = False
    """Load versions and run the kernels that answer, instead of streaming them."""
    greedy: bool = True
    """Measure greedy answers, too."""

    def score(self, entrant: Entrant, is_floor: bool) -> SubjectQuality:
        """Score one version on every text. Raises MemoryBudgetError if it must be loaded but does not fit in
        memory.
        """
        started = time.perf_counter()
        with self._opened(entrant) as opened:
            found = tuple(self._compared(text, opened) for text in self.texts)
        greedy = self._greedy(entrant) if self.greedy else None
        subject = replace(entrant.subject, made_with=made_with(entrant.candidate.path, opened.kernel))
        return SubjectQuality(subject, is_floor, found, greedy, time.perf_counter() - started)

    def _compared(self, text: Text, opened: Opened) -> TextQuality:
        """One version on one text. Both heads are in memory."""
        step = max(16, _VALUES_AT_A_TIME // self.reference.vocabulary)
        reference, states = Rows(self.kept.states[text.name]), opened.states[text.name]
        with self.reference.head() as expected:

            def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
                for row in range(len(text.rows)):
                    parts = zip(reference.row(row).split(step), states.row(row).split(step), strict=True)
                    for ours, theirs in parts:
                        yield expected(ours), opened.logits(theirs)

            return summarize(text.name, compare(text.rows, pairs()))

    @contextlib.contextmanager
    def _opened(self, entrant: Entrant) -> Iterator[Opened]:
        """Compute a version's last hidden states; its files are removed at the end.

        An interrupted computation is kept and resumes.
        """
        candidate, method = entrant.candidate, entrant.candidate.form.method
        folder = self.folder / f"{digest_of_entrant(entrant)[:24]}-{entrant.subject.dtype}{method}.partial"
        rows = torch.cat([text.rows for text in self.texts])
        if self.kernels and method != "dense":  # a dense version runs torch's product either way
            loaded = self._load(entrant)
            with working(folder):
                states = _loaded_states(loaded, rows, folder / "last", self.reference.hidden)
                with head_of(loaded.model, loaded.device) as logits:
                    yield Opened(_by_text(states, self.texts), logits, loaded.kernel)
            del loaded
            gc.collect()
            return
        model = StreamedModel(
            open_source(candidate.path, offline=True),
            getattr(torch, entrant.subject.dtype),
            on_the_fly=method if method in ("int8", "nf4") else None,
            device=self.reference.device,
        )
        if model.key == self.reference.key:
            with model.head() as logits:
                yield Opened({name: Rows(states) for name, states in self.kept.states.items()}, logits)
            return
        with model.passed(rows, folder, self.layers) as states, model.head() as logits:
            yield Opened(_by_text(states, self.texts), logits)

    def layers(self, done: int, count: int) -> None:
        """Update the progress display: `done` of `count` decoder layers have processed all rows."""
        self.progress.update(done, count)

    def _load(self, entrant: Entrant, context: int | None = None) -> Any:
        """The version as `lowmem run` loads it. Raises MemoryBudgetError if it does not fit."""
        from lowmem.loading.opening import load_option
        from lowmem.plan.request import ModelRequest, plan_for

        candidate, wanted = entrant.candidate, context or self.texts[0].rows.shape[1]
        request = ModelRequest(
            str(candidate.path),
            context=min(wanted, candidate.shape.positions or wanted),
            method=candidate.form.method,
            device=self.device,
            dtype=entrant.subject.dtype if self.kernels else candidate.form.dtype,
            head_bits=candidate.form.head_bits,
        )
        plan = plan_for(request)
        return load_option(plan.chosen, plan, request)

    def _greedy(self, entrant: Entrant) -> GreedyAgreement | None:
        """The version's greedy answers as it runs; None, with a note, if it does not fit this machine."""
        try:
            loaded = self._load(entrant, context=4 * NEW_TOKENS)
        except LowmemError as error:
            why = "does not fit this machine" if isinstance(error, MemoryBudgetError) else "cannot be loaded"
            self.progress.note(f"{entrant.subject.label} {why}: no greedy answers: {error.message}")
            return None
        name = f"greedy-{digest_of_entrant(entrant)[:24]}-{entrant.candidate.form.method}.partial"
        return agreement(self.reference, loaded, self.folder / name, self.layers)


def digest_of_entrant(entrant: Entrant) -> str:
    """Return the fingerprint of the checkpoint that a version is loaded from."""
    return str(open_source(entrant.candidate.path, offline=True).fingerprint())


def _by_text(states: HiddenStates, texts: Sequence[Text]) -> dict[str, Rows]:
    found, first = {}, 0
    for text in texts:
        found[text.name] = Rows(states, first)
        first += len(text.rows)
    return found


def _loaded_states(loaded: Any, rows: torch.Tensor, path: Path, hidden: int) -> HiddenStates:
    """The last hidden states of a loaded model, computed a row at a time."""

    def chunks() -> Iterator[torch.Tensor]:
        for row in rows.split(1):
            with torch.no_grad():
                output = loaded.model.base_model(input_ids=row.to(loaded.device), use_cache=False)
            yield output.last_hidden_state.cpu()

    shape = (rows.shape[0], rows.shape[1], hidden)
    return HiddenStates.create(path, shape, loaded.dtype, chunks(), keep=False)
