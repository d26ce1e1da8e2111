"""A model streamed layer by layer gives the results of transformers with the model in memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lowmem.benchmarks.experiments.starchat.dimensions import Dimensions
from lowmem.benchmarks.experiments.starchat.random_weights import write_source

from lowmem.checkpoint.source.open import open_source
from lowmem.errors import OutputError, SourceError
from lowmem.loading.loader import LoadOptions, load
from lowmem.streaming.forward import StreamedModel, head_of
from tests.helpers import KINDS, REPO, save_source, tiny_model
from tests.rtn_helpers import write_rtn_checkpoint

ROWS = torch.randint(0, 4096, (5, 24), generator=torch.Generator().manual_seed(0))


def transformers_logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        return model(input_ids=ROWS, use_cache=False).logits


def loaded_logits(folder: Path, dtype: torch.dtype, on_the_fly: Any = None) -> torch.Tensor:
    model = load(folder, LoadOptions(dtype=dtype, on_the_fly=on_the_fly)).model
    with torch.no_grad():
        return model(input_ids=ROWS, use_cache=False).logits


def streamed_logits(folder: Path, work: Path, dtype: torch.dtype, on_the_fly: Any = None) -> torch.Tensor:
    model = StreamedModel(open_source(folder), dtype, on_the_fly=on_the_fly)
    states = model.last_hidden(ROWS, work)
    with model.head() as logits:
        return torch.stack([logits(states.read(row, row + 1)[0]) for row in range(len(ROWS))])


@pytest.mark.parametrize("kind", KINDS)
def test_float32_equals_transformers(tmp_path, kind):
    save_source(tiny_model(kind), tmp_path / "model", shards=2)
    expected = transformers_logits(tmp_path / "model", torch.float32)
    found = streamed_logits(tmp_path / "model", tmp_path / "work", torch.float32)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["gpt_bigcode_mqa", "gpt_bigcode_mha", "llama"])
def test_bfloat16_equals_transformers_up_to_rounding(tmp_path, kind):
    save_source(tiny_model(kind), tmp_path / "model", format="bin")
    exact = transformers_logits(tmp_path / "model", torch.float32)
    expected = transformers_logits(tmp_path / "model", torch.bfloat16).float()
    found = streamed_logits(tmp_path / "model", tmp_path / "work", torch.bfloat16)
    assert found.dtype == torch.bfloat16
    rounding = (expected - exact).abs().mean()
    assert rounding > 0 and (found.float() - expected).abs().mean() < rounding / 4
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("bits", "options"),
    [(8, {}), (4, {"layout": "gptq_v2"}), (3, {"act_order_seed": 3}), (2, {}), (4, {"group_size": -1})],
)
def test_a_gptq_folder_gives_the_loaders_results(tmp_path, bits, options):
    """Asymmetric zero-points, both formats, permuted columns; and the dequantized oracle agrees."""
    oracle = write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), tmp_path / "q", bits=bits, **options)
    found = streamed_logits(tmp_path / "q", tmp_path / "work", torch.float32)
    torch.testing.assert_close(found, loaded_logits(tmp_path / "q", torch.float32), rtol=0, atol=5e-5)
    with torch.no_grad():
        expected = oracle(input_ids=ROWS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_bitsandbytes_gives_the_loaders_results(tmp_path, method, dtype):
    save_source(tiny_model("llama"), tmp_path / "model")
    expected = loaded_logits(tmp_path / "model", dtype, method)
    found = streamed_logits(tmp_path / "model", tmp_path / "work", dtype, method)
    plain = transformers_logits(tmp_path / "model", dtype)
    assert (expected - plain).abs().mean() > 0.01  # it is quantized
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_scaled_logits_of_a_family_are_kept(tmp_path):
    """Granite divides its logits, and scales its embedding and its residuals."""
    from transformers import AutoModelForCausalLM, GraniteConfig

    torch.manual_seed(0)
    config = GraniteConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=4096,
        num_key_value_heads=2, max_position_embeddings=64, logits_scaling=8.0, embedding_multiplier=12.0,
        residual_multiplier=0.5, tie_word_embeddings=True,
    )  # fmt: skip
    save_source(AutoModelForCausalLM.from_config(config).eval(), tmp_path / "model")
    found = streamed_logits(tmp_path / "model", tmp_path / "work", torch.float32)
    expected = transformers_logits(tmp_path / "model", torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_padding_on_the_right_changes_nothing(tmp_path):
    """Rows of different lengths are padded on the right, where a causal model does not look."""
    save_source(tiny_model("gpt_bigcode_mqa"), tmp_path / "model")
    model = StreamedModel(open_source(tmp_path / "model"), torch.float32)
    filled = ROWS.clone()
    filled[:, 10:] = 0
    whole = model.last_hidden(ROWS, tmp_path / "one").read(0, 5)[:, :10]
    cut = model.last_hidden(filled, tmp_path / "two").read(0, 5)[:, :10]
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-5)


def test_the_head_of_a_loaded_model_is_the_models_own(tmp_path):
    save_source(tiny_model("llama"), tmp_path / "model")
    loaded = load(tmp_path / "model", LoadOptions(dtype=torch.float32))
    with torch.no_grad():
        hidden = loaded.model.base_model(input_ids=ROWS[:1], use_cache=False).last_hidden_state[0]
        expected = loaded.model(input_ids=ROWS[:1], use_cache=False).logits[0]
    with head_of(loaded.model, loaded.device) as logits:
        torch.testing.assert_close(logits(hidden), expected)
    with torch.no_grad():  # and it works as before
        torch.testing.assert_close(loaded.model(input_ids=ROWS[:1], use_cache=False).logits[0], expected)


class Stopped(Exception):
    """Simulates Ctrl-C."""


def test_an_interrupted_pass_resumes_after_its_last_layer(tmp_path):
    save_source(tiny_model("llama", layers=4), tmp_path / "model")
    model = StreamedModel(open_source(tmp_path / "model"), torch.float32)
    expected = model.last_hidden(ROWS, tmp_path / "whole").read(0, 5)

    def stop_at(layer: int):
        def progress(done: int, count: int) -> None:
            seen.append(done)
            if done == layer:
                raise Stopped

        return progress

    for layer, begins in ((2, 0), (3, 2), (9, 3)):
        seen: list[int] = []
        try:
            states = model.last_hidden(ROWS, tmp_path / "work", stop_at(layer))
        except Stopped:
            assert layer < 9
        assert seen[0] == begins
    torch.testing.assert_close(states.read(0, 5), expected, rtol=0, atol=0)


def test_leftovers_of_another_pass_are_not_used(tmp_path):
    save_source(tiny_model("llama", layers=3), tmp_path / "model")
    model = StreamedModel(open_source(tmp_path / "model"), torch.float32)
    expected = model.last_hidden(ROWS, tmp_path / "whole").read(0, 5)
    seen: list[int] = []
    model.last_hidden(ROWS + 1 - 2 * (ROWS > 100), tmp_path / "work")
    (tmp_path / "work" / "hidden-9").write_bytes(b"of a later layer")
    states = model.last_hidden(ROWS, tmp_path / "work", lambda done, count: seen.append(done))
    assert seen[0] == 0 and torch.equal(states.read(0, 5), expected)
    # The same rows, but half of the file is missing.
    file = tmp_path / "work" / "hidden-3"
    file.write_bytes(file.read_bytes()[:100])
    seen.clear()
    states = model.last_hidden(ROWS, tmp_path / "work", lambda done, count: seen.append(done))
    assert seen[0] == 0 and torch.equal(states.read(0, 5), expected)


KILLED = """
import sys, torch
from pathlib import Path
from lowmem.checkpoint.source.open import open_source
from lowmem.streaming.forward import StreamedModel
import time
def slowly(done, count):
    print(done, flush=True)
    time.sleep(0.3)
