"""The commands of `crashes`: what is there before them, and what may be visible after a fault."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.benchmarks.demo import embedded_model
from lowmem.benchmarks.experiments.endurance.faults import Child, marks_of

from lowmem.cli import main as lowmem


class TrialError(AssertionError):
    """A fault did harm; the message has all that repeats it."""


@dataclass(frozen=True)
class Scenario:
    """One command. All three functions get the trial's folder."""

    name: str
    prepare: Callable[[Path, Material], None]
    """Makes what is there before, in an empty folder."""
    words: Callable[[Path, Material], list[str]]
    """The command."""
    check: Callable[[Path, Material], None]
    """Raises TrialError where something incomplete is visible."""


@dataclass(frozen=True)
class Material:
    """What all trials read: a source, two conversions of it, and calibration text."""

    folder: Path

    @property
    def source(self) -> Path:
        """A float32 model of two layers."""
        return self.folder / "model"

    @property
    def whole(self) -> Path:
        """The conversion to 4 bits."""
        return self.folder / "model-4bit"

    @property
    def other(self) -> Path:
        """The conversion to 8 bits."""
        return self.folder / "model-8bit"

    @property
    def text(self) -> Path:
        """For calibration and measurement."""
        return self.folder / "text.txt"

    def convert(self, out: Path | None, *more: str) -> list[str]:
        """The words of a quick conversion."""
        places = [str(self.source)] + ([str(out)] if out else [])
        calibration = ["--calibration", str(self.text), "--rows", "2", "--row-length", "16"]
        how = ["--group-size", "32", "--tune-steps", "1", "--device", "cpu", "--compute-dtype", "float32"]
        return ["convert", *places, *calibration, *how, "-q", *more]


