"""From a checkpoint to a served answer with our kernels for cards, in Triton's interpreter on the CPU.

Everything but the silicon: loading, kernel choice and trial, prefill in chunks, decode, drafts, the session
and the server.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowmem.config import SamplingParams
from lowmem.generate.engine import Engine
from lowmem.kernels.registry import VARIABLE
from lowmem.loading.loader import LoadedModel, LoadOptions, load
from lowmem.session import Session
from tests.helpers import tiny_model
from tests.rtn_helpers import write_rtn_checkpoint
from tests.server.server_fixture import live_server

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter needs TRITON_INTERPRET=1", allow_module_level=True)

PROMPT = [5, 9, 300, 41, 7, 9, 300, 41, 7, 9]
"""It repeats itself, so that drafts are made."""
GREEDY = SamplingParams(max_new_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linears of 4 and 8 bits with zero-points, scattered groups and negative scales."""
    found = tmp_path_factory.mktemp("mixed") / "model"
    model = tiny_model("gpt_bigcode_mqa", layers=1, positions=64)
    write_rtn_checkpoint(model, found, others={"c_proj": 8}, act_order_seed=1)
    return found


def loaded_with(kernel: str, folder: Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, kernel)
        return load(folder, LoadOptions(dtype=dtype))


@pytest.mark.parametrize("speculate", [True, False])
def test_an_engine_gives_the_references_tokens(folder: Path, speculate: bool) -> None:
    found = []
    for kernel in ("triton", "reference"):
        loaded = loaded_with(kernel, folder)
        assert loaded.kernel == ("lowmem Triton" if kernel == "triton" else "reference")
        engine = Engine(loaded.model, context=48, stop_ids=(), speculate=speculate)
        found.append([token.id for token in engine.generate(PROMPT, GREEDY)])
    assert len(found[0]) == 6 and found[0] == found[1]


def test_logits_in_16_bits_are_the_references_within_rounding(folder: Path) -> None:
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        got, right = (
            loaded_with(kernel, folder, torch.bfloat16).model(input_ids=ids).logits.float()
            for kernel in ("triton", "reference")
        )
    assert float((got - right).norm() / right.norm()) < 0.03


def test_a_server_answers(folder: Path) -> None:
    right = Session(loaded_with("reference", folder), context=48)
    expected = right.complete("def f", GREEDY, raw=True).text
    with live_server(loaded=loaded_with("triton", folder), context=48) as live:
        answer = live.client().completions.create(
            model="tiny-starchat", prompt="def f", max_tokens=6, temperature=0
        )
    assert answer.choices[0].text == expected
