"""Which version vLLM serves: what it loads, what fits each rank, and how the model is divided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lowmem.checkpoint.formats import LinearFormat, QuantizationFormat
from lowmem.engines.installed import Vllm
from lowmem.engines.vllm_plan import Choice, Room, check_ranks, choose, dtype_for, rank_kv_cache, rank_weights
from lowmem.errors import InvalidRequestError, MemoryBudgetError, SourceError
from lowmem.plan.candidates import Candidate, find_candidates
from lowmem.plan.memory import Form, kv_cache_bytes, weights_bytes
from lowmem.plan.shape import ModelShape, as_converted, read_shape
from tests.helpers import TINY_STARCHAT

VLLM = Vllm("/env/bin/vllm", "0.33.0", humming=True)
GIB = 1 << 30
TWO_CARDS = Room(2, 24 * GIB, on_cards=True)
CPU = Room(1, 24 * GIB, on_cards=False, sequences=4)
SOURCE = read_shape(TINY_STARCHAT)


def shape_of(bits: int, *, sym: bool = True) -> ModelShape:
    shape = as_converted(SOURCE, bits)
    assert shape.format is not None
    default = replace(shape.format.default, sym=sym)
    return replace(shape, format=replace(shape.format, default=default))


def version(bits: int, *, sym: bool = True) -> Candidate:
    label = f"{bits}-bit" + ("" if sym else " asymmetric")
    return Candidate(label, bits, Form("gptq", "bfloat16"), TINY_STARCHAT, shape_of(bits, sym=sym))


def chosen(
    *candidates: Candidate, vllm: Vllm = VLLM, room: Room = TWO_CARDS, dtype: str | None = None
) -> Choice:
    return choose(candidates, vllm, room, 1024, dtype)


def test_the_best_version_that_it_loads() -> None:
    choice = chosen(version(6), version(5), version(4), version(3))
    assert choice.candidate.label == "4-bit" and choice.method == "auto_gptq"
    assert choice.dtype == "float16" and choice.context == 1024
    assert "4-bit" in choice.reason and "2 cards with 24.00 GiB free each" in choice.reason


def test_unquantized_versions_have_no_method() -> None:
    candidates = find_candidates(str(TINY_STARCHAT), cuda=False)
    choice = choose(candidates, VLLM, CPU, 1024, "float32")
    assert choice.method == "" and choice.dtype == "float32"


@pytest.mark.parametrize(
    ("candidate", "room", "dtype", "why"),
    [
        (version(6), TWO_CARDS, None, "8 and 4 bits, not 6"),
        (version(4, sym=False), TWO_CARDS, None, "symmetric"),
        (version(8), CPU, None, "CPU kernels take 4 bits only"),
        (version(4), CPU, "float32", "float16 and bfloat16 only"),
        (replace(version(4), form=Form("nf4", "bfloat16")), TWO_CARDS, None, "bitsandbytes"),
        (replace(version(4), form=Form("gptq", "bfloat16", 8)), TWO_CARDS, None, "heads in 16 bits"),
        (replace(version(4), path=TINY_STARCHAT / "config.json"), TWO_CARDS, None, "folders"),
    ],
    ids=str,
)
def test_refusals_say_why_and_what_to_do(
    candidate: Candidate, room: Room, dtype: str | None, why: str
) -> None:
    with pytest.raises(SourceError) as caught:
        chosen(candidate, room=room, dtype=dtype)
    assert why in caught.value.message and "--bits 4" in caught.value.hint


@pytest.mark.parametrize("bits", [2, 3])
def test_2_and_3_bits_need_humming(bits: int) -> None:
    assert chosen(version(bits)).method == "humming"
    rows = replace(shape_of(bits), format=QuantizationFormat(LinearFormat(bits, -1, True)))
    for vllm, candidate in (
        (replace(VLLM, humming=False), version(bits)),
        (VLLM, version(bits, sym=False)),
        (VLLM, replace(version(bits), shape=rows)),
    ):
        with pytest.raises(SourceError, match="Humming"):
            chosen(candidate, vllm=vllm)


def test_a_mixture_of_4_and_8_bits() -> None:
    mixed = QuantizationFormat.mixture(
        LinearFormat(4, 128, True), {"transformer.h.0.attn.c_attn": LinearFormat(8, 128, True)}
    )
    candidate = replace(version(4), shape=replace(shape_of(4), format=mixed))
    assert chosen(candidate).method == "auto_gptq"
    with pytest.raises(SourceError):
        chosen(candidate, room=CPU)


def test_what_does_not_fit_is_refused_with_the_least_that_would() -> None:
    with pytest.raises(MemoryBudgetError) as caught:
        chosen(version(8), version(4), room=Room(2, GIB, on_cards=True))
    assert "4-bit" in caught.value.hint and "--tensor-parallel" in caught.value.hint


def test_a_smaller_version_where_the_better_one_does_not_fit() -> None:
    eight, four = (rank_weights(shape_of(bits), Form("gptq", "float16"), 1) for bits in (8, 4))
    kv = rank_kv_cache(SOURCE, Form("gptq", "float16"), 1024, 1)
    room = Room(1, 2 * GIB + kv + (eight + four) // 2, on_cards=True)
    assert chosen(version(8), version(4), room=room).candidate.label == "4-bit"


def test_ranks_share_matrices_and_copy_the_rest() -> None:
    form = Form("dense", "float16")
    whole = weights_bytes(SOURCE, form)
    sizes = [rank_weights(SOURCE, form, ranks) for ranks in (1, 2, 4)]
    assert sizes[0] == whole and whole / 2 < sizes[1] < 0.6 * whole and whole / 4 < sizes[2] < sizes[1]


def test_one_kv_head_is_on_every_rank() -> None:
    form = Form("dense", "float16")
    assert SOURCE.kv_heads == 1
    assert rank_kv_cache(SOURCE, form, 100, 4) == kv_cache_bytes(SOURCE, form, 100)
    several = replace(SOURCE, kv_heads=4)
    assert rank_kv_cache(several, form, 100, 2) == kv_cache_bytes(several, form, 100) // 2


@pytest.mark.parametrize("ranks", [3, 8])
def test_heads_are_divided_evenly(ranks: int) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_ranks(SOURCE, ranks)
    assert "4 attention heads" in caught.value.message and "1, 2, 4" in caught.value.hint


def test_other_families_keep_their_dtype() -> None:
    candidate = version(4)
    assert dtype_for(candidate, None) == "float16" and dtype_for(candidate, "bfloat16") == "bfloat16"
    llama = replace(candidate, shape=replace(candidate.shape, model_type="llama", stored="bfloat16"))
    assert dtype_for(llama, None) == "bfloat16"


def test_paths_are_not_looked_at() -> None:
    """The choice is pure: a version that is not there is chosen all the same."""
    assert chosen(replace(version(4), path=Path("/nowhere"))).candidate.path == Path("/nowhere")
