"""Open a model for a request, and fall back when memory runs out in spite of the plan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.config import SamplingParams
from lowmem.errors import MemoryBudgetError, SourceError
from lowmem.loading import opening
from lowmem.loading.loader import LoadOptions, load
from lowmem.loading.opening import open_model
from lowmem.plan import request as request_module
from lowmem.plan.device import is_out_of_memory
from lowmem.plan.request import ModelRequest, plan_for
from lowmem.session import Session
from tests.commands.command_lines import ENVIRONMENT
from tests.helpers import TINY_STARCHAT, save_source, tiny_model
from tests.rtn_helpers import write_rtn_checkpoint


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with an 8- and a 4-bit form beside it."""
    base = tmp_path_factory.mktemp("forms")
    for bits in (8, 4):
        write_rtn_checkpoint(tiny_model("llama", hidden=128), base / f"model-{bits}bit", bits=bits)
    return save_source(tiny_model("llama", hidden=128), base / "model", dtype=torch.bfloat16)


FORMS = ["bfloat16", "8-bit g32", "int8 bnb", "4-bit g32", "NF4 bnb"]


@pytest.mark.parametrize(
    ("bits", "method"), [(16, "dense"), (8, "gptq"), (8, "int8"), (4, "gptq"), (4, "nf4")]
)
def test_every_form_runs(forms: Path, bits: int, method: str) -> None:
    lines: list[str] = []
    loaded = open_model(ModelRequest(str(forms), bits=bits, method=method, context=64), lines.append)
    assert loaded.option is not None and loaded.plan is not None
    assert loaded.label == loaded.option.candidate.label == FORMS[FORMS.index(loaded.label)]
    assert (loaded.context, str(loaded.dtype)) == (64, "torch.bfloat16")
    assert loaded.weight_bytes == pytest.approx(loaded.option.need.weights, rel=0.01)
    answer = Session(loaded).complete("def f", SamplingParams(max_new_tokens=4), raw=True)
    assert answer.new_tokens > 0
    assert len(lines) == 1 and loaded.label in lines[0]


def test_the_next_form_when_memory_is_gone(forms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program took the memory between plan and load: each failure is reported in the order of the
    plan."""
    real, tried = opening.load, []

    def load(path: Path, options: LoadOptions, **hooks: Any) -> Any:
        tried.append((path.name, options.on_the_fly))
        if len(tried) < 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return real(path, options, **hooks)

    monkeypatch.setattr(opening, "load", load)
    lines: list[str] = []
    loaded = open_model(ModelRequest(str(forms)), lines.append)
    assert loaded.label == "int8 bnb"
    assert tried == [("model", None), ("model-8bit", None), ("model", "int8")]
    assert [line.split(" does not fit")[0] for line in lines[1:]] == ["bfloat16", "8-bit g32"]


def test_no_version_can_be_loaded(forms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nmore")

    monkeypatch.setattr(opening, "load", load)
    with pytest.raises(MemoryBudgetError, match=r"could be loaded: CUDA out of memory.*--context") as caught:
        open_model(ModelRequest(str(forms)))
    assert "\n" not in str(caught.value)


def test_other_errors_are_raised(forms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(opening, "load", load)
    with pytest.raises(RuntimeError, match="a bug"):
        open_model(ModelRequest(str(forms)))
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(ValueError("out of memory"))


def test_a_hub_id_without_network_says_so() -> None:
    with pytest.raises(
        SourceError, match=r"no version of HuggingFaceH4/starchat-alpha.*hub cannot be reached"
    ):
        open_model(ModelRequest("HuggingFaceH4/starchat-alpha"))


REAL_LIMIT = """
import resource, sys
import torch
torch.set_num_threads(1)
import lowmem.loading.opening as opening
from lowmem.plan.request import ModelRequest
import bitsandbytes, transformers.models.gpt_bigcode.modeling_gpt_bigcode  # before the limit
opening.load(sys.argv[2])
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (470 << 20), resource.RLIM_INFINITY))
loaded = opening.open_model(ModelRequest(sys.argv[1]), lambda line: print("NOTE", line))
print("LOADED", loaded.label)
"""


@pytest.mark.slow
def test_a_real_failing_allocation(tmp_path: Path) -> None:
    """The process may take 470 MiB more: not the 500 MiB that 16 bits need here, which the plan cannot know.

    float16 becomes bfloat16, so it is not mapped; the int8 form has half of it, and room for a slice.
    """
    model = tiny_model("gpt_bigcode_mqa", layers=6, hidden=2048, heads=16, vocab=4096, positions=64)
    save_source(model.to(torch.float16), tmp_path / "m", dtype=torch.float16)
    del model
    result = subprocess.run(
        [sys.executable, "-c", REAL_LIMIT, str(tmp_path / "m"), str(TINY_STARCHAT)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "LOADED int8 bnb", result.stdout
    assert "bfloat16 does not fit after all" in result.stdout


class FakeCard:
    """A fake card: the queries that it answers, and the arguments that `load` receives for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.free = free
        self.loads: list[tuple[str, LoadOptions]] = []
        self.fails = 0
        card = torch.device("cuda", 0)
        for module in (opening, request_module):
            monkeypatch.setattr(module, "find_card", lambda device: None if device == "cpu" else card)
        monkeypatch.setattr(request_module.machine, "card_memory_free", lambda device: self.free)
        monkeypatch.setattr(request_module.machine, "shares_memory", lambda device: False)
        monkeypatch.setattr(opening, "load", self.load)

    def load(self, path: Path, options: LoadOptions, **_hooks: Any) -> Any:
        self.loads.append((path.name, options))
        if len(self.loads) <= self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(path, LoadOptions(dtype=torch.float32))


def test_on_a_card_what_fits_it_is_loaded_to_it(forms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = FakeCard(monkeypatch, free=8 << 30)
    loaded = open_model(ModelRequest(str(forms), context=64))
    assert loaded.plan is not None and loaded.plan.budget.card == 8 << 30
    ((_, options),) = card.loads
    assert options == LoadOptions(torch.device("cuda", 0), torch.bfloat16, context=64)


def test_too_small_a_card_gets_some_layers(forms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The free bytes are put between a part and the whole of the model; then the card fails altogether."""
    plan = plan_for(ModelRequest(str(forms), vram=8 << 30, context=64), named_card=True)
    whole = min(option.need.total - option.need.context for option in plan.options)
    card = FakeCard(monkeypatch, free=whole - 1)
    loaded = open_model(ModelRequest(str(forms), context=64))
    assert loaded.option is not None and loaded.option.device == "split"
    options = card.loads[-1][1]
    assert options.split == 1 and options.device == torch.device("cuda", 0)
    card.loads.clear()
    card.fails = sum(option.device == "split" for option in (loaded.plan.chosen, *loaded.plan.fallbacks))  # type: ignore[union-attr]
    lines: list[str] = []
    loaded = open_model(ModelRequest(str(forms), context=64), lines.append)
    assert loaded.option is not None and loaded.option.device == "cpu"
    options = card.loads[-1][1]
    assert options.device == "cpu" and options.split is None
    assert sum("does not fit after all" in line for line in lines) == card.fails


def test_vram_takes_the_place_of_what_is_free(forms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCard(monkeypatch, free=8 << 30)
    assert plan_for(ModelRequest(str(forms), vram=1 << 30)).budget.card == 1 << 30
    monkeypatch.setenv("LOWMEM_VRAM", "2GiB")
    assert plan_for(ModelRequest(str(forms))).budget.card == 2 << 30
    assert plan_for(ModelRequest(str(forms), device="cpu")).budget.card is None
