"""The planner's promises, over made-up models and budgets: more never gives worse, nothing is exceeded."""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lowmem.checkpoint.formats import LinearFormat, QuantizationFormat
from lowmem.checkpoint.packing import stored_shapes
from lowmem.errors import MemoryBudgetError
from lowmem.kernels.contract import LinearSpec
from lowmem.plan.candidates import Candidate, by_bits, convertible, ranked, with_spare_heads
from lowmem.plan.device import parse_bytes
from lowmem.plan.memory import HOST_CONTEXT, Form, need_of_split, need_on_device
from lowmem.plan.planner import Budget, Option, Plan, make_plan
from lowmem.plan.shape import ModelShape, Tensor, as_converted, as_stored

GIB = 1 << 30


def shape_of(layers: int = 4, hidden: int = 512, heads: int = 8, kv_heads: int = 8) -> ModelShape:
    """A float16 model of gpt_bigcode's layout."""
    linears = ((hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden))
    tensors = [Tensor("wte.weight", (4096, hidden), 4096 * hidden * 2, -1, False, False)]
    for layer in range(layers):
        for number, (inputs, outputs) in enumerate(linears):
            name = f"h.{layer}.{number}.weight"
            tensors.append(Tensor(name, (outputs, inputs), 2 * inputs * outputs, layer, False, True))
    return ModelShape(
        model_type="made-up",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocab=4096,
        positions=8192,
        stored="float16",
        tensors=tuple(tensors),
        linears=tuple(LinearSpec(inputs, outputs) for inputs, outputs in linears),
        format=None,
        kv_values=2 * layers * kv_heads * hidden // heads,
        learned_positions=0,
    )


def forms_of(shape: ModelShape, bits: list[int], klds: dict[int, float] | None = None) -> list[Candidate]:
    """The published form, both of bitsandbytes, and converted ones of the given bits; ranked."""
    path = Path("model")
    found = [
        Candidate("float16", 16, Form("dense", "float16"), path, shape),
        Candidate("int8 bnb", 8, Form("int8", "float16"), path, shape),
        Candidate("NF4 bnb", 4, Form("nf4", "float16"), path, shape),
    ]
    for width in bits:
        found.append(
            Candidate(
                f"{width}-bit",
                width,
                Form("gptq", "float16"),
                path / str(width),
                as_converted(shape, width),
                (klds or {}).get(width),
            )
        )
    return ranked(found)


SHAPES = st.builds(
    shape_of,
    layers=st.integers(2, 6),
    hidden=st.sampled_from([128, 512, 2048]),
    kv_heads=st.sampled_from([1, 8]),
)
BITS = st.lists(st.sampled_from([8, 4, 3, 2]), unique=True)
MEMORY = st.integers(1 << 20, 8 * GIB)
CONTEXTS = st.sampled_from([128, 2048, 8192])


def plan_or_none(forms: list[Candidate], budget: Budget, context: int) -> Plan | None:
    try:
        return make_plan(forms, budget, context)
    except MemoryBudgetError:
        return None


def spared(forms: list[Candidate], spare: bool) -> list[Candidate]:
    """With 8-bit heads `only_to_fit`, as for a card without a wish, or as they are."""
    return with_spare_heads(forms) if spare else forms


def worth(plan: Plan | None, forms: list[Candidate]) -> tuple[int, ...]:
    """How good a plan is, as the planner's docstring puts it: larger is better."""
    if plan is None:
        return (0,)
    chosen = plan.chosen
    rank = -forms.index(chosen.candidate)
    if chosen.device == "card" or plan.budget.card is None:
        return (4, rank)
    if chosen.device == "cpu":
        return (1, rank)
    if 2 * chosen.cpu_layers <= chosen.candidate.shape.layers:
        return (3, rank)
    assert chosen.host is not None
    return (2, -chosen.host.weights)


@settings(max_examples=150, deadline=None)
@given(shape=SHAPES, bits=BITS, host=MEMORY, card=st.none() | MEMORY, more=MEMORY, spare=st.booleans())
def test_more_memory_never_gives_a_worse_plan(
    shape: ModelShape, bits: list[int], host: int, card: int | None, more: int, spare: bool
) -> None:
    forms, context = spared(forms_of(shape, bits), spare), 2048
    before = worth(plan_or_none(forms, Budget("d", host, card), context), forms)
    assert worth(plan_or_none(forms, Budget("d", host + more, card), context), forms) >= before
    if card is not None:
        assert worth(plan_or_none(forms, Budget("d", host, card + more), context), forms) >= before


