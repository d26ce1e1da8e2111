"""The state of a conversion on disk: what is finished, and what it was started with.

    OUT.partial/
      job.json               the recipe, and how many layers are finished: the one point of commitment
      lock                   held while a process works here
      hidden-00007.bin       hidden states at the input of layer 7, the next one
      outside.safetensors    embeddings, norms and head
      layer-00006.safetensors …
      result/                the checkpoint being put together; renamed to OUT as the very last step

A file that job.json does not speak of is rubbish from an interruption, and is written again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowmem.convert.stages.layer import LinearReport

from lowmem.checkpoint.files.lock import take
from lowmem.checkpoint.files.whole import as_output_error, sync_folder, write_json
from lowmem.checkpoint.manifest import MANIFEST_FILE
from lowmem.errors import OutputError, RecipeError

VERSION = 1


@dataclass
class JobState:
    """What job.json holds."""

    recipe: dict[str, Any]
    """Everything that the result's bytes depend on, by the name that the user knows."""
    run: dict[str, Any] = field(default_factory=dict)
    """What the first run chose for itself and later ones must keep, to give the same bytes."""
    finished_layers: int = 0
    reports: list[list[LinearReport]] = field(default_factory=list)
    seconds: float = 0.0
    publishing: bool = False
    """All is done but the last renames."""


