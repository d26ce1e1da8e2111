"""The native decode step: float64 is the oracle, a row never depends on others, and what it cannot do stays
eager."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.activations import ACT2FN

from lowmem.config import SamplingParams
from lowmem.generate import native_step
from lowmem.generate.cache import KVCache
from lowmem.generate.engine import Engine, Token
from lowmem.generate.lookup import Pace
from lowmem.generate.native_step import MOST_ROWS, NativeStep, StepRefused, checked_step, why_not
from lowmem.kernels import native
from lowmem.loader import load
from lowmem.quant_linear import QuantLinear
from tests.helpers import TINY_STARCHAT, tiny_model
from tests.native_oracle import ISAS, using
from tests.rtn_helpers import write_rtn_checkpoint

pytestmark = pytest.mark.skipif(not native.available(), reason="the library is not compiled")

BIGCODE = ["gpt_bigcode_mqa", "gpt_bigcode_mha"]
# Of attention: with AVX-512 BF16 queries and weights are rounded to bfloat16, else all is float32.
ERRORS = {"portable C": 2e-5, "AVX2": 2e-5, "AVX-512 VNNI": 0.01}


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    native.set_threads()


def bigcode(kind: str = "gpt_bigcode_mqa", *, heads: int = 4, sharp: float = 1.0, **options: Any) -> Any:
    """A tiny model in bfloat16; sharp: by how much its queries are larger, so that single keys decide."""
    model = tiny_model(kind, heads=heads, positions=1024, vocab=512, **options)
    for block in model.transformer.h:
        if kind.endswith("mqa"):
            block.attn.c_attn.weight.data[: model.config.n_embd] *= sharp
    return model.to(torch.bfloat16)


def random_ids(count: int, vocab: int = 512, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(i) for i in torch.randint(0, vocab, (count,), generator=generator)]


@torch.inference_mode()
def filled(model: Any, length: int, capacity: int = 700, seed: int = 1) -> KVCache:
    """A cache of `length` random tokens, from the model's own eager forward."""
    cache = KVCache(model.config.n_layer, capacity)
    model(input_ids=torch.tensor([random_ids(length, seed=seed)]), past_key_values=cache, use_cache=True)
    return cache


def contents(cache: KVCache, last: int) -> list[torch.Tensor]:
    """Keys and values of the last tokens, in every layer."""
    where = slice(cache.length - last, cache.length)
    return [t[:, :, where].clone() for layer in cache.kv_layers for t in (layer.keys, layer.values)]  # type: ignore[index]


