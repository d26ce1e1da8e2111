"""Sensitivities: against the KL divergence that GPTQ really causes, and their measurement's own promises."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lowmem.convert.allocation import measure as measuring
from lowmem.convert.allocation.curvature import rises
from lowmem.convert.allocation.measure import Measurement, check_memory, measure
from lowmem.convert.allocation.rounding_error import rounding_error
from lowmem.convert.calibration import CalibrationSpec, load_rows
from lowmem.convert.math import gptq
from lowmem.convert.math.hessian import Hessian
from lowmem.convert.pipeline import convert
from lowmem.convert.recipe import ConvertOptions
from torch import nn

from lowmem.checkpoint.formats import LinearFormat
from lowmem.checkpoint.manifest import read_quantization
from lowmem.checkpoint.readers import READERS
from lowmem.checkpoint.source.fitted import fitted
from lowmem.checkpoint.source.open import open_source
from lowmem.checkpoint.verify.converted import verify
from lowmem.config import QuantConfig
from lowmem.errors import MemoryBudgetError
from lowmem.models.architecture import build_model, inspect
from lowmem.models.dialogue import Dialogue
from lowmem.plan.fit.budget import SizeBudget
from lowmem.plan.fit.sensitivities import (
    OPTIONS,
    Sensitivities,
    kept_file,
    read_kept,
    weights_digest,
)
from lowmem.streaming.weights import ModelWeights
from tests.helpers import TINY_STARCHAT, save_source, tiny_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "cache"))


def work_on(path: Path, rows: int = 4, length: int = 64) -> Measurement:
    opened = open_source(str(path))
    source = fitted(opened, build_model(opened.config(), torch.float32, buffers=False))
    arch = inspect(source.config())
    weights, tokenizer = ModelWeights(source, arch), source.tokenizer()
    spec = CalibrationSpec(rows=rows, row_length=length)
    vocabulary = arch.shapes[arch.embedding][0]
    tokens = load_rows(spec, tokenizer, Dialogue.detect(tokenizer), vocabulary).tokens
    return Measurement(weights, source.config(), tokens, torch.float32, torch.device("cpu"))


def kl_of(model: nn.Module, tokens: torch.Tensor, expected: torch.Tensor) -> float:
    with torch.no_grad():
        found = torch.log_softmax(model(tokens).logits.double(), -1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def test_sensitivities_are_what_gptq_costs() -> None:
    """GPTQ of one linear alone at 2, 3 and 4 bits, for all linears of two layers of a trained model."""
    work = work_on(TINY_STARCHAT, rows=8, length=128)
    found = measure(work)
    model = build_model(work.config, torch.float32, buffers=True)
    work.weights.fill(model, "", list(work.arch.shapes), torch.float32, torch.device("cpu"))
    model.tie_weights()
    with torch.no_grad():
        expected = torch.log_softmax(model(work.tokens).logits.double(), -1)
    ratios, bare = [], []
    for layer in (work.arch.layers[0], work.arch.layers[5]):
        for linear in layer.linears:
            name = f"{layer.name}.{linear.name}"
            module = model.get_submodule(name)
            hessian = Hessian(linear.in_features)
            handle = module.register_forward_hook(
                lambda _m, args, _o, h=hessian: h.add(args[0].flatten(0, 1))
            )
            model(work.tokens)
            handle.remove()
            matrix, original = hessian.finish(), module.weight.detach().clone()
            for bits in (2, 3, 4):
                config = QuantConfig(bits=bits, group_size=128)
                result = gptq.quantize(original.T.contiguous(), gptq.prepare(matrix.clone(), config), config)
                z = result.codes.float() - result.zeros.float().repeat_interleave(128, 0)
                module.weight.data = (z * result.scales.float().repeat_interleave(128, 0)).T.contiguous()
                caused = kl_of(model, work.tokens, expected)
                predicted = found.predicted(name, OPTIONS.index(LinearFormat(bits, 128)))
                ratios.append(math.log(caused / predicted))
                bare.append(math.log(caused))
            module.weight.data = original
    spread = torch.tensor(ratios)
    assert spread.std() < 0.5 < 0.4 * torch.tensor(bare).std(), "it tells the linears apart"
    assert -0.7 < spread.mean() < 0.7, "and its size is right"


@pytest.mark.parametrize("kind", ["gpt_bigcode_mqa", "llama", "qwen2"])
def test_every_family_is_measured(kind: str, tmp_path: Path) -> None:
    """More bits and smaller groups cost less; a group size that does not divide the inputs costs infinity."""
    save_source(tiny_model(kind, hidden=96), tmp_path / "m")
    found = measure(work_on(tmp_path / "m"))
    names = work_on(tmp_path / "m").arch.linear_names()
    assert list(found.rises) == names == list(found.linears)
    for name, values in found.rises.items():
        by = dict(zip(((o.bits, o.group_size, o.sym) for o in OPTIONS), values, strict=True))
        inputs = found.linears[name][0]
        assert all(math.isfinite(rise) == (inputs % group == 0) for (_, group, _), rise in by.items())
        errors = [by[bits, 32, True] for bits in (2, 3, 4, 5, 6, 8)]
        assert errors == sorted(errors, reverse=True) and errors[0] > 100 * errors[-1]


class Stop(Exception):
    pass


@pytest.mark.parametrize("step", [("forward", 1), ("head", 0), ("backward", 0), ("backward", 1)])
def test_an_interrupted_measurement_resumes(step: tuple[str, int], tmp_path: Path) -> None:
    """With the same result, and without doing the finished layers again."""
    save_source(tiny_model("llama", layers=2), tmp_path / "m")
    whole = measure(work_on(tmp_path / "m"))
    kept_file(whole.source, whole.tokens).unlink()

    def stop(name: str, done: int, of: int) -> None:
        if (name, done) == step:
            raise Stop

    with pytest.raises(Stop):
        measure(work_on(tmp_path / "m"), stop)
    seen = []
    again = measure(work_on(tmp_path / "m"), lambda name, done, of: seen.append((name, done)))
    assert again.rises == whole.rises
    order = [("forward", 0), ("forward", 1), ("head", 0), ("backward", 0), ("backward", 1)]
    assert seen == order[order.index(step) :]
    left = [path.name for path in kept_file("", "").parent.iterdir()]
    assert left == [kept_file(whole.source, whole.tokens).name], "nothing but the result is left"


def test_a_measurement_serves_later_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured once; the second size only converts, and each has the size that was asked for."""
    save_source(tiny_model("llama", hidden=128), tmp_path / "m")
    counted = []

    def counting(*arguments: Any) -> dict[str, list[float]]:
        counted.append(1)
        return rises(*arguments)

    monkeypatch.setattr(measuring, "rises", counting)
    spec = CalibrationSpec(rows=4, row_length=64)
    for bits in (3.0, 4.5):
        options = ConvertOptions(budget=SizeBudget(bits_per_weight=bits), device="cpu")
        summary = convert(tmp_path / "m", tmp_path / f"out{bits}", calibration=spec, options=options)
        assert 0.97 * bits <= summary.bits_per_weight <= bits
        assert verify(tmp_path / f"out{bits}").ok
        assert not read_quantization(tmp_path / f"out{bits}").uniform
    assert len(counted) == 2, "one call for each layer"