class Job:
    """The folder beside OUT in which a conversion works until it is whole."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self.state = JobState({})
        self.resumed = False

    def hidden(self, layer: int) -> Path:
        """The file of hidden states at the input of `layer`."""
        return self.folder / f"hidden-{layer:05d}.bin"

    def unquantized(self, layer: int) -> Path:
        """The same of the unquantized model: what the conversion corrects towards."""
        return self.folder / f"unquantized-{layer:05d}.bin"

    def staged(self, layer: int) -> Path:
        """The file of a finished layer's tensors."""
        return self.folder / f"layer-{layer:05d}.safetensors"

    @property
    def outside(self) -> Path:
        """The file of the tensors outside the decoder layers."""
        return self.folder / "outside.safetensors"

    @property
    def result(self) -> Path:
        """Where the checkpoint is put together."""
        return self.folder / "result"

    def check_out(self, force: bool) -> None:
        """Refuse to overwrite; with force, only what is a converted checkpoint is ever replaced."""
        if not self.out.parent.is_dir():
            raise OutputError(f"the folder {self.out.parent} does not exist", "Create it first")
        if not os.path.lexists(self.out):
            return
        if self.out.is_dir() and not self.out.is_symlink() and not any(self.out.iterdir()):
            return
        if not force:
            raise OutputError(f"{self.out} exists", "Choose another folder, or replace it with --force")
        if self.out.is_symlink() or not (self.out / MANIFEST_FILE).is_file():
            raise OutputError(
                f"{self.out} is not a checkpoint that lowmem wrote, so --force does not replace it",
                "Choose another folder",
            )

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Hold the folder against other processes; made here, and gone if nothing came of it."""
        self.remove_waste()
        try:
            lock = take(self.folder / "lock", f"another process is converting into {self.out}")
        except OSError as error:
            raise as_output_error(error, self.folder) from error
        with lock:
            try:
                self._put_back()
                yield
            finally:
                if self.folder.is_dir() and not (self.folder / "job.json").exists():
                    self.discard()

    def load(self) -> JobState | None:
        """The state of an interrupted job, or None if there is none to go on from."""
        path = self.folder / "job.json"
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_bytes())
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']}")
            reports = [[LinearReport(**r) for r in layer] for layer in data["reports"]]
            return JobState(
                dict(data["recipe"]),
                dict(data["run"]),
                int(data["finished_layers"]),
                reports,
                float(data["seconds"]),
                bool(data["publishing"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} is damaged ({error})", "Start again with --force") from error

    def begin(self, recipe: Mapping[str, Any], force: bool) -> None:
        """Go on with the job in the folder if its recipe is the same, or prepare a new one.

        Raises RecipeError naming what differs; with force the old job is dropped instead.
        """
        found: JobState | None = None
        try:
            found = self.load()
        except OutputError:
            if not force:
                raise
        if found is not None:
            changes = differences(found.recipe, recipe)
            if not changes:
                self.state, self.resumed = found, True
                if found.publishing:  # until it is again: OUT may still be the one that is replaced
                    found.publishing = False
                    self.commit()
                self.sweep(found.finished_layers)
                return
            if not force:
                raise RecipeError(
                    f"{self.folder} holds an unfinished conversion with another {'; '.join(changes)}",
                    "Give the same command as then to go on, or start again with --force",
                )
        self.state = JobState(dict(recipe))

    def start(self, run: Mapping[str, Any]) -> None:
        """Make a new job's first mark on disk; `run` is what it keeps to from now on."""
        self.clear()
        self.state.run = dict(run)
        self.commit()

    def clear(self) -> None:
        """Remove all that an earlier job left, but the lock."""
        self._keep("lock")

    def sweep(self, finished: int) -> None:
        """Remove what job.json, which says `finished`, does not speak of: it takes the room of what comes."""
        kept = [self.staged(index) for index in range(finished)]
        if finished:  # the first layer's are made again
            kept += [self.hidden(finished), self.unquantized(finished)]
        self._keep("lock", "job.json", self._replaced.name, *(path.name for path in kept))

    def _keep(self, *names: str) -> None:
        for entry in self.folder.iterdir():
            if entry.name in names:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def commit(self) -> None:
        """Write job.json: from here on, what it says is finished."""
        state = self.state
        write_json(
            self.folder / "job.json",
            {
                "version": VERSION,
                "recipe": state.recipe,
                "run": state.run,
                "finished_layers": state.finished_layers,
                "seconds": round(state.seconds, 3),
                "publishing": state.publishing,
                "reports": [[asdict(report) for report in layer] for layer in state.reports],
            },
        )

    def was_published(self) -> bool:
        """Whether a process was stopped after OUT appeared, and only its job folder is left over."""
        if not (self.folder / "job.json").is_file() or self.result.exists():
            return False
        try:
            state = self.load()
        except OutputError:
            return False  # damaged; `begin` says so
        return state is not None and state.publishing and (self.out / MANIFEST_FILE).is_file()

    @property
    def _waste(self) -> Path:
        return self.folder.with_name(self.folder.name + ".done")

    def remove_waste(self) -> None:
        """Remove what a killed process has left of a folder that it was removing: OUT is whole without it."""
        shutil.rmtree(self._waste, ignore_errors=True)

    @property
    def _replaced(self) -> Path:
        """Where the earlier OUT lies while the new one takes its place."""
        return self.folder / "replaced"

    def _put_back(self) -> None:
        """An earlier OUT, if a process was stopped between taking it away and putting the new one there: it
        stays until there is a new one."""
        if self._replaced.is_dir() and not os.path.lexists(self.out):
            try:
                os.rename(self._replaced, self.out)
            except OSError as error:
                raise as_output_error(error, self.out) from error

    def discard(self) -> None:
        """Remove the job's folder: at once by its name, so that half of it is never taken for a job.

        Where the disk refuses it is left, and the next conversion into the same place removes it.
        """
        self.remove_waste()
        with contextlib.suppress(OSError):
            os.rename(self.folder, self._waste)
        self.remove_waste()

    def publish(self) -> None:
        """The finished result becomes OUT in one rename, and the job's folder goes."""
        sync_folder(self.result)
        self.state.publishing = True
        self.commit()
        old = self._replaced
        try:
            if os.path.lexists(self.out) and any(self.out.iterdir()):
                os.rename(self.out, old)
            os.rename(self.result, self.out)
            sync_folder(self.out.parent)
        except OSError as error:
            if old.exists() and not self.out.exists():
                os.rename(old, self.out)
            raise as_output_error(error, self.out) from error
        self.discard()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`bits (4, now 8)` for everything in which two recipes differ."""
    found = []
    for key in [*old, *(k for k in new if k not in old)]:
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        short = all(isinstance(v, (int, float, str, bool)) and len(str(v)) <= 40 for v in (before, after))
        found.append(f"{key} ({before}, now {after})" if short else key)
    return found
