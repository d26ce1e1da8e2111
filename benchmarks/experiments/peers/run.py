"""Conversions and quality of `lowmem.benchmarks.experiments.peers.command`: steps in processes of their own, kept when finished.

A run's folder:

    settings.json             what the run is of; another source or recipe wants another folder
    prepared.json tokens.json rows-*.npy reference-*.npy importance.npz source.gguf      for all forms
    KEY.conversion.json       of a form: its usage and recipe; what was converted is in KEY/ or KEY.gguf
    KEY.quality.json          of a form: its figures
    *.log                     what the processes said
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem.benchmarks.common.processes import Usage, run_process
from lowmem.benchmarks.common.record_file import from_json
from lowmem.benchmarks.common.records import Subject
from lowmem.benchmarks.experiments.peers.forms import Form, FormResult
from lowmem.benchmarks.experiments.peers.worker import last_lines

from lowmem.errors import InvalidRequestError, OutputError

STEPS = "lowmem.benchmarks.experiments.peers.steps"
GGUF_TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Peers:
    """The peers that are here, and the interpreters of those that have their own. left_out: a line each."""

    names: frozenset[str]
    llama: str
    autoround: str
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Prepared:
    """What all forms share (see peers_steps.prepare). dtype: in which the source stores its linears."""

    calibration: str
    fingerprint: str
    dtype: str
    texts: tuple[str, ...]


class StepError(Exception):
    """A step's process failed; the message is the end of what it said."""


def find_peers(llama: str | None, autoround: str | None) -> Peers:
    """Which peers are here. Raises InvalidRequestError for a named interpreter without its peer."""
    wanted = (
        ("GPTQModel", "gptqmodel", None, "gptqmodel==7.7", ""),
        ("bitsandbytes", "bitsandbytes", None, "bitsandbytes", ""),
        ("llama.cpp", "llama_cpp", llama, "llama-cpp-python", "--llama-python"),
        ("AutoRound", "auto_round", autoround, "auto-round", "--autoround-python"),
    )
    names, left_out = [], []
    for name, module, python, package, option in wanted:
        if python is not None:
            check = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
            try:
                missing = subprocess.run([python, "-c", check], capture_output=True, check=False).returncode
            except OSError as error:
                raise InvalidRequestError(
                    f"{python} cannot be run: {error.strerror}", f"Give {option} an interpreter"
                ) from error
            if missing:
                raise InvalidRequestError(
                    f"{python} has no {package}", f"Install it there: {python} -m pip install {package}"
                )
        elif importlib.util.find_spec(module) is None:
            where = f", in an environment of its own if you like ({option} PYTHON)" if option else ""
            left_out.append(f"{name} is left out: pip install {package}{where}")
            continue
        names.append(name)
    return Peers(frozenset(names), llama or sys.executable, autoround or sys.executable, tuple(left_out))


