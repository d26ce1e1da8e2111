"""The unquantized model's last hidden states on each text, computed once and kept on disk.

Hidden states are kept instead of logits: they take hidden / vocabulary of the space. For StarChat Alpha, 24
rows of 512 tokens take 288 MiB in float32, and their logits would take 2.25 GiB. The logits are computed
again from the same numbers by the same operations, and differ only by the rounding of a matrix product with
other tokens in its batch (1e-6 of a logit in float32).

    <cache>/quality/<source digest>/<text digest>-<dtype>.json      settings, and the digest of
                                    <text digest>-<dtype>.states    raw [rows, row_length, hidden]
                                    <digest>.partial/               an interrupted pass
                                    <digest>.partial/ready.json     the JSON files to write, as its last step

Damaged files, and files of another version of lowmem, are computed again.
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
    """The reference model's hidden states on all texts."""

    states: dict[str, HiddenStates]
    """By text."""
    seconds: float
    """Time of computing; 0 if everything was cached."""
    peak_bytes: int
    """Peak host memory of computing; 0 if everything was cached."""
    cache_bytes: int
    """Of the files."""


def cache_folder(model: StreamedModel) -> Path:
    """Return the folder in lowmem's cache for a model's hidden states."""
    return cache_root() / "quality" / str(model.key["source"])[:32]


def reference_states(
    model: StreamedModel,
    texts: Sequence[Text],
    folder: Path,
    progress: Progress | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Reference:
    """Read the model's last hidden states on every text from `folder`; compute and store missing ones.

    Missing texts go through the layers together, so the source is read once. notify: called with a line for
    each damaged file. Raises what StreamedModel.last_hidden raises.
    """
    _finish_interrupted(folder)
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
    """Run texts through the model and store their hidden states in `folder`."""
    rows = torch.cat([text.rows for text in texts])
    name = hashlib.sha256(json.dumps([model.key, *(text.digest for text in texts)]).encode()).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the cache folder {folder} cannot be created: {error.strerror}",
            "Set LOWMEM_CACHE to another folder, or use --no-cache",
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
        # One file for all of them, so that a kill between them loses nothing.
        names = {_file(model, text, folder, "json").name: ready[text.name] for text in texts}
        write_json(work / _READY, names)
        _write_ready(work)


def missing_texts(
    model: StreamedModel,
    texts: Sequence[Text],
    folder: Path,
    notify: Callable[[str], None] = lambda line: None,
) -> list[Text]:
    """Find the texts whose hidden states in `folder` are missing or damaged."""
    return [text for text in texts if _cached(model, text, folder, notify) is None]


def disk_needed(model: StreamedModel, missing: Sequence[Text]) -> int:
    """Most bytes of disk needed to compute these texts: states before and after the last norm, and the
    result.
    """
    return 3 * state_bytes(model, missing)


def state_bytes(model: StreamedModel, texts: Sequence[Text]) -> int:
    """Bytes of the last hidden states of these texts."""
    return sum(text.rows.numel() for text in texts) * model.hidden * model.dtype.itemsize


def _write_ready(work: Path) -> None:
    """Write the JSON files of a finished pass."""
    for name, about in read_json(work / _READY).items():
        write_json(work.parent / name, about)


def _finish_interrupted(folder: Path) -> None:
    """Finish the last step of passes that were killed in it."""
    remove_waste(folder)
    for ready in folder.glob(f"*.partial/{_READY}"):
        with contextlib.suppress(LowmemError), working(ready.parent):  # another process may hold it
            _write_ready(ready.parent)


def _about(model: StreamedModel, text: Text) -> dict[str, object]:
    """What must agree for a kept file to be usable."""
    shape = [*text.rows.shape, model.hidden]
    return {"format": FORMAT, **model.key, "tokens": text.digest, "shape": shape}


def _file(model: StreamedModel, text: Text, folder: Path, suffix: str) -> Path:
    return folder / f"{text.digest[:32]}-{model.key['dtype']}{model.key['on_the_fly']}.{suffix}"


def _open(model: StreamedModel, text: Text, folder: Path) -> HiddenStates:
    shape = (text.rows.shape[0], text.rows.shape[1], model.hidden)
    return HiddenStates.reopen(_file(model, text, folder, "states"), shape, model.dtype, keep=False)


def _cached(
    model: StreamedModel, text: Text, folder: Path, notify: Callable[[str], None]
) -> HiddenStates | None:
    """The kept states of a text, or None if they are missing or damaged."""
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
    notify(f"the cached reference of {text.name} is damaged and is computed again")
    return None
