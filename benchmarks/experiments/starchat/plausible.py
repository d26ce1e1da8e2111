"""Made-up weights with a trained model's loud channels and heavy-tailed columns."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch
from lowmem.benchmarks.demo import embedded_model
from lowmem.benchmarks.experiments.starchat.dimensions import Dimensions

N_EMBD = 6144
"""The width at which a linear's weights have a standard deviation of 0.02."""


def make_weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """One float16 tensor: [out, in] of a linear, [rows, hidden] of an embedding, or a vector."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    width = shape[-1]
    few = torch.randperm(width, generator=generator)
    if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
        noise.mul_(0.3).exp_()
        noise[few[: max(1, width // 100)]] *= 6  # outlier channels
    elif name.endswith(("wte.weight", "wpe.weight")):
        # Correlated channels: a few hundred directions of falling strength, plus independent noise.
        directions = width // 8
        strength = torch.arange(1, directions + 1).rsqrt()
        rows = torch.randn(shape[0], directions, generator=generator) * strength
        noise.mul_(0.3).addmm_(rows, torch.randn(directions, width, generator=generator))
        noise[:, few[: max(1, width // 200)]] *= 8
        noise *= 0.2  # as loud as what a layer adds, so that the residual stream counts
    else:
        # Larger in a narrower model, so that activations stay as large.
        noise *= 0.02 * math.sqrt(N_EMBD / min(width, N_EMBD))
        if len(shape) == 2:  # a few per cent of the input columns from Student's t, 3 degrees of freedom
            tail = few[: width // 32]
            chi = torch.randn(3, shape[0], len(tail), generator=generator).square_().sum(0).div_(3)
            noise[:, tail] /= chi.sqrt_()
    return noise.clamp_(-1000, 1000).to(torch.float16)


def write_plausible(folder: Path, dimensions: Dimensions) -> Path:
    """A float16 safetensors checkpoint in one file, one tensor in memory at a time; returns `folder`.

    The tokenizer is tiny-starchat's: `dimensions.vocab` must be its vocabulary or larger.
    """
    from lowmem.checkpoint.files.writer import TensorPlan, write_json, write_tensors

    folder.mkdir(parents=True)
    write_json(folder / "config.json", dimensions.config())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(embedded_model() / name, folder)
    shapes = {name: shape for name, (shape, _) in dimensions.tensors().items() if name != "lm_head.weight"}
    seeds = {name: seed for seed, name in enumerate(shapes)}
    plans = [TensorPlan(name, torch.float16, shape) for name, shape in shapes.items()]
    write_tensors(
        folder / "model.safetensors", plans, lambda name: make_weight(name, shapes[name], seeds[name])
    )
    return folder
