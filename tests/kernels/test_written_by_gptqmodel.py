"""What GPTQModel and optimum write is read: their quantizers and writers run here, on a tiny model.

They run in a process of their own (this file, as a script), which also reads its checkpoints back. lowmem's
weights must equal those that GPTQModel's own reader sees, to the last bit.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.checkpoint.verify.converted import verify
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.loading.loader import LoadedModel, LoadOptions, load
from lowmem.plan.shape import read_shape
from tests.helpers import REPO, save_source, tiny_model

MISSING = [name for name in ("gptqmodel", "optimum") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

IDS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
BY_GPTQMODEL: dict[str, dict[str, Any]] = {
    "act-order and other widths": {
        "bits": 4,
        "group_size": 32,
        "desc_act": True,
        "sym": False,
        "dynamic": {"-:.*down.*": {}, r"+:.*\.1\..*up.*": {"bits": 8, "group_size": 64}},
    },
    "v2": {"bits": 3, "group_size": 64, "sym": False, "format": "gptq_v2"},
    "one group": {"bits": 2, "group_size": -1, "desc_act": True},
    "head": {"bits": 8, "group_size": 32, "lm_head": True},
}
BY_OPTIMUM = "optimum, act-order"
KINDS = (*BY_GPTQMODEL, BY_OPTIMUM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in a folder for each of KINDS, and beside it what its maker's reader sees."""
    found = tmp_path_factory.mktemp("written")
    save_source(tiny_model("llama", vocab=4096, tied=False), found / "source")
    environment = {
        **os.environ,
        "GPTQMODEL_CPU_WORKERS": "2",  # with one worker a core, loading dies on two cores
        "TORCH_COMPILE_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPO),
    }
    command = [sys.executable, "-m", "tests.kernels.test_written_by_gptqmodel", str(found)]
    done = subprocess.run(
        command, cwd=found, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return found


def packed(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """The weights [out, in] of the packed linears, in float16."""
    modules = loaded.model.named_modules()
    return {name: m.dequantize(torch.float16) for name, m in modules if isinstance(m, QuantLinear)}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_logits_are_the_makers(folder: Path, kind: str) -> None:
    theirs = torch.load(folder / f"{kind}.pt", weights_only=True)
    notes: list[str] = []
    loaded = load(folder / kind, LoadOptions(dtype=torch.float32), notify=notes.append)
    ours = packed(loaded)
    assert set(ours) == set(theirs["weights"]) and len(ours) >= 12 and notes == []
    for name, weight in ours.items():
        assert torch.equal(weight, theirs["weights"][name]), name
    with torch.inference_mode():
        logits = loaded.model(IDS).logits
    assert float((logits - theirs["logits"]).norm() / logits.norm()) < 0.01
    assert verify(folder / kind).ok
    assert sum(tensor.packed for tensor in read_shape(folder / kind).tensors) == 4 * len(ours)


def test_widths_of_a_mixture(folder: Path) -> None:
    loaded = load(folder / "act-order and other widths")
    layer = loaded.model.model.layers[1].mlp
    assert loaded.label == "4/8-bit mixed"
    assert (layer.up_proj.bits, layer.gate_proj.bits) == (8, 4)
    assert not isinstance(layer.down_proj, QuantLinear)


@pytest.mark.parametrize("kind", ["act-order and other widths", "one group"])
def test_the_same_under_auto_gptqs_names(folder: Path, tmp_path: Path, kind: str) -> None:
    old = Path(shutil.copytree(folder / kind, tmp_path / "old"))
    (old / "model.safetensors").rename(old / "gptq_model-4bit-32g.safetensors")
    config = json.loads((old / "config.json").read_text())
    del config["quantization_config"]
    (old / "config.json").write_text(json.dumps(config))
    ours = packed(load(old))
    theirs = torch.load(folder / f"{kind}.pt", weights_only=True)["weights"]
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert verify(old).ok


# What follows runs in the other process.


def _write_all(folder: Path) -> None:
    for kind, settings in BY_GPTQMODEL.items():
        _with_gptqmodel(folder / "source", folder / kind, settings)
    _with_optimum(folder / "source", folder / BY_OPTIMUM)
    for kind in KINDS:
        torch.save(_read(folder / kind), folder / f"{kind}.pt")


def _with_gptqmodel(source: Path, out: Path, settings: dict[str, Any]) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(source), QuantizeConfig(**settings), device="cpu")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 4096, (1, 64), generator=generator) for _ in range(8)]
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows], batch_size=1)
    model.save(str(out))


def _with_optimum(source: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = [f"def f{i}(x):\n    return x + {i}\n" * 20 for i in range(8)]
    config = GPTQConfig(bits=4, group_size=32, desc_act=True, dataset=texts, tokenizer=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _read(checkpoint: Path) -> dict[str, Any]:
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    model: Any = GPTQModel.load(
        str(checkpoint), device="cpu", backend=BACKEND("gptq_torch"), dtype=torch.float16
    ).model
    linears = {n: m for n, m in model.named_modules() if isinstance(m, BaseQuantLinear)}
    weights = {n: m.dequantize_weight().T.contiguous() for n, m in linears.items()}
    with torch.inference_mode():
        return {"weights": weights, "logits": model(IDS).logits.float()}


if __name__ == "__main__":
    _write_all(Path(sys.argv[1]))
