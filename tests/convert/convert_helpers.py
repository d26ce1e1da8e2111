"""Quick conversions of tiny models, and of single layers in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lowmem.convert.calibration import CalibrationSpec
from lowmem.convert.math.gptq import Prepared
from lowmem.convert.pipeline import convert
from lowmem.convert.recipe import ConvertOptions, Recipe
from lowmem.convert.stages.context import CalibrationBatch, LayerContext, LayerFiles, run_stages
from lowmem.convert.stages.layer import quantizing_stages
from torch import nn

from lowmem.config import QuantConfig
from lowmem.models.architecture import LayerSpec, decoder_layers, inspect
from lowmem.streaming.hidden_states import HiddenStates
from lowmem.streaming.layer_calls import LayerCall, catch_calls, embed

HELDOUT = Path(__file__).parent.parent.parent / "lowmem" / "data" / "tiny-starchat" / "heldout.txt"


def calibration_file(folder: Path, characters: int = 60_000) -> Path:
    """A file of real text that is long enough for a few rows."""
    path = folder / "calibration.txt"
    if not path.exists():
        path.write_text(HELDOUT.read_text(encoding="utf-8")[:characters], encoding="utf-8")
    return path


def quick_convert(
    source: Path,
    out: Path,
    config: QuantConfig | Recipe | None = None,
    *,
    rows: int = 8,
    row_length: int = 64,
    options: ConvertOptions | None = None,
    calibration: str | None = None,
):
    """Convert with few calibration rows and at most 6 steps of tuning, in float32 on the CPU."""
    recipe = config if isinstance(config, Recipe) else Recipe(config or QuantConfig())
    quick = replace(recipe.config, tune_steps=min(recipe.config.tune_steps, 6))
    text = calibration or str(calibration_file(out.parent))
    return convert(
        source,
        out,
        Recipe(quick, recipe.linears),
        calibration=CalibrationSpec(text, rows, row_length, 0),
        options=options or ConvertOptions(device="cpu", compute_dtype="float32"),
    )


def digest_of(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


class LayerOfModel:
    """The first decoder layer of a model, and the hidden states at its input (2 rows at a time)."""

    def __init__(self, model: Any, rows: int = 4, row_length: int = 16) -> None:
        tokens = torch.randint(0, 60, (rows, row_length), generator=torch.Generator().manual_seed(1))
        arch = inspect(model.config)
        self.spec: LayerSpec = arch.layers[0]
        self.call: LayerCall = catch_calls(model, arch, tokens[:2])[0]
        self.hidden = torch.cat([embed(model, part) for part in tokens.split(2)])
        self.layer: nn.Module = decoder_layers(model, model.config)[1][0]

    def output(self, states: HiddenStates) -> torch.Tensor:
        """The layer's output over all rows."""
        return torch.cat([self.call.run(self.layer, chunk) for chunk in states.chunks(2)])

    def context(
        self, folder: Path, config: QuantConfig, states: torch.Tensor | None = None, **fields: Any
    ) -> LayerContext:
        """A context whose unquantized stream is `hidden`, and whose converted one is `states`."""
        return LayerContext(
            self.layer,
            self.spec,
            Recipe(config),
            stream(folder, "in", self.hidden if states is None else states),
            CalibrationBatch(self.call, 2),
            LayerFiles(folder, folder / "staged", folder / "next", folder / "next-unquantized"),
            unquantized=stream(folder, "clean", self.hidden) if config.follows_unquantized else None,
            **fields,
        )


def bytes_held(context: LayerContext) -> int:
    """Bytes of everything that a context keeps between two stages."""
    tensors = [p for p in context.layer.parameters() if not p.is_meta]
    tensors += [b for b in context.layer.buffers() if not b.is_meta]
    tensors += context.tensors.values()
    tensors += [hessian.sum for hessian in context.captured.hessians.values()]
    tensors += context.captured.lacking.values()
    tensors += context.starts.values()
    if isinstance(context.prepared, Prepared):
        tensors.append(context.prepared.factor.matrix)
    if context.shared_lack is not None:
        tensors.append(context.shared_lack)
    return sum(tensor.nbytes for tensor in tensors)


def stream(folder: Path, name: str, states: torch.Tensor) -> HiddenStates:
    """Hidden states in a file."""
    shape = (states.shape[0], states.shape[1], states.shape[2])
    return HiddenStates.create(folder / name, shape, states.dtype, iter([states]), keep=False)


def quantize_layer(context: LayerContext, stages: Sequence[Any] | None = None) -> LayerContext:
    """Run the stages that quantize a layer in memory."""
    replays = context.replay is not None
    run_stages(stages or quantizing_stages(context.spec, context.recipe, replays=replays), context)
    return context