@dataclass(frozen=True)
class Run:
    """One comparison of the forms of `source`, in the folder `work`. only: beginnings of the keys or the
    labels of forms that are wanted, None for all. packed: folders of random integers instead of conversions,
    by bits (see peers_speed.shaped_run)."""

    source: str
    work: Path
    peers: Peers
    iterations: int
    only: tuple[str, ...] | None
    threads: int
    packed: tuple[tuple[int, Path], ...] = ()

    def begin(self, again: Sequence[str]) -> None:
        """Make the folder, or see that it is of this run; drop steps whose names begin with one of `again`.

        Raises OutputError for the folder of another run.
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
            for file in [*self.work.glob(f"{name}*"), *self.work.glob(f"shaped-*/{name}*")]:
                if file.is_dir():
                    shutil.rmtree(file)
                else:
                    file.unlink()

    def kept(self, name: str) -> Any:
        """What a finished step left, or None."""
        try:
            return json.loads((self.work / f"{name}.json").read_bytes())
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def keep(self, name: str, data: object) -> None:
        """Write what a step left: it is finished."""
        part = self.work / f"{name}.part"
        part.write_text(json.dumps(data))
        part.replace(self.work / f"{name}.json")

    def wants(self, form: Form) -> bool:
        """Whether --only names this form."""
        names = (form.key, form.label, form.label.lower())
        return self.only is None or any(name.startswith(begin) for name in names for begin in self.only)

    def prepare(self) -> Prepared:
        """Rows, texts and the reference's logits. Raises LowmemError where the source cannot be read."""
        llama = "llama.cpp" in self.peers.names
        if self.kept("prepared") is None or (llama and self._lacks_importance()):
            say("rows, texts and the reference's logits …")
            command = [sys.executable, "-m", STEPS, "prepare", self.source, "--work", str(self.work)]
            try:
                self.process([*command, *(["--importance"] if llama else [])], "prepare")
            except StepError as error:
                raise OutputError(f"the source cannot be prepared: {error}", f"See {self.work}") from error
        data = self.kept("prepared")
        return Prepared(data["calibration"], data["fingerprint"], data["dtype"], tuple(data["texts"]))

    def _lacks_importance(self) -> bool:
        """Whether an earlier run without llama.cpp left that out; made-up weights have none."""
        return not self.packed and not (self.work / "importance.npz").is_file()

    def process(self, command: Sequence[str], log: str) -> Usage:
        """Run a step's process. Raises StepError where it fails."""
        file = self.work / f"{log}.log"
        try:
            return run_process(command, file)
        except SystemExit as error:
            raise StepError(last_lines(file)) from error

    def versions(self) -> tuple[tuple[str, str], ...]:
        """(package, version), as the conversions' reports name them."""
        found: dict[str, str] = {}
        for file in sorted(self.work.glob("*.conversion.json")):
            found |= json.loads(file.read_bytes())["versions"]
        return tuple(found.items())


# --- quality ------------------------------------------------------------------------------------------------


def measure_forms(run: Run, forms: Sequence[Form]) -> tuple[FormResult, ...]:
    """Convert and measure every wanted form; one that fails is recorded with its reason."""
    wanted = [form for form in forms if run.wants(form)]
    found = []
    for number, form in enumerate(wanted, 1):
        say(f"[{number}/{len(wanted)}] {form.label} …")
        result = _measure(run, form)
        for text in result.texts:
            say(f"    {text.text}: KL divergence {text.kld.mean:.6f}, same top-1 {text.same_top1:.2%}")
        if result.failure:
            say(f"    failed: {result.failure}")
        found.append(result)
    return tuple(found)


def _measure(run: Run, form: Form) -> FormResult:
    conversion: dict[str, Any] = {"usage": None, "settings": {}}
    failure = ""
    found: dict[str, Any] = {"texts": [], "bits_per_weight": 0.0, "weight_bytes": 0}
    try:
        conversion = convert(run, form)
        found = _quality(run, form)
    except StepError as error:
        failure = str(error)
    dtype = run.prepare().dtype if form.peer == "none" else "float32"
    subject = Subject(
        form.label, method_of(form), dtype, form.key, found["bits_per_weight"], found["weight_bytes"]
    )
    data = {
        "peer": form.peer,
        "subject": asdict(subject),
        "recipe": json.dumps(conversion["settings"]),
        "conversion": conversion["usage"],
        "texts": found["texts"],
        "failure": failure,
    }
    result: FormResult = from_json(FormResult, data)
    return result


def method_of(form: Form) -> str:
    """How a form is read: dense, gptq, int8, nf4 or gguf."""
    if form.peer == "none":
        return "dense"
    if form.peer == "llama.cpp":
        return "gguf"
    return {"int8": "int8", "NF4": "nf4"}.get(form.kind, "gptq")


def path_of(run: Run, form: Form) -> Path:
    """Where the form lies: its folder or file."""
    method = method_of(form)
    if method == "gguf":
        return run.work / f"{form.key}.gguf"
    if method != "gptq":
        return Path(run.source).resolve()
    packed = dict(run.packed).get(form.bits)
    if packed is not None:
        return packed
    folder = run.work / form.key
    if form.peer == "AutoRound" and folder.is_dir():  # it makes a folder in the folder
        return next((path.parent for path in sorted(folder.rglob("config.json"))), folder)
    return folder


