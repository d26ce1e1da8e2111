"""A checkpoint made to fit has the size that was asked for, and its plan fits the memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from lowmem.benchmarks.experiments.starchat import fit as starchat_fit
from lowmem.benchmarks.experiments.starchat.replicas import starchat_header_replica

from lowmem.checkpoint.formats import LinearFormat, packed_bytes
from lowmem.checkpoint.packing import stored_shapes
from lowmem.errors import InvalidRequestError, MemoryBudgetError, RecipeError
from lowmem.plan.device import parse_bytes
from lowmem.plan.fit.allocation import Allocation, best_allocation, bits_per_weight
from lowmem.plan.fit.budget import SizeBudget, left_for_linears, resized
from lowmem.plan.fit.sensitivities import OPTIONS, Sensitivities
from lowmem.plan.memory import CUDA_CONTEXT, HOST_CONTEXT, Form, need_on_device
from lowmem.plan.request import ModelRequest, plan_for
from lowmem.plan.shape import ModelShape, as_converted, read_shape
from tests.helpers import REPO

GIB = 1 << 30
STARCHAT = starchat_fit.starchat_linears()


@pytest.fixture(scope="module")
def starchat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return starchat_header_replica(tmp_path_factory.mktemp("fit") / "starchat-alpha")


@pytest.fixture(scope="module")
def shape(starchat: Path) -> ModelShape:
    return read_shape(starchat)


@pytest.fixture(scope="module")
def found() -> Sensitivities:
    return starchat_fit.made_up_sensitivities(STARCHAT)


def total(allocation: Allocation) -> int:
    return sum(packed_bytes(*STARCHAT[name], format) for name, format in allocation.linears.items())


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: f"{o.label}-{o.sym}")
def test_packed_bytes_are_those_of_the_tensors(option: LinearFormat) -> None:
    shapes = stored_shapes(6144, 6400, option.bits, option.group_size)
    values = 4 * (shapes.qweight[0] * shapes.qweight[1] + shapes.qzeros[0] * shapes.qzeros[1])
    assert packed_bytes(6144, 6400, option) == values + 2 * shapes.scales[0] * shapes.scales[1] + 4 * 6144


@pytest.mark.parametrize("gib", [7.5, 9.5, 11.5, 15.5])
def test_a_card_is_filled_and_not_overfilled(shape: ModelShape, found: Sensitivities, gib: float) -> None:
    """The need of the plan is within 0.5 % of the card's memory."""
    card = int(gib * GIB)
    allocation = best_allocation(found, SizeBudget(card=card).left_for_linears(shape))
    made = resized(shape, allocation.nbytes)
    need = need_on_device(made, Form("gptq", "float16"), 8192, cuda=True, own_context=CUDA_CONTEXT)
    assert 0.995 * card <= need.total <= card
    assert total(allocation) == allocation.nbytes


def test_what_is_larger_than_8_bits_takes_the_best(shape: ModelShape, found: Sensitivities) -> None:
    allocation = best_allocation(found, SizeBudget(card=80 * GIB).left_for_linears(shape))
    assert {format.bits for format in allocation.linears.values()} == {8}


@pytest.mark.parametrize("gib", [8, 12, 15])
def test_a_host_is_filled_likewise(shape: ModelShape, found: Sensitivities, gib: int) -> None:
    budget = SizeBudget(host=gib * GIB, context=4096)
    allocation = best_allocation(found, budget.left_for_linears(shape))
    made = resized(shape, allocation.nbytes)
    need = need_on_device(made, Form("gptq", "bfloat16"), 4096, cuda=False, own_context=HOST_CONTEXT)
    assert 0.995 * gib * GIB <= need.total <= gib * GIB


def test_the_size_of_the_weights(shape: ModelShape, found: Sensitivities) -> None:
    allocation = best_allocation(found, SizeBudget(weights=9 * GIB).left_for_linears(shape))
    made = resized(shape, allocation.nbytes)
    need = need_on_device(made, Form("gptq", "float16"), 8192, cuda=True)
    assert 0.995 * 9 * GIB <= need.weights <= 9 * GIB


