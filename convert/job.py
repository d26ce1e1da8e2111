"""The state of a conversion on disk: its recipe, and how many layers are finished.

    OUT.partial/
      job.json               the recipe, and the number of finished layers; written last
      lock                   held while a process works here
      hidden-00007.bin       hidden states at the input of layer 7, the next one
      unquantized-00007.bin  the same of the unquantized model
      outside.safetensors    embeddings, norms and head
      layer-00006.safetensors …
      result/                the checkpoint being assembled; renamed to OUT as the last step

A file that job.json does not account for was left by an interruption, and is written again.
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

from lowmem.convert.stages.context import LayerFiles, LinearReport

from lowmem.checkpoint.files.lock import take
from lowmem.checkpoint.files.whole import as_output_error, write_json
from lowmem.checkpoint.manifest import MANIFEST_FILE
from lowmem.errors import OutputError, RecipeError
from lowmem.platform import system

JOB_VERSION = 1
"""Version of job.json."""


@dataclass
class JobState:
    """The content of job.json."""

    recipe: dict[str, Any]
    """Everything that the result's bytes depend on (ConversionInputs.entries)."""
    run: dict[str, Any] = field(default_factory=dict)
    """Choices of the first run that later runs must keep to give the same bytes."""
    finished_layers: int = 0
    reports: list[list[LinearReport]] = field(default_factory=list)
    seconds: float = 0.0
    publishing: bool = False
    """Everything is done except the last renames."""


class ConversionJob:
    """The folder beside OUT in which a conversion works until it is complete."""

    def __init__(self, out: Path) -> None:
        self.out = system.extended(out)
        self.folder = self.out.with_name(out.name + ".partial")
        self.state = JobState({})
        self.resumed = False

    def hidden(self, layer: int) -> Path:
        """The file of hidden states at the input of `layer`."""
        return self.folder / f"hidden-{layer:05d}.bin"

    def unquantized(self, layer: int) -> Path:
        """The file of the unquantized model's hidden states at the input of `layer`."""
        return self.folder / f"unquantized-{layer:05d}.bin"

    def staged(self, layer: int) -> Path:
        """The file of a finished layer's tensors."""
        return self.folder / f"layer-{layer:05d}.safetensors"

    def layer_files(self, layer: int) -> LayerFiles:
        """Where the stages of `layer` write."""
        following = self.hidden(layer + 1), self.unquantized(layer + 1)
        return LayerFiles(self.folder, self.staged(layer), *following)

    @property
    def outside(self) -> Path:
        """The file of the tensors outside the decoder layers."""
        return self.folder / "outside.safetensors"

    @property
    def result(self) -> Path:
        """Where the checkpoint is assembled."""
        return self.folder / "result"

    def check_out(self, force: bool) -> None:
        """Raise OutputError if OUT would be overwritten; force replaces converted checkpoints only."""
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
                f"{self.out} is not a checkpoint written by lowmem, so --force does not replace it",
                "Choose another folder",
            )

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Create the folder and lock it against other processes; remove it if no work was committed."""
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
        """Read the state of an interrupted job; None if there is no job to resume."""
        path = self.folder / "job.json"
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_bytes())
            if data["version"] != JOB_VERSION:
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
        """Resume the job in the folder if its recipe is the same, or prepare a new one.

        Raises RecipeError naming the differences; with force the old job is discarded instead.
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
                if found.publishing:  # until it publishes again: OUT may still be the old one
                    found.publishing = False
                    self.commit()
                self.sweep(found.finished_layers)
                return
            if not force:
                raise RecipeError(
                    f"{self.folder} holds an unfinished conversion with another {'; '.join(changes)}",
                    "Repeat the original command to resume it, or start again with --force",
                )
        self.state = JobState(dict(recipe))

    def start(self, run: Mapping[str, Any]) -> None:
        """Commit a new job; `run` holds the choices that later runs must keep."""
        self.clear()
        self.state.run = dict(run)
        self.commit()

    def clear(self) -> None:
        """Remove all files of an earlier job, except the lock."""
        self._keep("lock")

    def sweep(self, finished: int) -> None:
        """Remove files that job.json, with `finished` layers, does not account for: their space is needed."""
        kept = [self.staged(index) for index in range(finished)]
        if finished:  # those of the first layer are computed again
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
        """Write job.json; the layers that it lists then count as finished."""
        write_json(self.folder / "job.json", {"version": JOB_VERSION, **asdict(self.state)})

    def was_published(self) -> bool:
        """Whether a process was stopped after OUT appeared, so that only its job folder is left."""
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
        """Delete job folders that a killed process had only partly deleted."""
        shutil.rmtree(self._waste, ignore_errors=True)

    @property
    def _replaced(self) -> Path:
        """Where the old OUT is kept while the new one takes its place."""
        return self.folder / "replaced"

    def _put_back(self) -> None:
        """Restore the old OUT if a process was stopped between moving it away and renaming the new one."""
        if self._replaced.is_dir() and not os.path.lexists(self.out):
            try:
                os.rename(self._replaced, self.out)
            except OSError as error:
                raise as_output_error(error, self.out) from error

    def discard(self) -> None:
        """Remove the job's folder. It is renamed first, so that half of it is never taken for a job.

        If that fails, the next conversion into the same folder removes it.
        """
        system.remove_folder(self.folder, self._waste, "job.json")

    def publish(self) -> None:
        """Rename the finished result to OUT, and remove the job's folder."""
        system.flush_folder(self.result)
        self.state.publishing = True
        self.commit()
        old = self._replaced
        try:
            if os.path.lexists(self.out):
                os.rename(self.out, old)
            os.rename(self.result, self.out)
            system.flush_folder(self.out.parent)
        except OSError as error:
            if old.exists() and not self.out.exists():
                os.rename(old, self.out)
            raise as_output_error(error, self.out) from error
        self.discard()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the differences of two recipes, as `bits (4, now 8)`."""
    found = []
    for key in [*old, *(k for k in new if k not in old)]:
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        short = all(isinstance(v, (int, float, str, bool)) and len(str(v)) <= 40 for v in (before, after))
        found.append(f"{key} ({before}, now {after})" if short else key)
    return found