def convert(run: Run, form: Form) -> dict[str, Any]:
    """Make the form, if it is not there: {"usage", "settings", "versions"}. Raises StepError."""
    name = f"{form.key}.conversion"
    kept: dict[str, Any] | None = run.kept(name)
    if kept is not None:
        return kept
    data: dict[str, Any] = {"usage": None, "settings": {}, "versions": {}}
    method = method_of(form)
    if method == "gguf" or (method == "gptq" and form.bits not in dict(run.packed)):
        command, report = _conversion(run, form)
        usage = run.process(command, name)
        data["usage"] = asdict(usage)
        if report.is_file():
            data |= json.loads(report.read_bytes())
            report.unlink()
    run.keep(name, {field: data[field] for field in ("usage", "settings", "versions")})
    return data


def _conversion(run: Run, form: Form) -> tuple[list[str], Path]:
    """The command that makes a form, and the file in which it says how."""
    out, report = run.work / form.key, run.work / f"{form.key}.report"
    width = ["--bits", str(form.bits), "--group-size", str(form.group_size)]
    tokens = str(run.work / "tokens.json")
    if form.peer == "lowmem":  # takes up a conversion that was interrupted, and makes the same rows itself
        return [sys.executable, "-m", "lowmem", "convert", run.source, str(out), *width], report
    if form.peer == "llama.cpp":
        command = [
            run.peers.llama,
            "-m",
            "lowmem.benchmarks.experiments.peers.llama",
            "quantize",
            str(_gguf(run)),
        ]
        command += ["--out", f"{out}.gguf", "--type", form.kind, "--threads", str(os.cpu_count() or 1)]
        command += ["--embedding", GGUF_TYPES[run.prepare().dtype]]
        if form.importance:
            command += ["--importance", str(run.work / "importance.npz")]
        return [*command, "--report", str(report)], report
    shutil.rmtree(out, ignore_errors=True)
    if form.peer == "AutoRound":
        command = [
            run.peers.autoround,
            "-m",
            "lowmem.benchmarks.experiments.peers.autoround",
            run.source,
            "--tokens",
            tokens,
        ]
        command += ["--out", str(out), "--iters", str(run.iterations)]
    else:
        command = [sys.executable, "-m", STEPS, "gptqmodel", run.source, "--path", str(out)]
        command += ["--work", str(run.work)]
    return [*command, *width, "--report", str(report)], report


def _gguf(run: Run) -> Path:
    """The source as GGUF. Raises StepError."""
    file = run.work / "source.gguf"
    if not file.is_file():
        run.process([sys.executable, "-m", STEPS, "gguf", run.source, "--path", str(file)], "source.gguf")
    return file


def _quality(run: Run, form: Form) -> dict[str, Any]:
    """The form's figures, measured or kept. Raises StepError."""
    name = f"{form.key}.quality"
    kept: dict[str, Any] | None = run.kept(name)
    if kept is not None:
        return kept
    path, logits = path_of(run, form), []
    try:
        if method_of(form) == "gguf":
            for text in run.prepare().texts:
                logits.append(path.with_name(f"{path.stem}-{text}.npy"))
                rows = str(run.work / f"rows-{text}.npy")
                command = [
                    run.peers.llama,
                    "-m",
                    "lowmem.benchmarks.experiments.peers.llama",
                    "logits",
                    str(path),
                    "--rows",
                    rows,
                ]
                run.process([*command, "--out", str(logits[-1]), "--threads", str(run.threads)], name)
        report = run.work / f"{name}.report"
        command = [sys.executable, "-m", STEPS, "measure", run.source, "--work", str(run.work)]
        command += ["--method", method_of(form), "--path", str(path), "--report", str(report)]
        run.process(command, name)
        data: dict[str, Any] = json.loads(report.read_bytes())
        report.unlink()
    finally:
        for file in logits:
            file.unlink(missing_ok=True)
    run.keep(name, data)
    return data


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)