def oracle(model: Any, cache: KVCache, ids: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """float64 logits of the last tokens, `ids`, and the keys and values that they should have left.

    The layers attend to what the cache holds, so that its rounding is no difference.
    """
    body, config = model.transformer, model.config
    rows, total = len(ids), cache.length
    size = config.n_embd // config.n_head
    activation = ACT2FN[config.activation_function]

    def linear(module: Any, x: torch.Tensor) -> torch.Tensor:
        weight = module.dequantize() if isinstance(module, QuantLinear) else module.weight
        y = x @ weight.double().T
        return y if module.bias is None else y + module.bias.double()

    def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], module.weight.double(), module.bias.double(), module.eps)

    positions = torch.arange(total - rows, total)
    x = body.wte.weight[torch.tensor(ids)].double() + body.wpe.weight[positions].double()
    left = []
    for block, layer in zip(body.h, cache.kv_layers, strict=True):
        both = linear(block.attn.c_attn, norm(block.ln_1, x))
        if config.multi_query:
            query, key, value = both.split((config.n_embd, size, size), dim=1)
            query, key, value = query.view(rows, -1, size), key[:, None], value[:, None]
        else:
            query, key, value = both.view(rows, config.n_head, 3 * size).split(size, dim=2)
        left += [key.transpose(0, 1)[None], value.transpose(0, 1)[None]]  # [1, kv_heads, rows, size]
        keys, values = (t[0, :, :total].double() for t in (layer.keys, layer.values))  # type: ignore[index]
        keys, values = (t.expand(config.n_head, -1, -1) for t in (keys, values))
        scores = torch.einsum("rhd,htd->hrt", query, keys) * size**-0.5
        hidden = torch.arange(total)[None] > positions[:, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        mixed = torch.einsum("hrt,htd->rhd", weights, values).reshape(rows, -1)
        x = x + linear(block.attn.c_proj, mixed)
        wide = activation(linear(block.mlp.c_fc, norm(block.ln_2, x)))
        x = x + linear(block.mlp.c_proj, wide)
    return linear(model.lm_head, norm(body.ln_f, x)), left


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


# ---- the step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", BIGCODE)
@torch.inference_mode()
def test_logits_and_cache_are_float64s(kind: str, isa: str) -> None:
    """Contexts before, at and behind the edges of attention's chunks; single keys decide, so that one too
    many or too few shows."""
    model = bigcode(kind, sharp=4.0)
    with using(isa) as there:
        if not there:
            pytest.skip(f"no {isa}")
        for length, rows in ((1, 1), (9, 2), (254, 1), (255, 1), (256, 1), (250, 11), (600, 5)):
            cache = filled(model, length)
            ids = random_ids(rows, seed=length)
            logits = NativeStep(model, cache).step(ids)
            assert cache.length == length + rows
            expected, left = oracle(model, cache, ids)
            assert logits.dtype is torch.float32
            assert error(logits, expected) < ERRORS[isa], (length, rows)
            for stored, wanted in zip(contents(cache, rows), left, strict=True):
                assert error(stored, wanted) < ERRORS[isa] + 0.004  # bfloat16


@pytest.mark.parametrize(("heads", "hidden"), [(1, 16), (3, 96), (20, 320), (49, 784)])
@torch.inference_mode()
def test_any_number_of_heads(heads: int, hidden: int) -> None:
    """Fewer than fill a vector, and more than are taken at a time, in one row and in several."""
    model = bigcode(heads=heads, hidden=hidden, sharp=3.0)
    for rows in (1, 3, 16):
        cache = filled(model, 300)
        logits = NativeStep(model, cache).step(random_ids(rows))
        assert error(logits, oracle(model, cache, random_ids(rows))[0]) < 0.01


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@torch.inference_mode()
def test_packed_linears_are_the_dequantized_ones(bits: int, tmp_path: Path) -> None:
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), tmp_path / "q", bits=bits)
    ids, found = random_ids(5), {}
    for width in (None, 8, 16):  # of the integers that activations become
        model = load(tmp_path / "q", dtype=torch.bfloat16, activation_bits=width).model
        cache = filled(model, 40, capacity=64)
        logits = NativeStep(model, cache).step(ids)
        found[width] = error(logits, oracle(model, cache, ids)[0])
    assert found[16] < 0.005 < found[8] < 0.05
    assert found[None] == found[16 if bits > 3 else 8]


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast"])
@torch.inference_mode()
def test_activations_are_told_apart(name: str) -> None:
    """The two gelus differ by 5e-4 at most: inputs where they do, and an error that is less."""
    model = bigcode()
    model.config.activation_function = name
    for block in model.transformer.h:
        block.mlp.act = ACT2FN[name]
        block.mlp.c_fc.bias.data[:] = torch.linspace(-6, 6, 256).to(torch.bfloat16)
        block.mlp.c_proj.weight.data *= 8
    with using("portable C"):
        cache = filled(model, 5)
        logits = NativeStep(model, cache).step([3, 4])
    assert error(logits, oracle(model, cache, [3, 4])[0]) < 2e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", BIGCODE)
@torch.inference_mode()
def test_a_row_depends_on_no_other_row_nor_on_threads(kind: str, isa: str) -> None:
    model = bigcode(kind, hidden=96, heads=6)
    ids = random_ids(12)
    with using(isa) as there:
        if not there:
            pytest.skip(f"no {isa}")
        for length in (20, 249):  # within a chunk of keys, and over its edge
            results = []
            for threads, parts in ((1, [12]), (2, [1] * 12), (3, [5, 1, 6]), (2, [12])):
                torch.set_num_threads(threads)
                cache = filled(model, length)
                step, at, logits = NativeStep(model, cache), 0, []
                for part in parts:
                    logits.append(step.step(ids[at : at + part]))
                    at += part
                results.append([torch.cat(logits), *contents(cache, 12)])
                torch.set_num_threads(1)  # the prefills are torch's, which threads may change
            for result in results[1:]:
                assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@torch.inference_mode()