rows = torch.randint(0, 4096, (5, 24), generator=torch.Generator().manual_seed(0))
StreamedModel(open_source(sys.argv[1]), torch.float32).last_hidden(rows, Path(sys.argv[2]), slowly)
"""


def test_a_killed_pass_resumes(tmp_path):
    save_source(tiny_model("llama", layers=6), tmp_path / "model")
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "model"), str(tmp_path / "work")],
        stdout=subprocess.PIPE, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)},
    )  # fmt: skip
    assert child.stdout is not None
    while child.stdout.readline().strip() not in (b"2", b""):
        time.sleep(0.01)
    model = StreamedModel(open_source(tmp_path / "model"), torch.float32)
    with pytest.raises(OutputError, match="another process"):
        model.last_hidden(ROWS, tmp_path / "work")
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    seen: list[int] = []
    states = model.last_hidden(ROWS, tmp_path / "work", lambda done, count: seen.append(done))
    assert 2 <= seen[0] < 6
    assert torch.equal(states.read(0, 5), model.last_hidden(ROWS, tmp_path / "whole").read(0, 5))


def broken(folder: Path, name: str, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("g_idx", lambda t: t + 100, "names groups"),
        ("g_idx", lambda t: t.long(), "not int32"),
        ("scales", lambda t: t[:-1], "of 2 groups, and scales is of 1"),
        ("qzeros", lambda t: t.float(), "float32"),
        ("scales", lambda t: t * float("inf"), "not finite"),
    ],
)
def test_damaged_gptq_folders_are_refused(tmp_path, part, change, says):
    write_rtn_checkpoint(tiny_model("llama"), tmp_path / "q")
    broken(tmp_path / "q", f"model.layers.1.mlp.up_proj.{part}", change)
    with pytest.raises(SourceError, match=says):
        StreamedModel(open_source(tmp_path / "q"), torch.float32).last_hidden(ROWS, tmp_path / "work")


def test_a_quantized_folder_is_not_quantized_again(tmp_path):
    write_rtn_checkpoint(tiny_model("llama"), tmp_path / "q")
    source = open_source(tmp_path / "q")
    assert source.format is not None
    with pytest.raises(SourceError, match="already quantized"):
        StreamedModel(source, torch.float32, on_the_fly="nf4")


MEASURED = """
import sys, torch
from pathlib import Path
from lowmem.checkpoint.source.open import open_source
from lowmem.streaming.forward import StreamedModel
rows = torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
model = StreamedModel(open_source(sys.argv[1]), torch.float32)
states = model.last_hidden(rows, Path(sys.argv[2]))
with model.head() as logits:
    print(logits(states.read(0, 1)[0]).shape)
"""


def peaks(tmp_path: Path, layers: int, hidden: int, heads: int) -> tuple[int, int]:
    """(peak resident bytes, bytes of all layers in float32) of a pass of a StarChat-shaped model."""
    from lowmem.benchmarks.experiments.processes import run_process

    dimensions = Dimensions(layers, hidden, heads, n_positions=512)
    folder = write_source(tmp_path / f"{layers}", dimensions)
    command = [sys.executable, "-c", MEASURED, str(folder), str(tmp_path / f"work{layers}")]
    usage = run_process(command, tmp_path / "log")
    return usage.peak_bytes, layers * 4 * sum(a * b for a, b in dimensions.linears.values())


def check_flat(tmp_path: Path, hidden: int, heads: int) -> None:
    """Eight layers take no more than two, up to 40 MiB of noise."""
    two, _ = peaks(tmp_path, 2, hidden, heads)
    eight, weights = peaks(tmp_path, 8, hidden, heads)
    assert eight - two < weights * 6 / 8 / 2, (two, eight, weights)


def test_memory_does_not_grow_with_the_layers(tmp_path):
    check_flat(tmp_path, 768, 6)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_layers_of_a_larger_model(tmp_path):
    check_flat(tmp_path, 2048, 16)
