"""A comparison's work folder: conversions and quality in processes of their own, kept when finished.

settings.json             the source and recipe that the folder belongs to
prepared.json tokens.json rows-*.npy reference-*.npy importance.npz source.gguf      for all versions
KEY.conversion.json       of a version: its usage and recipe; the version is in KEY/ or KEY.gguf
KEY.quality.json          of a version: its figures
*.log                     output of the processes
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem.benchmarks.common.record_file import from_json
from lowmem.benchmarks.common.records import Subject
from lowmem.benchmarks.experiments.common import say
from lowmem.benchmarks.experiments.peers.record import Version, VersionResult
from lowmem.benchmarks.experiments.processes import Usage, run_process
from lowmem.benchmarks.experiments.workers.interpreters import Peers
from lowmem.benchmarks.experiments.workers.turns import AUTOROUND, LLAMA, last_lines

from lowmem.errors import OutputError

STEPS = (sys.executable, "-m", "lowmem.benchmarks.experiments.peers.steps")
GGUF_TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Prepared:
    """What all versions share."""

    calibration: str
    """Description of the calibration rows."""
    fingerprint: str
    dtype: str
    """In which the source stores its linears."""
    texts: tuple[str, ...]


class StepError(Exception):
    """A step's process failed; the message is the end of its log."""


@dataclass(frozen=True)
class Run:
    """One comparison of the versions of `source`, in the folder `work`."""

    source: str
    work: Path
    peers: Peers
    iterations: int
    """AutoRound's."""
    only: tuple[str, ...] | None
    """Beginnings of the keys or labels of the wanted versions; None for all."""
    threads: int
    """Of llama.cpp, while it computes logits."""

    def begin(self, again: Sequence[str]) -> None:
        """Make the folder, and remove the steps whose names begin with one of `again`.

        Raises OutputError if the folder belongs to another run.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        path = Path(self.source)
        files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
        stamps = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]
        settings = {"source": str(path.resolve()), "files": stamps, "iterations": self.iterations}
        if self.kept("settings") not in (None, settings):
            raise OutputError(
                f"{self.work} holds steps of another model, or of other iterations",
                f"Give another --work, or remove {self.work}",
            )
        self.keep("settings", settings)
        for name in again:
            for file in self.work.glob(f"{name}*"):
                if file.is_dir():
                    shutil.rmtree(file)
                else:
                    file.unlink()

    def kept(self, name: str) -> Any:
        """The result of a finished step, or None."""
        try:
            return json.loads((self.work / f"{name}.json").read_bytes())
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def keep(self, name: str, data: object) -> None:
        """Write the result of a step, which is then finished."""
        part = self.work / f"{name}.part"
        part.write_text(json.dumps(data))
        part.replace(self.work / f"{name}.json")

    def wants(self, version: Version) -> bool:
        """Whether --only names this version."""
        names = (version.key, version.label, version.label.lower())
        return self.only is None or any(name.startswith(begin) for name in names for begin in self.only)

    def prepare(self) -> Prepared:
        """Rows, texts and the reference's logits. Raises OutputError where they cannot be made."""
        llama = "llama.cpp" in self.peers.names
        # An earlier run without llama.cpp has no importance matrix.
        lacking = llama and not (self.work / "importance.npz").is_file()
        if self.kept("prepared") is None or lacking:
            say("rows, texts and the reference's logits …")
            command = [*STEPS, "prepare", self.source, "--work", str(self.work)]
            try:
                self.process([*command, *(["--importance"] if llama else [])], "prepare")
            except StepError as error:
                raise OutputError(f"the source cannot be prepared: {error}", f"See {self.work}") from error
        data = self.kept("prepared")
        return Prepared(data["calibration"], data["fingerprint"], data["dtype"], tuple(data["texts"]))

    def process(self, command: Sequence[str], log: str) -> Usage:
        """Run a step's process. Raises StepError if it fails."""
        file = self.work / f"{log}.log"
        try:
            return run_process(command, file)
        except SystemExit as error:
            raise StepError(last_lines(file)) from error

    def reported(self, command: Sequence[str], log: str) -> tuple[Usage, dict[str, Any]]:
        """The same for a command that writes its result to --report: usage and result."""
        report = self.work / f"{log}.report"
        usage = self.process([*command, "--report", str(report)], log)
        data = json.loads(report.read_bytes())
        report.unlink()
        return usage, data

    def peer_versions(self) -> tuple[tuple[str, str], ...]:
        """(package, version) of the peers, from the conversions' reports."""
        found: dict[str, str] = {}
        for file in sorted(self.work.glob("*.conversion.json")):
            found |= json.loads(file.read_bytes())["versions"]
        return tuple(found.items())

    def path_of(self, version: Version) -> Path:
        """The version's folder or file."""
        if version.method == "gguf":
            return self.work / f"{version.key}.gguf"
        if version.method == "unpacked":
            return self.work / f"{version.of}.gguf"
        if version.method != "gptq":
            return Path(self.source).resolve()
        folder = self.work / version.key
        if version.peer == "AutoRound" and folder.is_dir():  # it writes to a folder inside
            return next((path.parent for path in sorted(folder.rglob("config.json"))), folder)
        return folder