@settings(max_examples=150, deadline=None)
@given(shape=SHAPES, bits=BITS, host=MEMORY, card=st.none() | MEMORY, context=CONTEXTS, spare=st.booleans())
def test_a_plan_never_exceeds_the_budget(
    shape: ModelShape, bits: list[int], host: int, card: int | None, context: int, spare: bool
) -> None:
    """Recomputed here from the chosen form, not read off the plan; the fallbacks and contexts too."""
    budget = Budget("d", host, card, own_context=100 << 20)
    plan = plan_or_none(spared(forms_of(shape, bits), spare), budget, context)
    assume(plan is not None)
    assert plan is not None
    for option in (plan.chosen, *plan.fallbacks):
        for tokens in {context, option.longest}:
            assert fits(option, budget, tokens), (option.device, tokens)
        if option.longest < 8192:
            assert not fits(option, budget, option.longest + 1)


def fits(option: Option, budget: Budget, context: int) -> bool:
    shape, form = option.candidate.shape, option.candidate.form
    if option.device == "split":
        on_card, on_host = need_of_split(
            shape, form, context, shape.layers - option.cpu_layers, own_context=budget.own_context
        )
        return on_card.total <= (budget.card or 0) and on_host.total <= budget.host
    if option.device == "card":
        need = need_on_device(shape, form, context, cuda=True, own_context=budget.own_context)
        return need.total <= (budget.card or 0)
    return need_on_device(shape, form, context, cuda=False, own_context=HOST_CONTEXT).total <= budget.host


@settings(max_examples=100, deadline=None)
@given(
    shape=SHAPES,
    bits=BITS,
    host=st.integers(1 << 20, GIB),
    card=st.none() | MEMORY,
    context=CONTEXTS,
    spare=st.booleans(),
)
def test_a_refusal_names_the_least_that_would_do(
    shape: ModelShape, bits: list[int], host: int, card: int | None, context: int, spare: bool
) -> None:
    """With what is named a plan is found; with 1 MiB less, none."""
    forms = spared(forms_of(shape, bits), spare)
    budget = Budget("d", host, card)
    with_error = None
    try:
        make_plan(forms, budget, context)
    except MemoryBudgetError as error:
        with_error = str(error)
    assume(with_error is not None)
    named = [
        parse_bytes(size, "named") for size in re.findall(r"(\d+MiB) (?:\(|of memory)", with_error or "")
    ]
    if card is None:
        (ram,) = named
    else:
        vram, ram = named
        assert plan_or_none(forms, replace(budget, card=vram), context)
        assert not plan_or_none(forms, replace(budget, card=vram - (1 << 20)), context)
    assert plan_or_none(forms, replace(budget, host=ram), context)
    if card is None:
        assert not plan_or_none(forms, replace(budget, host=ram - (1 << 20)), context)


def test_the_best_that_fits_whole_comes_before_layers_on_the_cpu() -> None:
    forms = forms_of(shape_of(hidden=2048), [4, 2])
    sizes = {c.label: need_on_device(c.shape, c.form, 2048, cuda=True).total for c in forms}
    enough_for_4 = Budget("card", 64 * GIB, sizes["4-bit"])
    assert make_plan(forms, enough_for_4, 2048).chosen.candidate.label == "4-bit"
    less = Budget("card", 64 * GIB, min(sizes.values()) - 1)
    chosen = make_plan(forms, less, 2048).chosen
    assert chosen.device == "split" and 0 < chosen.cpu_layers < 4
    nothing = make_plan(forms, Budget("card", 64 * GIB, 1 << 20), 2048).chosen
    assert (nothing.device, nothing.candidate.label) == ("cpu", "float16")


def test_a_measured_divergence_decides_where_there_is_one() -> None:
    """3 bits measured better than 4 change places; what was not measured keeps its place."""
    labels = [c.label for c in forms_of(shape_of(), [8, 4, 3, 2], {4: 0.02, 3: 0.01})]
    assert labels == ["float16", "8-bit", "int8 bnb", "3-bit", "NF4 bnb", "4-bit", "2-bit"]
    plain = [c.label for c in forms_of(shape_of(), [8, 4, 3, 2])]
    assert plain == ["float16", "8-bit", "int8 bnb", "4-bit", "NF4 bnb", "3-bit", "2-bit"]


