"""The finished checkpoint: shards, config, tokenizer, template, licence, card and manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.convert.inputs import ConversionInputs
from lowmem.convert.job import ConversionJob
from lowmem.convert.result.card import CardFacts, render
from lowmem.convert.result.templates import store_templates

import lowmem
from lowmem.checkpoint.files.home import typed_path
from lowmem.checkpoint.files.whole import FileDigest, write_json, write_whole
from lowmem.checkpoint.files.writer import merge, write_tensors
from lowmem.checkpoint.manifest import (
    REPORT_FILE,
    quantization_config_dict,
    read_manifest,
    write_manifest,
)
from lowmem.checkpoint.source.open import Source
from lowmem.models.dialogue import CHAT_TEMPLATE, end_token_ids
from lowmem.plan.fit.allocation import bits_per_weight
from lowmem.streaming.weights import ModelWeights, stored_dtype

if TYPE_CHECKING:
    import torch

CONFIG_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class ResultSummary:
    """The result of a conversion."""

    out: str
    bytes: int
    """Of the whole folder."""
    bits_per_weight: float
    """Stored bits of the quantized linears, divided by the number of their weights."""
    mean_error: float
    """Mean over the linears of their relative output error."""
    resumed: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    total_seconds: float = 0.0
    peak_memory: int = 0
    """Of host memory, in bytes."""

    @classmethod
    def of_folder(cls, folder: Path) -> ResultSummary:
        """Read the summary of a finished checkpoint."""
        manifest = read_manifest(folder) or {}
        errors = json.loads((folder / REPORT_FILE).read_bytes())
        return cls(
            str(folder),
            sum(f.bytes for f in manifest.values()),
            errors["bits_per_weight"],
            errors["mean_error"],
        )

    def with_run(self, seconds: Mapping[str, float], total: float, peak: int) -> ResultSummary:
        """Return the summary with the seconds by activity and in all, and the peak of host memory in
        bytes.
        """
        return replace(self, seconds=dict(seconds), total_seconds=total, peak_memory=peak)


def stage_outside(job: ConversionJob, weights: ModelWeights, store_head: bool) -> bool:
    """Stage the embeddings, norms and head. Returns whether the head is tied to the embedding.

    A tied head is stored only with `store_head`, for readers that do not support tied heads.
    """
    arch = weights.arch
    tied = weights.head_is_duplicated()
    plans = [weights.plan(name) for name in arch.outside() if name != arch.head]
    if store_head and tied:
        plans.append(weights.plan(arch.embedding, as_name=arch.head))
    elif not tied:
        plans.append(weights.plan(arch.head))

    def read(name: str) -> torch.Tensor:
        return weights.read_narrowed(arch.embedding if tied and name == arch.head else name)

    write_tensors(job.outside, plans, read)
    weights.source.release()
    return tied


def assemble(job: ConversionJob, inputs: ConversionInputs) -> ResultSummary:
    """Write the checkpoint into the job's result folder; every file is digested as it is written."""
    folder, tokenizer = job.result, inputs.tokenizer
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    tied = stage_outside(job, inputs.weights, inputs.options.store_head)
    staged = [job.outside, *(job.staged(i) for i in range(len(inputs.arch.layers)))]
    digests = merge(staged, folder, inputs.options.shard_size)
    digests |= _side_files(inputs, folder)
    digests["config.json"] = write_json(folder / "config.json", _config(inputs, tied))
    digests["quantize_config.json"] = write_json(folder / "quantize_config.json", _quantization(inputs))
    digests["generation_config.json"] = write_json(
        folder / "generation_config.json", _generation_config(inputs)
    )
    starchat = CHAT_TEMPLATE if inputs.dialogue is not None else None
    store_templates(folder, tokenizer.chat_template or starchat, digests)
    facts = _facts(job, inputs, digests)
    digests[REPORT_FILE] = write_json(folder / REPORT_FILE, facts.as_json())
    digests["README.md"] = write_whole(folder / "README.md", [render(facts).encode()])
    write_manifest(folder, digests)
    size = sum(digest.bytes for digest in digests.values())
    return ResultSummary(str(job.out), size, facts.bits_per_weight, facts.mean_error, job.resumed)


