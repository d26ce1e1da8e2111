"""The made-up Llama models whose decoding is timed, and the table of the times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lowmem.benchmarks.experiments.common import origin_here, repeated
from lowmem.benchmarks.experiments.pace import llama
from lowmem.benchmarks.experiments.starchat.random_weights import dense_weight, packed_weights

from lowmem.checkpoint.packing import unpack_rows
from lowmem.config import SamplingParams
from lowmem.export.export import export
from lowmem.generate.engine import Engine
from lowmem.kernels.native import library as native
from lowmem.loading.loader import LoadOptions, load

TINY = llama.Shape("Tiny, 2 layers", 2, 64, 4, 2, 128, 4096, 32, 1.2)


@pytest.mark.skipif(not native.available(), reason="the library is not compiled")
def test_a_made_up_model_decodes_natively_and_is_llamas_in_gguf(tmp_path: Path) -> None:
    weight, config = packed_weights(4, TINY.group)
    folder = TINY.write(tmp_path / "packed", llama._centred(weight), config)
    for head_bits in (16, 8):
        engine = Engine(
            load(folder, LoadOptions(dtype=torch.bfloat16, head_bits=head_bits)).model, context=64
        )
        tokens = list(engine.generate([1, 2, 3], SamplingParams(temperature=0, max_new_tokens=4)))
        decoder: Any = engine.decoder
        assert tokens and decoder.fast is not None and decoder.why_eager == ""
    source = TINY.write(tmp_path / "source", dense_weight, {})
    assert export(str(source), tmp_path / "source.gguf").path.stat().st_size > 2 * 4096 * 64


def test_integers_are_centred() -> None:
    weight, _ = packed_weights(4, 32)
    torch.manual_seed(0)
    plain = unpack_rows(weight("a", 256, 64)["a.qweight"], 4)
    torch.manual_seed(0)
    found = unpack_rows(llama._centred(weight)("a", 256, 64)["a.qweight"], 4)
    assert torch.equal(found, torch.where(plain == 0, 8, plain))


def test_the_table_has_the_ratio_of_each_round() -> None:
    smol = llama.SHAPES[0].name
    timings = (
        llama.Timing(llama.Version(smol, "lowmem", "8-bit head"), repeated([0.002, 0.004, 0.005])),
        llama.Timing(llama.Version(smol, "llama.cpp", "8-bit head"), repeated([0.003, 0.005, 0.005])),
    )
    record = llama.LlamaRecord(origin_here("pace.llama", ["--rounds", "3"], "x"), 2, 3, "0.3", (), timings)
    text = llama.render(record)
    assert "1.25 × (1.00 × to 1.50 ×)" in text and "≥ 1.2 ×: met" in text and "16-bit head" not in text