@pytest.mark.parametrize("bits", [2.2, 2.7, 3.5, 4.6, 6.2])
def test_average_bits(shape: ModelShape, found: Sensitivities, bits: float) -> None:
    allocation = best_allocation(found, SizeBudget(bits_per_weight=bits).left_for_linears(shape))
    assert bits * 0.995 <= allocation.bits_per_weight <= bits
    assert allocation.bits_per_weight == bits_per_weight(STARCHAT, allocation.linears)


def test_bits_count_scales_and_zero_points() -> None:
    """By hand: 4 bits, and 16 + 4 for 128 weights; 2 bits, and 16 + 2 for 32."""
    sizes = {"a": (128, 64), "b": (128, 64)}
    formats = {"a": LinearFormat(4, 128), "b": LinearFormat(2, 32)}
    assert bits_per_weight(sizes, formats) == pytest.approx((4 + 20 / 128 + 2 + 18 / 32) / 2)


def test_more_memory_never_predicts_more_loss(shape: ModelShape, found: Sensitivities) -> None:
    budgets = [SizeBudget(card=int(gib * GIB)).left_for_linears(shape) for gib in (7, 8, 9, 10, 12, 14)]
    losses = [best_allocation(found, budget).predicted_kld for budget in budgets]
    assert losses == sorted(losses, reverse=True)


def test_a_reader_restricts_the_formats_and_fused_linears_agree(
    found: Sensitivities, shape: ModelShape
) -> None:
    """Only symmetric 4 and 8 bits, and c_fc stored as c_attn of the same layer."""
    alike = [[f"transformer.h.{n}.attn.c_attn", f"transformer.h.{n}.mlp.c_fc"] for n in range(40)]
    budget = SizeBudget(bits_per_weight=5.5).left_for_linears(shape)
    allocation = best_allocation(found, budget, allows=lambda f: f.sym and f.bits in (4, 8), alike=alike)
    assert {format.bits for format in allocation.linears.values()} == {4, 8}
    for first, second in alike:
        assert allocation.linears[first] == allocation.linears[second]
    assert total(allocation) <= budget


def test_too_little_memory_names_the_least(found: Sensitivities, shape: ModelShape) -> None:
    with pytest.raises(MemoryBudgetError, match=r"the smallest versions of the linears take 3\.78 GiB"):
        best_allocation(found, SizeBudget(card=5 * GIB).left_for_linears(shape))


@pytest.mark.parametrize(
    "budget",
    [
        SizeBudget(card=4 * GIB),
        SizeBudget(host=4 * GIB, context=512),
        SizeBudget(weights=3 * GIB),
        SizeBudget(bits_per_weight=2.01),
    ],
    ids=["card", "host", "weights", "bits"],
)
def test_the_refusal_names_a_size_that_works(
    budget: SizeBudget, shape: ModelShape, found: Sensitivities
) -> None:
    with pytest.raises(MemoryBudgetError, match="is too small") as caught:
        left_for_linears(budget, shape)
    option, size = caught.value.hint.removeprefix("Use at least ").split(",")[0].split(" ")[:2]
    if option == "--bpw":
        enough = SizeBudget(bits_per_weight=float(size))
        less = SizeBudget(bits_per_weight=float(size) - 0.011)
    else:
        field = {"--fit": "card", "--fit-ram": "host", "--size": "weights"}[option]
        enough = replace(budget, **{field: parse_bytes(size, option)})
        less = replace(budget, **{field: parse_bytes(size, option) - (1 << 20) - 1})
    best_allocation(found, max(left_for_linears(enough, shape).values()))
    with pytest.raises(MemoryBudgetError):
        left_for_linears(less, shape)


