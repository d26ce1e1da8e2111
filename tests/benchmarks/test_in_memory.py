"""The measure itself against an independent computation, and what the converter reaches by it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lowmem.benchmarks.demo import embedded_model
from lowmem.benchmarks.quality.in_memory import Comparison, log_probabilities, measure_folder, text_rows
from lowmem.benchmarks.quality.texts import read_texts
from lowmem.convert import convert
from lowmem.convert.calibration import CalibrationSpec
from lowmem.convert.recipe import ConvertOptions

from lowmem.config import QuantConfig
from lowmem.loading.loader import load

PEERS = {(4, 128): 0.0025, (3, 64): 0.011}
"""Mean KL divergence to stay under, with 128 rows of 512 tokens: at 4 bits that of llama.cpp's Q4_K_M, which
takes 5.04 bits (GPTQModel 7.7: 0.0042); at 3 bits GPTQModel's is 0.0184, AutoRound's 0.0096."""
BF16_ALONE = 0.0001
"""What bfloat16 arithmetic does to the unquantized model on that text."""


def test_measure_equals_a_plain_computation():
    generator = np.random.default_rng(3)
    rows, length, vocabulary = 6, 10, 7
    p = generator.dirichlet(np.ones(vocabulary), (rows, length))
    q = generator.dirichlet(np.ones(vocabulary), (rows, length))
    ids = generator.integers(0, vocabulary, (rows, length))
    kld = same = loss = 0.0
    for r in range(rows):
        for t in range(length):
            kld += sum(p[r, t, v] * np.log(p[r, t, v] / q[r, t, v]) for v in range(vocabulary))
            same += p[r, t].argmax() == q[r, t].argmax()
            if t + 1 < length:
                loss -= np.log(q[r, t, ids[r, t + 1]])
    tokens = torch.tensor(ids)

    def parts(values):
        return torch.tensor(values).log().split(4)

    quality = Comparison(parts(p), tokens).measure(parts(q))
    assert quality.kld == pytest.approx(kld / (rows * length))
    assert quality.same_top1 == pytest.approx(same / (rows * length))
    assert quality.ppl == pytest.approx(np.exp(loss / (rows * (length - 1))))


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    loaded = load(embedded_model(), dtype=torch.float32)
    rows = text_rows(loaded.tokenizer, (embedded_model() / "heldout.txt").read_text(encoding="utf-8"))
    assert rows.shape == (24, 512)
    return Comparison(log_probabilities(loaded.model, rows), rows)


def converted(out: Path, bits: int, group_size: int, rows: int) -> Path:
    convert(
        embedded_model(),
        out,
        QuantConfig(bits=bits, group_size=group_size),
        calibration=CalibrationSpec(rows=rows),
        options=ConvertOptions(device="cpu"),
    )
    return out


def test_the_unquantized_model_is_at_zero(comparison):
    quality = measure_folder(comparison, embedded_model())
    assert quality.kld == pytest.approx(0, abs=1e-7)
    assert quality.same_top1 == 1
    assert quality.ppl == pytest.approx(25.312, abs=0.001)


def test_four_bits_with_an_eighth_of_the_calibration(comparison, tmp_path):
    """Far from round to nearest (0.014), and near what all the calibration text gives."""
    quality = measure_folder(comparison, converted(tmp_path / "out", 4, 128, 16))
    assert quality.kld < 0.0046


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "group_size"), PEERS)
def test_less_divergence_than_peers_on_code_and_on_dialogues(tmp_path, bits, group_size):
    reference = load(embedded_model(), dtype=torch.float32)
    folder = converted(tmp_path / "out", bits, group_size, 128)
    for text in read_texts(("code", "dialogues"), (), reference.tokenizer, 4096):
        comparison = Comparison(log_probabilities(reference.model, text.rows), text.rows)
        assert measure_folder(comparison, folder).kld < PEERS[bits, group_size], text.name


@pytest.mark.slow
def test_eight_bits_change_less_than_bf16_arithmetic(comparison, tmp_path):
    bf16 = measure_folder(comparison, embedded_model(), torch.bfloat16)
    quality = measure_folder(comparison, converted(tmp_path / "out", 8, 128, 128))
    assert quality.kld < min(bf16.kld, BF16_ALONE)


def test_demo_converts_answers_and_measures(capsys, tmp_path, monkeypatch):
    """On a twelfth of the text: what the figures are worth is the other tests' matter."""
    from lowmem.cli import main

    monkeypatch.setattr("lowmem.benchmarks.quality.in_memory.text_rows", partial(text_rows, rows=2))
    assert main(["demo", "--rows", "2", "--new-tokens", "4", "--keep", str(tmp_path / "kept")]) == 0
    said = capsys.readouterr()
    for name in ("bf16 source", "GPTQ 8-bit g128", "GPTQ 4-bit g128"):
        assert f"{name} answers" in said.err
        assert f"│ {name}" in said.out
    assert "over 1,024 tokens of held-out code" in said.out
    assert (tmp_path / "kept" / "4bit" / "model.safetensors").is_file()