def test_what_a_conversion_would_give_is_told() -> None:
    shape = shape_of(hidden=2048)
    forms = forms_of(shape, [])
    possible = convertible("owner/name", forms, cuda=True)
    assert [c.bits for c in possible] == [8, 4, 3, 2]
    two = possible[-1]
    budget = Budget("card", 1 << 20, need_on_device(two.shape, two.form, 512, cuda=True).total)
    with pytest.raises(MemoryBudgetError, match="lowmem convert owner/name --bits 2"):
        make_plan(forms, budget, 512, possible)
    roomy = Budget("card", 64 * GIB, budget.card)
    assert "lowmem convert owner/name --bits 2" in make_plan(forms, roomy, 512, possible).reason
    assert "lowmem convert" not in make_plan(forms, Budget("card", 64 * GIB, 64 * GIB), 512, possible).reason


def test_ceiling_is_bytes_over_bandwidth() -> None:
    """Each weight once; layers on the CPU at the CPU's pace."""
    shape = shape_of(hidden=2048)
    forms = forms_of(shape, [])[:1]
    dense = sum(t.numel * 2 for t in shape.tensors)
    plan = make_plan(forms, Budget("cpu", 64 * GIB, host_bandwidth=1e10), 512)
    assert plan.chosen.ceiling == pytest.approx(1e10 / dense)
    whole = need_on_device(shape, forms[0].form, 512, cuda=True)
    plan = make_plan(forms, Budget("card", 64 * GIB, whole.total - 1, 0, 1e10, 1e11), 512)
    assert plan.chosen.cpu_layers == 1
    layer = sum(t.numel * 2 for t in shape.tensors if t.layer == 3)
    assert plan.chosen.ceiling == pytest.approx(1 / ((dense - layer) / 1e11 + layer / 1e10))


def test_groups_and_words_of_a_conversion() -> None:
    """576 inputs are not a multiple of 128, so groups have 64 inputs, as in the converter."""
    shape = replace(shape_of(), linears=(LinearSpec(576, 576), LinearSpec(512, 576)))
    assert as_converted(shape, 4).format == QuantizationFormat(LinearFormat(4, 64))
    assert as_converted(shape_of(), 3).format == QuantizationFormat(LinearFormat(3, 128))


def test_order_without_measurements_is_by_bits() -> None:
    forms = forms_of(shape_of(), [8, 4])
    assert forms == sorted(forms, key=by_bits)


def test_a_mixture_is_as_large_as_its_linears() -> None:
    """Every linear by its own format; those in 16 bits stay as they are, and the bits are an average."""
    source = shape_of()
    names = [tensor.name.removesuffix(".weight") for tensor in source.tensors if tensor.linear]
    three, eight = LinearFormat(3, 64), LinearFormat(8, -1, sym=False)
    mixed = as_stored(source, LinearFormat(4, 128), {names[0]: three, names[1]: eight, names[2]: None})
    alike = as_converted(source, 4)
    expected = [tensor for tensor in alike.tensors if tensor.name.removesuffix(".qweight") not in names[:3]]
    found = {tensor.name.rpartition(".")[0]: tensor for tensor in mixed.tensors}
    assert [tensor for tensor in mixed.tensors if tensor in expected] == expected
    for name, format in ((names[0], three), (names[1], eight)):
        out, columns = next(t.shape for t in source.tensors if t.name == f"{name}.weight")
        shapes = stored_shapes(columns, out, format.bits, format.group_size)
        words = prod(shapes.qweight) + prod(shapes.qzeros) + columns
        assert found[name].nbytes == 4 * words + 2 * prod(shapes.scales) and found[name].packed
    assert found[names[2]] == next(t for t in source.tensors if t.name == f"{names[2]}.weight")
    assert (
        mixed.format is not None and mixed.format.of(names[1]) == eight and mixed.format.of(names[2]) is None
    )
    assert mixed.format.label == "3/4/8-bit mixed"
    sizes = [tensor.numel for tensor in source.tensors if tensor.linear]
    assert mixed.linear_weights == sum(sizes) and alike.bits == 4 and source.bits == 16
    inputs = next(t.shape[1] for t in source.tensors if t.name == f"{names[1]}.weight")
    # A float16 scale and a zero-point of the weights' width for each group.
    widths = [3 + 19 / 64, 8 + 24 / inputs, 16] + [4 + 20 / 128] * (len(sizes) - 3)
    average = sum(size * bits for size, bits in zip(sizes, widths, strict=True)) / sum(sizes)
    assert mixed.bits == round(average, 2)
