"""A run's work folder: conversions in processes of their own and figures, kept when finished.

settings.json             the source and recipe that the folder belongs to
prepared.json tokens.json importance.npz source.gguf      for all versions
KEY.conversion.json       of a version, which is in KEY/, KEY.gguf or KEY.safetensors
KEY.point.json            of a version: its figures
*.log                     output of the processes
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.benchmarks.common.record_file import from_json, to_json
from lowmem.benchmarks.experiments.common import say
from lowmem.benchmarks.experiments.curve.evaluate import Evaluator
from lowmem.benchmarks.experiments.curve.linears import (
    Linear,
    average_bits,
    kinds_of,
    read_dense,
    read_gguf,
    read_gptq,
    read_tuned,
)
from lowmem.benchmarks.experiments.curve.record import AUTOSCHEME, GROUP_SIZE, UNIFORM, Point, Version
from lowmem.benchmarks.experiments.peers.run import GGUF_TYPES, STEPS, Run, StepError, quantize_command
from lowmem.benchmarks.experiments.peers.steps import mean_square_inputs, stored_dtype

from lowmem.errors import LowmemError

if TYPE_CHECKING:
    import torch

AUTOSCHEME_WORKER = Path(__file__).parents[1] / "workers" / "autoscheme_worker.py"


@dataclass(frozen=True)
class Curve:
    """The versions of a source in a work folder."""

    run: Run
    """The folder, the peers' interpreters and AutoRound's iterations."""
    evaluator: Evaluator

    def prepare(self) -> dict[str, Any]:
        """Token rows and importances for the converters, unless they are kept: prepared.json."""
        import numpy as np
        from lowmem.convert.calibration import CalibrationSpec, load_rows

        from lowmem.checkpoint.source.open import open_source
        from lowmem.models.dialogue import Dialogue

        kept: dict[str, Any] | None = self.run.kept("prepared")
        if kept is not None:
            return kept
        say("calibration rows and importances …")
        source = open_source(self.run.source)
        tokenizer, model = source.tokenizer(), self.evaluator.model
        rows = load_rows(CalibrationSpec(), tokenizer, Dialogue.detect(tokenizer), model.config.vocab_size)
        (self.run.work / "tokens.json").write_text(json.dumps(rows.tokens.tolist()))
        np.savez(self.run.work / "importance.npz", **mean_square_inputs(model, rows.tokens))  # type: ignore[arg-type]
        dtype = str(stored_dtype(self.run.source)).removeprefix("torch.")
        data = {"calibration": rows.description, "fingerprint": source.fingerprint(), "dtype": dtype}
        self.run.keep("prepared", data)
        return data

    def measure(self, version: Version) -> Point:
        """The figures of a version, kept or measured; a failed conversion is recorded with its reason."""
        name = f"{version.key}.point"
        kept = self.run.kept(name)
        if kept is not None:
            found: Point = from_json(Point, kept)
            return found
        try:
            conversion = self.convert(version)
            stored, texts = self.evaluator.divergences(*self.read(version, conversion))
        except (StepError, LowmemError, ValueError) as error:
            return Point(version.label, version.family, version.target, 0.0, (), (), str(error))
        point = Point(
            version.label,
            version.family,
            version.target,
            average_bits(stored),
            tuple(kinds_of(stored)),
            tuple(texts),
        )
        self.run.keep(name, to_json(point))
        return point

    def path_of(self, version: Version) -> Path:
        """The version's folder or file."""
        suffix = ".gguf" if version.kind else ".safetensors" if version.family == AUTOSCHEME else ""
        return self.run.work / f"{version.key}{suffix}"

    def convert(self, version: Version) -> dict[str, Any]:
        """Make a version unless it is kept: what the converter reported. Raises StepError."""
        name = f"{version.key}.conversion"
        kept: dict[str, Any] | None = self.run.kept(name)
        if kept is not None:
            return kept
        command = self._command(version)
        if version.kind or version.family == AUTOSCHEME:
            _, data = self.run.reported(command, name)
        else:  # resumes an interrupted conversion, and makes the same rows itself
            self.run.process(command, name)
            data = {"versions": {}}
        self.run.keep(name, data)
        return data

    def _command(self, version: Version) -> list[str]:
        """The command that makes a version."""
        run, out = self.run, str(self.path_of(version))
        if version.kind:
            source = run.work / "source.gguf"
            if not source.is_file():
                run.process([*STEPS, "gguf", run.source, "--path", str(source)], "source.gguf")
            embedding = GGUF_TYPES[self.prepare()["dtype"]]
            more = ["--importance", str(run.work / "importance.npz")] if version.importance else []
            return quantize_command(run.peers.llama, source, Path(out), version.kind, embedding) + more
        if version.family == AUTOSCHEME:
            command = [run.peers.autoround, str(AUTOSCHEME_WORKER), run.source, "--out", out]
            command += ["--tokens", str(run.work / "tokens.json"), "--average", f"{version.target:g}"]
            return [*command, "--iters", str(run.iterations)]
        command = [sys.executable, "-m", "lowmem", "convert", run.source, out]
        if version.family == UNIFORM:
            return [*command, "--bits", f"{version.target:g}", "--group-size", str(GROUP_SIZE)]
        return [*command, "--bpw", f"{version.target:g}"]

    def read(
        self, version: Version, conversion: dict[str, Any]
    ) -> tuple[Iterator[tuple[Linear, torch.Tensor]], dict[str, torch.Tensor]]:
        """The version's dequantized linears with how each is stored, and the norms and biases it tuned."""
        from lowmem.checkpoint.source.open import open_source

        path, names = self.path_of(version), self.evaluator.names
        if version.kind:
            return read_gguf(path, names, self.evaluator.config), {}
        if version.family == AUTOSCHEME:
            return read_dense(path, names, conversion["widths"]), {}
        source = open_source(str(path))
        return read_gptq(source, names), read_tuned(source, self.evaluator.small)


def measure_all(curve: Curve, versions: Sequence[Version]) -> tuple[Point, ...]:
    """Convert and measure the versions, and say what was found."""
    points = []
    for number, version in enumerate(versions, 1):
        say(f"[{number}/{len(versions)}] {version.label} …")
        point = curve.measure(version)
        for text in point.texts:
            say(f"    {point.bits:.3f} bits, {text.text}: KL divergence {text.kld:.6f}")
        if point.failure:
            say(f"    failed: {point.failure}")
        points.append(point)
    return tuple(points)