def make_material(folder: Path, context: Any) -> Material:
    """A source, two conversions of it, and text. context: None converts in this process."""
    material, data = Material(folder), embedded_model()
    folder.mkdir(parents=True)
    material.text.write_text((data / "heldout.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    _write_source(material.source, data)
    for bits, out in (("4", material.whole), ("8", material.other)):
        words = material.convert(out, "--bits", bits)
        if context is None:
            code, said = lowmem(words), ""
        else:
            outcome = Child(context, folder, None).run(words)
            code, said = outcome.code, outcome.said
        if code != 0:
            raise TrialError(f"the material cannot be made: {said}")
    return material


def _write_source(folder: Path, data: Path) -> None:
    """Two layers of random numbers, with the embedded model's tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    config = GPTBigCodeConfig(
        n_layer=2, n_embd=64, n_head=4, n_inner=256, n_positions=256, vocab_size=4096, bos_token_id=0,
        eos_token_id=0, architectures=["GPTBigCodeForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    tensors = GPTBigCodeForCausalLM(config).state_dict()
    tensors.pop("lm_head.weight")  # tied
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(config.to_json_string(use_diff=False), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(data / name, folder / name)


def tree(root: Path) -> dict[str, str]:
    """The files below, by path: digests, without the times and the machine in records."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            found[name] = "a folder"
        else:
            found[name] = hashlib.sha256(_timeless(path)).hexdigest()
    return found


def _timeless(path: Path) -> bytes:
    """A file's bytes; of a record or a work file, its content without times."""
    if path.name == "quality-results.jsonl":
        return json.dumps(_results(path), sort_keys=True).encode()
    if path.name not in ("quality.json", "latency.json"):
        return path.read_bytes()
    record = json.loads(path.read_bytes())
    for key in ("origin", "reference_seconds", "reference_peak_bytes"):
        record.pop(key, None)
    for subject in record["subjects"]:
        subject.pop("seconds", None)
    return json.dumps(record).encode()


def _results(path: Path) -> dict[str, object]:
    """The results of a work file by place, the last of each; an interrupted run may leave half a line."""
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            data = json.loads(line)
            data["result"].pop("seconds", None)
            found[json.dumps([data["key"], data["place"]])] = data["result"]
    return found


def _nothing(root: Path, material: Material) -> None:
    """The command starts on an empty disk."""


def _check_convert(root: Path, material: Material) -> None:
    _whole_or_absent(root / "out", material.whole)


def _prepare_replace(root: Path, material: Material) -> None:
    shutil.copytree(material.other, root / "out")


def _check_replace(root: Path, material: Material) -> None:
    out, kept = root / "out", root / "out.partial" / "replaced"
    if not out.exists():
        _whole_or_absent(kept, material.other)
        if not kept.exists():
            raise TrialError("the older checkpoint is lost")
    elif tree(out) not in (tree(material.whole), tree(material.other)):
        raise TrialError("OUT is neither the older nor the new checkpoint")


def _check_cache(root: Path, material: Material) -> None:
    from lowmem.checkpoint import cache

    os.environ["LOWMEM_CACHE"] = str(root / "cache")
    for entry in cache.entries():
        if entry.complete:
            _whole_or_absent(entry.path, material.whole)


def _prepare_quality(root: Path, material: Material) -> None:
    shutil.copytree(material.whole, root / "model-4bit")


def _check_quality(root: Path, material: Material) -> None:
    from lowmem.benchmarks.common.record_file import read_record
    from lowmem.benchmarks.common.records import QualityRecord

    from lowmem.checkpoint.manifest import digest_file, read_manifest

    read_record(QualityRecord, root / "records")  # raises if it is incomplete
    for name, digest in (read_manifest(root / "model-4bit") or {}).items():
        if digest_file(root / "model-4bit" / name) != digest:
            raise TrialError(f"model-4bit/{name} is not what its manifest says")
    for about in (root / "cache" / "quality").glob("*/*.json"):
        states = digest_file(about.with_suffix(".states"))
        told = json.loads(about.read_bytes())
        if (states.sha256, states.bytes) != (told["sha256"], told["bytes"]):
            raise TrialError(f"{about.name} describes states that do not exist")


def _check_latency(root: Path, material: Material) -> None:
    from lowmem.benchmarks.common.record_file import read_record
    from lowmem.benchmarks.common.records import LatencyRecord
    from lowmem.benchmarks.latency.rounds import WORK_FILE

    read_record(LatencyRecord, root / "records")
    work, marks = root / "records" / WORK_FILE, marks_of(root).read_text().split()
    faults = marks.count("fault")
    if work.exists():
        kept = sum(line.endswith("}") for line in work.read_text().splitlines())
        if kept < len(marks) - 2 * faults:  # each may have hit before its result was in the file
            raise TrialError(f"{len(marks) - faults} results were measured, and {kept} are kept")


def _whole_or_absent(folder: Path, expected: Path) -> None:
    if folder.exists() and tree(folder) != tree(expected):
        raise TrialError(f"{folder.name} is visible, but incomplete")


def _measure(kind: str, root: Path, material: Material, *more: str) -> list[str]:
    models = [str(root / "model-4bit"), "--reference", str(material.source)]
    return ["bench", kind, *models, "--quiet", "--out", str(root / "records"), "--device", "cpu", *more]


SCENARIOS = (
    Scenario("convert", _nothing, lambda root, m: m.convert(root / "out"), _check_convert),
    Scenario("replace", _prepare_replace, lambda root, m: m.convert(root / "out", "--force"), _check_replace),
    Scenario("cache", _nothing, lambda root, m: m.convert(None), _check_cache),
    Scenario(
        "quality",
        _prepare_quality,
        lambda root, m: _measure(
            "quality", root, m, "--text", str(m.text), "--rows", "2", "--row-length", "16", "--no-greedy"
        ),
        _check_quality,
    ),
    Scenario(
        "latency",
        _prepare_quality,
        lambda root, m: _measure(
            "latency", root, m, "--prompts", "4", "--contexts", "6", "--new-tokens", "3", "--rounds", "4"
        ),
        _check_latency,
    ),
)