def test_the_real_small_model_is_nearer_to_float32_than_eager_bfloat16() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_STARCHAT)
    text = tokenizer((TINY_STARCHAT / "heldout.txt").read_text()[:3000]).input_ids[:208]
    exact = AutoModelForCausalLM.from_pretrained(TINY_STARCHAT, dtype=torch.float32).eval()
    expected = exact(input_ids=torch.tensor([text])).logits[0, 160:].log_softmax(-1)
    model = AutoModelForCausalLM.from_pretrained(TINY_STARCHAT, dtype=torch.bfloat16).eval()
    eager = model(input_ids=torch.tensor([text])).logits[0, 160:]
    cache = KVCache(model.config.n_layer, 256)
    model(input_ids=torch.tensor([text[:160]]), past_key_values=cache, use_cache=True)
    step = NativeStep(model, cache)
    ours = torch.cat([step.step(text[at : at + 16]) for at in range(160, 208, 16)])

    def divergence(logits: torch.Tensor) -> float:
        other = logits.float().log_softmax(-1)
        return float((expected.exp() * (expected - other)).sum(-1).mean())

    assert divergence(ours) < divergence(eager) < 0.001


# ---- what is refused --------------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_step_checks_ids_room_and_cache() -> None:
    model = bigcode()
    cache = filled(model, 10, capacity=16)
    step = NativeStep(model, cache)
    before = contents(cache, 10)
    for ids in ([], [1] * (MOST_ROWS + 1), [512], [-1], [1] * 7):
        with pytest.raises(ValueError):
            step.step(ids)
    cache.kv_layers[1].length = 9
    with pytest.raises(ValueError, match="not the one"):
        step.step([1])
    cache.kv_layers[1].length = 10
    cache.set_fixed(True)
    with pytest.raises(ValueError, match="not the one"):
        step.step([1])
    cache.set_fixed(False)
    assert cache.length == 10 and all(map(torch.equal, contents(cache, 10), before))
    step.step([1] * 6)
    cache.kv_layers[0].keys = cache.kv_layers[0].keys.clone()  # type: ignore[union-attr]
    cache.cut(0)
    with pytest.raises(ValueError, match="not the one"):
        step.step([1])


def positions_of_16(model: Any) -> None:
    model.transformer.wpe.weight.data = model.transformer.wpe.weight.data[:16].clone()


@torch.inference_mode()
def test_no_position_beyond_the_models_is_read() -> None:
    model = bigcode()
    cache = filled(model, 10, capacity=32)
    positions_of_16(model)
    step = NativeStep(model, cache)
    step.step([1] * 6)
    with pytest.raises(ValueError, match="do not fit"):
        step.step([1])


def unknown_activation(model: Any) -> None:
    model.config.activation_function = "relu"


def hooked(model: Any) -> None:
    model.transformer.h[0].register_forward_hook(lambda *_: None)


def other_norm(model: Any) -> None:
    model.transformer.ln_f = torch.nn.RMSNorm(64, dtype=torch.bfloat16)


def other_linear(model: Any) -> None:
    class Adapted(torch.nn.Linear):
        """Adds something of its own."""

    model.transformer.h[1].mlp.c_fc = Adapted(64, 256, dtype=torch.bfloat16)


def float_bias(model: Any) -> None:
    model.transformer.h[1].mlp.c_fc.bias.data = model.transformer.h[1].mlp.c_fc.bias.data.float()


def transposed(model: Any) -> None:
    weight = model.transformer.h[1].attn.c_proj.weight
    weight.data = weight.data.T.contiguous().T


def training(model: Any) -> None:
    model.train()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (unknown_activation, "activation relu"),
        (hooked, "hooks"),
        (other_norm, "a norm is RMSNorm"),
        (other_linear, "a linear is Adapted"),
        (float_bias, r"bfloat16 tensor of \[256\]"),
        (transposed, r"bfloat16 tensor of \[64, 64\]"),
        (training, "eval mode"),
    ],
)
@torch.inference_mode()
def test_what_the_step_does_not_know_is_refused(change: Callable[[Any], None], reason: str) -> None:
    model = bigcode()
    cache = filled(model, 5)
    change(model)
    with pytest.raises(StepRefused, match=reason):
        NativeStep(model, cache)


def test_other_models_and_dtypes_keep_the_eager_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "GPTBigCode only" in why_not(tiny_model("llama", dtype=torch.bfloat16))
    assert "float32" in why_not(tiny_model("gpt_bigcode_mqa"))
    assert "multiple of 16" in why_not(tiny_model("gpt_bigcode_mqa", heads=8, dtype=torch.bfloat16))
    assert why_not(bigcode()) == ""
    monkeypatch.setenv("LOWMEM_CPU_KERNEL", "reference")
    assert why_not(bigcode()) == "LOWMEM_CPU_KERNEL=reference"