def test_an_allocation_suits_the_program_that_loads_it(tmp_path: Path) -> None:
    """Of vLLM's two widths, and linears that it joins alike: `check` refuses anything else."""
    save_source(tiny_model("llama", hidden=128), tmp_path / "m")
    options = ConvertOptions(budget=SizeBudget(bits_per_weight=5.5), device="cpu", reader="vllm")
    summary = convert(
        tmp_path / "m", tmp_path / "out", calibration=CalibrationSpec(rows=4, row_length=64), options=options
    )
    assert 4.5 < summary.bits_per_weight <= 5.5
    format = read_quantization(tmp_path / "out")
    names = inspect(open_source(str(tmp_path / "m")).config()).linear_names()
    formats = {name: format.of(name) for name in names}
    assert {one.bits for one in formats.values() if one} == {4, 8}
    READERS["vllm"].check(formats)


def test_kept_sensitivities_belong_to_the_weights(tmp_path: Path) -> None:
    source = save_source(tiny_model("llama"), tmp_path / "m")
    found = measure(work_on(source))
    digest = weights_digest(source)
    assert digest == found.source
    assert read_kept(digest) == read_kept(digest, found.tokens) == found
    assert read_kept(digest, "0" * 64) is None
    other = save_source(tiny_model("llama", seed=1), tmp_path / "other")
    assert weights_digest(other) != digest and read_kept(weights_digest(other)) is None
    file = kept_file(found.source, found.tokens)
    for damage in ("{", "[]", "{}", file.read_text().replace('"version": 1', '"version": 0')):
        file.write_text(damage)
        assert read_kept(digest) is None
    data = found.as_json()
    for field, value in (("rises", {"a": [1]}), ("linears", {}), ("options", []), ("seconds", "x")):
        assert Sensitivities.from_json(data | {field: value}) is None


