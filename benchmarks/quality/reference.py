"""The reference, computed once and kept: what the unquantized model makes of each text.

What is kept is not logits but the input of the head: the last hidden states of every token, in the dtype in
which they were computed. The head is one matrix, read from the source again when something is measured, so
the logits are computed anew by the same operations from the same numbers: the compaction has no error, beyond
the rounding of a matrix product that sees other tokens beside a token than before (1e-6 of a logit in
float32). It takes hidden / vocabulary of the space: 24 rows of 512 tokens of StarChat Alpha are 288 MiB in
float32 (144 in bfloat16), where their logits would be 2.25 GiB.

    cache folder/quality/<source digest>/<text digest>-<dtype>.json      what it is, and the digest of
                                         <text digest>-<dtype>.states    raw [rows, row_length, hidden]
                                         <digest>.partial/               an interrupted pass, see streamed.py
                                         <digest>.partial/ready.json     its texts' JSON, as the last step

A file whose digest is not the one noted is computed anew, as is everything of another version of lowmem.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lowmem.benchmarks.quality.texts import Text

from lowmem.checkpoint.cache import cache_root
from lowmem.checkpoint.files.reading import read_json
from lowmem.checkpoint.files.whole import write_json, write_whole
from lowmem.checkpoint.files.writer import tensor_bytes
from lowmem.checkpoint.manifest import digest_file
from lowmem.errors import LowmemError, OutputError
from lowmem.plan.device import host_memory_peak
from lowmem.streaming.forward import Progress, StreamedModel
from lowmem.streaming.hidden_states import HiddenStates
from lowmem.streaming.pass_folder import remove_waste, working

FORMAT = 1
_READY = "ready.json"


@dataclass(frozen=True)
class Reference:
    """states: of each text, by its name. seconds, peak_bytes (of host memory): of what was computed now, 0 if
    all was there. cache_bytes: of the files."""

    states: dict[str, HiddenStates]
    seconds: float
    peak_bytes: int
    cache_bytes: int


def cache_folder(model: StreamedModel) -> Path:
    """Where a model's references are kept; beside the converted checkpoints, and never taken for one."""
    return cache_root() / "quality" / str(model.key["source"])[:32]


def reference_states(
    model: StreamedModel,
    texts: Sequence[Text],
    folder: Path,
    progress: Progress | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Reference:
    """The model's last hidden states of every text: out of `folder`, or computed into it.

    All texts that are missing go through the layers together, so that the source is read once. notify: hears
    of files that are damaged. Raises as StreamedModel.last_hidden does.
    """
    _tidy(folder)
    missing = missing_texts(model, texts, folder, notify)
    seconds, peak = 0.0, 0
    if missing:
        started = time.perf_counter()
        compute(model, missing, folder, progress)
        seconds, peak = time.perf_counter() - started, host_memory_peak()
    states = {text.name: _open(model, text, folder) for text in texts}
    size = sum(found.path.stat().st_size for found in states.values())
    return Reference(states, seconds, peak, size)


def compute(
    model: StreamedModel, texts: Sequence[Text], folder: Path, progress: Progress | None = None
) -> None:
    """Run all texts through the model and keep each one's hidden states in `folder`."""
    rows = torch.cat([text.rows for text in texts])
    name = hashlib.sha256(json.dumps([model.key, *(text.digest for text in texts)]).encode()).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the cache {folder} cannot be made: {error.strerror}",
            "Set LOWMEM_CACHE to a folder, or --no-cache",
        ) from error
    work = folder / f"{name[:32]}.partial"
    with model.passed(rows, work, progress) as states:
        ready, first = {}, 0
        for text in texts:
            count = len(text.rows)
            digest = write_whole(
                _file(model, text, folder, "states"),
                (tensor_bytes(states.read(row, row + 1)) for row in range(first, first + count)),
            )
            ready[text.name] = {**_about(model, text), "sha256": digest.sha256, "bytes": digest.bytes}
            first += count
        # One file for all of them, so that a process that is killed among them has not done it for nothing.
        names = {_file(model, text, folder, "json").name: ready[text.name] for text in texts}
        write_json(work / _READY, names)
        _note(work)


def missing_texts(
    model: StreamedModel,
    texts: Sequence[Text],
    folder: Path,
    notify: Callable[[str], None] = lambda line: None,
) -> list[Text]:
    """The texts whose reference `folder` does not hold, or not as it was written."""
    return [text for text in texts if _kept(model, text, folder, notify) is None]


def disk_needed(model: StreamedModel, missing: Sequence[Text]) -> int:
    """Bytes of disk that computing these texts takes at most: the states before and after the last norm, and
    what is kept."""
    return 3 * state_bytes(model, missing)


def state_bytes(model: StreamedModel, texts: Sequence[Text]) -> int:
    """Bytes of the last hidden states of these texts."""
    return sum(text.rows.numel() for text in texts) * model.hidden * model.dtype.itemsize


def _note(work: Path) -> None:
    """Write the texts' JSON files that a pass has ready."""
    for name, about in read_json(work / _READY).items():
        write_json(work.parent / name, about)


def _tidy(folder: Path) -> None:
    """Finish what killed processes have left almost done."""
    remove_waste(folder)
    for ready in folder.glob(f"*.partial/{_READY}"):
        with contextlib.suppress(LowmemError), working(ready.parent):  # another process may be at it
            _note(ready.parent)


def _about(model: StreamedModel, text: Text) -> dict[str, object]:
    """All that must agree for a kept file to be of use."""
    shape = [*text.rows.shape, model.hidden]
    return {"format": FORMAT, **model.key, "tokens": text.digest, "shape": shape}


def _file(model: StreamedModel, text: Text, folder: Path, suffix: str) -> Path:
    return folder / f"{text.digest[:32]}-{model.key['dtype']}{model.key['on_the_fly']}.{suffix}"


def _open(model: StreamedModel, text: Text, folder: Path) -> HiddenStates:
    shape = (text.rows.shape[0], text.rows.shape[1], model.hidden)
    return HiddenStates.reopen(_file(model, text, folder, "states"), shape, model.dtype, keep=False)


def _kept(
    model: StreamedModel, text: Text, folder: Path, notify: Callable[[str], None]
) -> HiddenStates | None:
    """What is kept of a text, or None where there is nothing, or nothing that can be trusted."""
    about = _file(model, text, folder, "json")
    if not about.is_file():
        return None
    try:
        found = read_json(about)
        sha, length = found.pop("sha256", None), found.pop("bytes", None)
        if found != _about(model, text):
            return None
        digest = digest_file(_file(model, text, folder, "states"))
        if (digest.sha256, digest.bytes) == (sha, length):
            return _open(model, text, folder)
    except (LowmemError, OSError):
        pass
    notify(f"the kept reference of {text.name} is damaged, and computed anew")
    return None