@pytest.mark.parametrize("context", [0, -5, 8193])
def test_a_context_that_the_model_lacks_is_refused(context: int, shape: ModelShape) -> None:
    with pytest.raises(InvalidRequestError, match="has 8192 positions"):
        left_for_linears(SizeBudget(card=12 * GIB, context=context), shape)


def test_contradictory_budgets_are_refused() -> None:
    for fields in ({}, {"card": 1, "weights": 1}, {"bits_per_weight": 1.5}, {"weights": 1, "context": 5}):
        with pytest.raises(RecipeError):
            SizeBudget(**fields)


@pytest.mark.parametrize(
    "budget, text",
    [
        (SizeBudget(card=12 * GIB), "--fit 12GiB"),
        (SizeBudget(host=1536 << 20, context=512), "--fit-ram 1536MiB --context 512"),
        (SizeBudget(weights=12345), "--size 12345"),
        (SizeBudget(bits_per_weight=3.5), "--bpw 3.5"),
    ],
    ids=["card", "host", "weights", "bits"],
)
def test_the_label_is_the_option(budget: SizeBudget, text: str) -> None:
    assert budget.label() == text


@pytest.mark.parametrize("gib", [8, 12, 15])
def test_the_plan_offers_what_fit_would_make(
    starchat: Path, shape: ModelShape, gib: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path))
    plan = plan_for(ModelRequest(str(starchat), vram=gib * GIB, ram=64 * GIB), named_card=True)
    mixed = next(o for o in plan.possible if "mixed" in o.candidate.label)
    assert mixed.candidate.command == f"lowmem convert {starchat} --fit {gib}GiB --context 8192"
    assert mixed.fits and 0.995 * gib * GIB <= mixed.need.total <= gib * GIB
    uniform = max((o.candidate.bits for o in plan.possible if o.fits and o is not mixed), default=0)
    assert mixed.candidate.bits > uniform
    assert " would be better and fit: make it with lowmem convert" in plan.reason and "mixed" in plan.reason


def test_no_mixture_where_8_bits_fit(starchat: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path))
    plan = plan_for(ModelRequest(str(starchat), vram=24 * GIB, ram=64 * GIB), named_card=True)
    assert not any("mixed" in option.candidate.label for option in plan.possible)


def test_resized_changes_only_packed_tensors(shape: ModelShape) -> None:
    made, probe = resized(shape, 7 * GIB), as_converted(shape, 4)
    assert abs(sum(t.nbytes for t in made.tensors if t.packed) - 7 * GIB) < 1000
    assert [replace(t, nbytes=0) for t in made.tensors] == [replace(t, nbytes=0) for t in probe.tensors]


@pytest.fixture(scope="module")
def cards() -> dict[str, dict[str, object]]:
    return starchat_fit.made_to_fit()


def test_what_cards_get_is_the_golden_table(cards: dict[str, dict[str, object]]) -> None:
    """`python -m lowmem.benchmarks.experiments.starchat.fit --write` renews the file."""
    golden = json.loads(starchat_fit.RESULT.read_text(encoding="utf-8"))
    assert json.loads(json.dumps(cards)) == golden


def test_the_guide_has_the_table(cards: dict[str, dict[str, object]]) -> None:
    assert starchat_fit.markdown(cards) in (REPO / "docs" / "convert.md").read_text(encoding="utf-8")


def test_8_bits_take_the_largest_group(found: Sensitivities) -> None:
    """Smaller groups would cost memory and time for a gain below that of 16-bit arithmetic."""
    allocation = best_allocation(found, 1 << 60)
    assert {format.label for format in allocation.linears.values()} == {"8-bit g128"}
    odd = starchat_fit.made_up_sensitivities({"a": (576, 64), "b": (128, 64)})
    labels = {name: format.label for name, format in best_allocation(odd, 1 << 60).linears.items()}
    assert labels == {"a": "8-bit g64", "b": "8-bit g128"}