def test_too_little_memory_is_said_before_anything_is_read(tmp_path: Path) -> None:
    save_source(tiny_model("llama"), tmp_path / "m")
    work = work_on(tmp_path / "m")
    with pytest.raises(MemoryBudgetError, match=r"needs .* and may use 64 MiB") as caught:
        check_memory(work, 64 << 20)
    check_memory(work, int(caught.value.hint.split("--memory ")[1].removesuffix("MiB")) << 20)


def test_weights_on_the_grid_cost_nothing() -> None:
    """Integers -8..7 times a scale for each group, and a group of zeros."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(-8, 8, (6, 128), generator=generator).float()
    z[:, ::32] = -8  # every group uses the whole range
    weight = (z.view(6, 4, 32) * torch.tensor([0.5, 2.0, 1.0, 0.25])[None, :, None]).view(6, 128)
    weight[2, :32] = 0
    importance = torch.rand(6, 128, generator=generator)
    on_it = rounding_error(weight, importance, LinearFormat(4, 32))
    assert (on_it <= 1e-5 * (importance * weight.square()).sum(1)).all()
    assert (rounding_error(weight, importance, LinearFormat(3, 32)) > on_it).all()


def test_the_error_is_that_of_rounding() -> None:
    """Not above that of any scale on a fine mesh by more than the search's own coarseness, and not below."""
    generator = torch.Generator().manual_seed(1)
    weight, importance = torch.randn(3, 32, generator=generator), torch.rand(3, 32, generator=generator)
    for bits, sym in ((2, True), (3, True), (4, True), (4, False)):
        half = 1 << (bits - 1)
        best = torch.full((3,), math.inf, dtype=torch.float64)
        for scale in torch.linspace(0.02, 2.5, 1500):
            for zero in [half] if sym else range(1, 1 << bits):
                for sign in (1, -1) if sym else (1,):
                    q = (weight / (sign * scale)).round().clamp(-zero, (1 << bits) - 1 - zero) * sign * scale
                    best = torch.minimum(best, (importance * (weight - q).square()).sum(1).double())
        found = rounding_error(weight, importance, LinearFormat(bits, 32, sym))
        assert (found >= 0.98 * best).all() and (found <= 1.35 * best).all(), (bits, sym, found / best)


def test_a_row_of_tokens_is_one_sample(tmp_path: Path) -> None:
    """The same rows twice give the same sensitivities but for the tokens that are drawn."""
    save_source(tiny_model("gpt_bigcode_mqa"), tmp_path / "m")
    work = work_on(tmp_path / "m", rows=6)
    once = measure(work)
    twice = measure(replace(work, tokens=torch.cat([work.tokens, work.tokens])))
    small = OPTIONS.index(LinearFormat(2, 32))
    ratio = [math.log(twice.rises[n][small] / once.rises[n][small]) for n in once.rises]
    assert max(map(abs, ratio)) < 0.7