@torch.inference_mode()
def test_a_packed_linear_that_is_not_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt_bigcode_mqa", hidden=128, heads=4)
    write_rtn_checkpoint(model, tmp_path / "q", act_order_seed=3)
    scattered = load(tmp_path / "q", dtype=torch.bfloat16).model
    with pytest.raises(StepRefused, match="as it lies"):
        NativeStep(scattered, filled(scattered, 5))
    monkeypatch.setenv("LOWMEM_CPU_KERNEL", "reference")
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), tmp_path / "r")
    plain = load(tmp_path / "r", dtype=torch.bfloat16).model
    monkeypatch.delenv("LOWMEM_CPU_KERNEL")
    with pytest.raises(StepRefused, match="as it lies"):
        NativeStep(plain, filled(plain, 5))


@torch.inference_mode()
def test_a_step_that_differs_from_the_model_is_refused_and_leaves_nothing() -> None:
    """A model of this name whose forward is another one."""
    model = bigcode()
    cache = filled(model, 10)
    model.transformer.h[0].mlp.c_proj.forward = lambda x: torch.zeros((*x.shape[:-1], 64), dtype=x.dtype)
    with pytest.raises(StepRefused, match="differ from the eager ones"):
        checked_step(model, cache, [1, 2])
    assert cache.length == 10
    del model.transformer.h[0].mlp.c_proj.forward
    _, logits = checked_step(model, cache, [1, 2])
    assert cache.length == 12 and logits.shape == (2, 512)


# ---- in the engine ----------------------------------------------------------------------------------------

GREEDY = SamplingParams(temperature=0, max_new_tokens=60)
WARM = SamplingParams(temperature=0.7, top_k=0, max_new_tokens=60, seed=5)


class Always(Pace):
    """Drafts whatever there is to draft."""

    def length(self, most: int) -> int:
        return min(most, 7)


def answer(model: Any, params: SamplingParams, *, draft: bool) -> tuple[list[Token], Engine]:
    part = random_ids(24, vocab=64, seed=3)
    engine = Engine(model, context=256, speculate=draft)
    engine._pace = Always()
    return list(engine.generate([*part, *part[:12]], params)), engine


@pytest.mark.parametrize("params", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_drafts_change_no_token_and_no_bit(packed: bool, params: SamplingParams, tmp_path: Path) -> None:
    model = bigcode()
    if packed:
        write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa", positions=1024), tmp_path / "q")
        model = load(tmp_path / "q", dtype=torch.bfloat16).model
    plain, before = answer(model, params, draft=False)
    tokens, after = answer(model, params, draft=True)
    assert before.eager_because == after.eager_because == ""
    assert tokens == plain
    assert params is WARM or after.accepted > 10
    length = min(before.cache.length, after.cache.length)
    for one, other in zip(before.cache.kv_layers, after.cache.kv_layers, strict=True):
        assert torch.equal(one.keys[:, :, :length], other.keys[:, :, :length])  # type: ignore[index]
        assert torch.equal(one.values[:, :, :length], other.values[:, :, :length])  # type: ignore[index]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "starcoder2"])
def test_packed_models_of_other_families_need_no_pairs(kind: str, tmp_path: Path) -> None:
    """Their eager steps have one row; what drafts leave behind is the same to the last bit all the same."""
    write_rtn_checkpoint(tiny_model(kind, hidden=128), tmp_path / "q")
    model = load(tmp_path / "q", dtype=torch.bfloat16).model
    rows: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: rows.append(args[0].shape[1]))
    for params in (GREEDY, WARM):
        plain, before = answer(model, params, draft=False)
        assert set(rows[1:]) == {1}
        tokens, after = answer(model, params, draft=True)
        assert [t.id for t in tokens] == [t.id for t in plain]
        length = min(before.cache.length, after.cache.length)
        for one, other in zip(before.cache.kv_layers, after.cache.kv_layers, strict=True):
            assert torch.equal(one.keys[:, :, :length], other.keys[:, :, :length])  # type: ignore[index]
        rows.clear()


def test_the_first_step_is_checked_once_and_later_ones_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bigcode()
    forwards: list[int] = []
    real = model.forward

    def forward(*args: Any, **options: Any) -> Any:
        forwards.append(1)
        return real(*args, **options)

    monkeypatch.setattr(model, "forward", forward)
    tokens, engine = answer(model, GREEDY, draft=False)
    assert len(tokens) == 60 and len(forwards) == 2  # the prefill and the check
    list(engine.generate(random_ids(20), GREEDY))
    assert len(forwards) == 3