def measure_versions(run: Run, versions: Sequence[Version]) -> tuple[VersionResult, ...]:
    """Convert and measure every wanted version; a failure is recorded with its reason."""
    wanted = [version for version in versions if run.wants(version)]
    found = []
    for number, version in enumerate(wanted, 1):
        say(f"[{number}/{len(wanted)}] {version.label} …")
        result = _measure(run, version)
        for text in result.texts:
            say(f"    {text.text}: KL divergence {text.kld.mean:.6f}, same top-1 {text.same_top1:.2%}")
        if result.failure:
            say(f"    failed: {result.failure}")
        found.append(result)
    return tuple(found)


def _measure(run: Run, version: Version) -> VersionResult:
    conversion: dict[str, Any] = {"usage": None, "settings": {}}
    failure = ""
    found: dict[str, Any] = {"texts": [], "bits_per_weight": 0.0, "weight_bytes": 0}
    try:
        conversion = convert(run, version)
        found = _quality(run, version)
    except StepError as error:
        failure = str(error)
    dtype = run.prepare().dtype if version.peer == "none" else "float32"
    sizes = (found["bits_per_weight"], found["weight_bytes"])
    data = {
        "peer": version.peer,
        "subject": asdict(Subject(version.label, version.method, dtype, version.key, *sizes)),
        "recipe": json.dumps(conversion["settings"]),
        "conversion": conversion["usage"],
        "texts": found["texts"],
        "failure": failure,
    }
    result: VersionResult = from_json(VersionResult, data)
    return result


def convert(run: Run, version: Version) -> dict[str, Any]:
    """Make the version unless it is kept: {"usage", "settings", "versions"}. Raises StepError."""
    name = f"{version.key}.conversion"
    kept: dict[str, Any] | None = run.kept(name)
    if kept is not None:
        return kept
    data: dict[str, Any] = {"usage": None, "settings": {}, "versions": {}}
    if version.method in ("gguf", "gptq"):
        command = _conversion(run, version)
        if (
            version.peer == "lowmem" or version.of
        ):  # resumes an interrupted conversion, and makes the same rows itself
            usage = run.process(command, name)
            report: dict[str, Any] = {}
        else:
            usage, report = run.reported(command, name)
        data |= {"usage": asdict(usage)} | {k: v for k, v in report.items() if k in data}
    run.keep(name, data)
    return data


def _conversion(run: Run, version: Version) -> list[str]:
    """The command that makes a version."""
    out = run.work / version.key
    width = ["--bits", str(version.bits), "--group-size", str(version.group_size)]
    if version.peer == "lowmem":
        return [sys.executable, "-m", "lowmem", "convert", run.source, str(out), *width]
    if version.of:
        return [
            sys.executable,
            "-m",
            "lowmem",
            "export",
            str(run.work / version.of),
            f"{out}.gguf",
            "--force",
        ]
    if version.peer == "llama.cpp":
        source = run.work / "source.gguf"
        if not source.is_file():
            run.process([*STEPS, "gguf", run.source, "--path", str(source)], "source.gguf")
        embedding = GGUF_TYPES[run.prepare().dtype]
        more = ["--importance", str(run.work / "importance.npz")] if version.importance else []
        return quantize_command(run.peers.llama, source, Path(f"{out}.gguf"), version.kind, embedding) + more
    shutil.rmtree(out, ignore_errors=True)
    if version.peer == "AutoRound":
        places = ["--tokens", str(run.work / "tokens.json"), "--out", str(out)]
        autoround = [run.peers.autoround, str(AUTOROUND), run.source, *places]
        return [*autoround, "--iters", str(run.iterations), *width]
    return [*STEPS, "gptqmodel", run.source, "--path", str(out), "--work", str(run.work), *width]


def quantize_command(python: str, source: Path, out: Path, kind: str, embedding: str | None) -> list[str]:
    """llama.cpp's quantization of a GGUF file. embedding: type of embedding and head."""
    command = [python, str(LLAMA), "quantize", str(source), "--out", str(out), "--type", kind]
    command += ["--threads", str(os.cpu_count() or 1)]
    return [*command, "--embedding", embedding] if embedding else command


def _quality(run: Run, version: Version) -> dict[str, Any]:
    """The version's figures, measured or kept. Raises StepError."""
    name = f"{version.key}.quality"
    kept: dict[str, Any] | None = run.kept(name)
    if kept is not None:
        return kept
    path, logits = run.path_of(version), []
    try:
        for text in run.prepare().texts if version.method == "gguf" else ():
            logits.append(path.with_name(f"{path.stem}-{text}.npy"))
            places = ["--rows", str(run.work / f"rows-{text}.npy"), "--out", str(logits[-1])]
            command = [run.peers.llama, str(LLAMA), "logits", str(path), *places]
            run.process([*command, "--threads", str(run.threads)], name)
        command = [*STEPS, "measure", run.source, "--work", str(run.work)]
        _, data = run.reported([*command, "--method", version.method, "--path", str(path)], name)
    finally:
        for file in logits:
            file.unlink(missing_ok=True)
    run.keep(name, data)
    return data