def _facts(job: ConversionJob, inputs: ConversionInputs, digests: Mapping[str, FileDigest]) -> CardFacts:
    arch, source = inputs.arch, inputs.source
    sizes = {
        f"{layer.name}.{linear.name}": (linear.in_features, linear.out_features)
        for layer in arch.layers
        for linear in inputs.recipe.quantized(layer)
    }
    formats = {name: format for name in sizes if (format := inputs.recipe.format_of(name))}
    reports = [
        replace(report, name=f"{layer.name}.{report.name}")
        for layer, found in zip(arch.layers, job.state.reports, strict=True)
        for report in found
    ]
    names = [path.name for path in source.side_files()]
    return CardFacts(
        base_model=source_name(source),
        license_name=source.license_name(),
        license_files=tuple(name for name in names if name.upper().startswith(("LICEN", "COPYING"))),
        recipe=dict(job.state.recipe),
        quantization=inputs.recipe,
        calibration=inputs.rows.description,
        calibration_shape=(int(inputs.rows.tokens.shape[0]), int(inputs.rows.tokens.shape[1])),
        weights_bytes=sum(d.bytes for name, d in digests.items() if name.endswith(".safetensors")),
        bits_per_weight=bits_per_weight(sizes, formats),
        reports=tuple(reports),
        made_for=inputs.options.budget.label() if inputs.options.budget else "",
        allocation=inputs.allocation,
    )


def source_name(source: Source) -> str:
    """Return the base model's name: a hub id as typed, or the last part of a path (never a private
    folder).
    """
    typed = Path(source.display)
    return typed.resolve().name if typed_path(typed).exists() else source.display


def _side_files(inputs: ConversionInputs, folder: Path) -> dict[str, FileDigest]:
    """Copy the tokenizer and licence files; write tokenizer files for a source that has none (GGUF)."""
    digests = {}
    files = inputs.source.side_files()
    if "tokenizer.json" not in [path.name for path in files]:
        inputs.tokenizer.save_pretrained(folder)
        for path in folder.iterdir():
            if path.is_file() and not path.name.endswith((".safetensors", ".index.json")):
                digests[path.name] = write_whole(path, [path.read_bytes()])
    for path in files:
        if path.name not in CONFIG_FILES:
            digests[path.name] = write_whole(folder / path.name, [path.read_bytes()])
    return digests


def _quantization(inputs: ConversionInputs) -> dict[str, Any]:
    recipe = inputs.recipe
    return quantization_config_dict(
        recipe.config, version=lowmem.__version__, linears=recipe.exceptions(inputs.options.reader)
    )


def _config(inputs: ConversionInputs, tied: bool) -> dict[str, Any]:
    """config.json: the source's own, with the quantization, the tied head and the 16-bit dtype."""
    data = dict(inputs.source.config_json)
    for key in ("torch_dtype", "_name_or_path", "auto_map"):
        data.pop(key, None)
    data["dtype"] = str(stored_dtype(inputs.weights.dtype)).removeprefix("torch.")
    if tied or "tie_word_embeddings" in data:
        data["tie_word_embeddings"] = tied
    data["quantization_config"] = _quantization(inputs)
    return data


def _generation_config(inputs: ConversionInputs) -> dict[str, Any]:
    """generation_config.json: the source's own, with stop tokens that include the end of a turn."""
    source, tokenizer = inputs.source, inputs.tokenizer
    data = source.generation_config()
    config = source.config()
    stops = end_token_ids(tokenizer, inputs.dialogue, config, data)
    data.pop("transformers_version", None)
    data.setdefault("bos_token_id", getattr(config, "bos_token_id", None))
    data["eos_token_id"] = stops if len(stops) > 1 else next(iter(stops), None)
    if data.get("pad_token_id") is None and tokenizer.eos_token_id is not None:
        data["pad_token_id"] = tokenizer.eos_token_id
    return {key: value for key, value in data.items() if value is not None}