def test_a_refused_step_leaves_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bigcode()
    monkeypatch.setenv("LOWMEM_CPU_KERNEL", "reference")
    eager, _ = answer(model, GREEDY, draft=False)
    monkeypatch.delenv("LOWMEM_CPU_KERNEL")

    def wrong(self: NativeStep, ids: Any) -> torch.Tensor:
        self._cache.advance(len(ids))
        return torch.zeros((len(ids), 512))

    monkeypatch.setattr(NativeStep, "step", wrong)
    tokens, engine = answer(model, GREEDY, draft=False)
    assert tokens == eager
    assert "differ from the eager ones" in engine.eager_because


@pytest.mark.parametrize("at", ["before", "behind", "between"])
def test_an_interrupted_step_leaves_a_cache_that_goes_on_right(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bigcode()
    expected, _ = answer(model, GREEDY, draft=False)
    engine = Engine(model, context=256, speculate=False)
    steps = [0]
    real_step, real_advance = NativeStep.step, KVCache.advance

    def step(self: NativeStep, ids: Any) -> torch.Tensor:
        steps[0] += 1
        if steps[0] == 7 and at == "before":
            raise KeyboardInterrupt
        logits = real_step(self, ids)
        if steps[0] == 7 and at == "behind":
            raise KeyboardInterrupt
        return logits

    def advance(self: KVCache, count: int) -> None:
        if steps[0] == 7 and at == "between":
            self.kv_layers[0].length += count
            raise KeyboardInterrupt
        real_advance(self, count)

    monkeypatch.setattr(NativeStep, "step", step)
    monkeypatch.setattr(KVCache, "advance", advance)
    part = random_ids(24, vocab=64, seed=3)
    with pytest.raises(KeyboardInterrupt):
        list(engine.generate([*part, *part[:12]], GREEDY))
    assert list(engine.generate([*part, *part[:12]], GREEDY)) == expected
    assert engine.eager_because == "" and steps[0] > 60


def test_weights_come_into_the_kernels_order_between_tokens(tmp_path: Path) -> None:
    """The first token is there before any is moved, and none of those that follow changes."""
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), tmp_path / "q")
    model = load(tmp_path / "q", dtype=torch.bfloat16).model
    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    engine = Engine(model, context=256, speculate=False)
    tokens = engine.generate(random_ids(20), GREEDY)
    first = next(tokens)
    assert all(linear.in_file_order for linear in linears)
    answered = [first, *tokens]
    assert not any(linear.in_file_order for linear in linears)
    engine.reset()
    assert list(engine.generate(random_ids(20), GREEDY)) == answered


# ---- threads, and reading ---------------------------------------------------------------------------------


def exclusive_or(data: bytes) -> int:
    padded = data + bytes(-len(data) % 8)
    return int(np.bitwise_xor.reduce(np.frombuffer(padded, np.uint64), initial=np.uint64(0)))


@pytest.mark.parametrize("own", [False, True], ids=["torch's threads", "own threads"])
def test_reading_reads_every_byte_once(own: bool) -> None:
    memory = np.random.default_rng(0).integers(0, 256, (5 << 20) + 77, dtype=np.uint8)
    with native.running() as library:
        try:
            for threads in (1, 2, 5):
                library.lm_set_threads(threads, None if own else native._native().gomp)
                for start, size in (
                    (0, 0),
                    (1, 1),
                    (3, 7),
                    (8, 8),
                    (5, 255),
                    (2, 256),
                    (1, 5 << 20),
                    (7, 5 << 20),
                ):
                    part = memory[start : start + size]
                    assert library.lm_read(part.ctypes.data, size) == exclusive_or(part.tobytes())
        finally:
            native._native().threads = 0  # set again by the next caller


FORK = """
import os, numpy as np, torch
from lowmem.kernels import native
library = native.library()
library.lm_set_threads(3, None)
data = np.arange(1 << 19, dtype=np.uint64)
expected = int(np.bitwise_xor.reduce(data))
assert library.lm_read(data.ctypes.data, data.nbytes) == expected
child = os.fork()
assert library.lm_read(data.ctypes.data, data.nbytes) == expected
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_gets_threads_of_its_own() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60, env=environment)


def test_the_modules_constants_are_the_librarys() -> None:
    header = (Path(native_step.__file__).parent.parent / "kernels" / "csrc" / "step.h").read_text()
    assert f"LM_STEP_ROWS = {MOST_ROWS}" in header
