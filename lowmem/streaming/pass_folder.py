"""The folder of one pass through a model: its hidden states, and how many layers are finished."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch

from lowmem.checkpoint.files.lock import take
from lowmem.checkpoint.files.reading import read_json
from lowmem.checkpoint.files.whole import as_output_error, is_disk_full, write_json
from lowmem.errors import LowmemError, OutputError
from lowmem.platform import system
from lowmem.streaming.hidden_states import HiddenStates

REMOVED = ".done"
"""Suffix of a folder that is being removed."""
_STATE = "state.json"


class PassFolder:
    """Hidden states on disk, and `state.json`, which says what they are and how many layers are finished."""

    def __init__(self, path: Path, identity: dict[str, object], rows: torch.Tensor, hidden: int) -> None:
        """identity: everything except the token rows that the hidden states depend on."""
        self.path = path
        self.shape = (rows.shape[0], rows.shape[1], hidden)
        self._state = {**identity, "tokens": digest_of(rows), "shape": list(self.shape)}

    def states(self, layer: int) -> Path:
        """The file of the hidden states at the input of `layer`."""
        return self.path / f"hidden-{layer}"

    @property
    def result(self) -> Path:
        """The file of the last hidden states."""
        return self.path / "last"

    def commit(self, finished: int) -> None:
        """Record the number of finished layers."""
        write_json(self.path / _STATE, {**self._state, "finished": finished})

    def resume(self, layers: int, dtype: torch.dtype) -> tuple[HiddenStates | None, int]:
        """Return the hidden states and the number of finished layers of an interrupted pass.

        The pass must have run over the same rows; without one the result is (None, 0). Everything else in the
        folder is removed.
        """
        try:
            state = read_json(self.path / _STATE)
            finished = state.pop("finished", None)
            if state == self._state and type(finished) is int and 0 <= finished <= layers:
                states = HiddenStates.reopen(self.states(finished), self.shape, dtype, keep=False)
                self._remove_states(keep=finished)
                return states, finished
        except LowmemError:
            pass  # no state, or a damaged one
        self._remove_states()
        return None, 0

    def _remove_states(self, keep: int | None = None) -> None:
        for path in self.path.glob("hidden-*"):
            if keep is None or path != self.states(keep):
                path.unlink()


def locked(folder: Path) -> IO[bytes]:
    """Create the folder, and lock it against other processes until the result is closed.

    Raises OutputError if another process holds it, or if it cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return take(folder / "lock", f"another process is measuring the same in {folder}")
    except OSError as error:
        if is_disk_full(error):
            raise as_output_error(error, folder) from error
        raise OutputError(
            f"{folder} cannot be written: {error.strerror}", "Set LOWMEM_CACHE to a writable folder"
        ) from error


@contextlib.contextmanager
def working(folder: Path) -> Iterator[None]:
    """Lock the folder, and remove it afterwards unless an exception is raised.

    It is renamed before it is removed, so that half of it is never taken for a pass.
    """
    with locked(folder):
        yield
        waste = folder.with_name(folder.name + REMOVED)
        system.remove_folder(folder, waste, _STATE)


def remove_waste(folder: Path) -> None:
    """Delete folders in `folder` that a killed process had only partly deleted."""
    for waste in folder.glob(f"*{REMOVED}"):
        shutil.rmtree(waste, ignore_errors=True)


def digest_of(rows: torch.Tensor) -> str:
    """sha256 of token rows: their shape, and the ids as 64-bit little-endian integers."""
    digest = hashlib.sha256(f"{tuple(rows.shape)}\0".encode())
    digest.update(rows.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
