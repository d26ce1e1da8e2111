"""On a card, the host does not wait for the device inside the loops of the conversion's arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowmem.convert.math import gptq, hessian, products
from lowmem.convert.math.grid import find_grid
from lowmem.convert.stages import capture

from lowmem.config import QuantConfig
from tests.pretended_card import OnCard, PretendedCard

CONFIGS = [
    QuantConfig(bits=4, group_size=32),
    QuantConfig(bits=3, group_size=32, sym=False, desc_act=True),
    QuantConfig(bits=2, group_size=32, passes=0),
    QuantConfig(bits=8, group_size=-1, sym=False),
]


def problem(n: int, out: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """H [n, n], W^T [n, out] and Y^T [n, out]."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(2 * n, n, generator=generator) * torch.rand(n, generator=generator)
    weight, wanted = (torch.randn(n, out, generator=generator) for _ in range(2))
    return x.T @ x / len(x), weight, 0.01 * wanted


def waits_of(run: Callable[[], Any]) -> tuple[list[str], Any]:
    with PretendedCard() as card:
        result = run()
    return card.waits, result


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.bits} bits")
def test_no_column_waits_for_the_device(config: QuantConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear's whole rounding waits once, for its error, however many columns it has."""
    monkeypatch.setattr(products, "ours", lambda *tensors: False)  # torch's code, as on a card
    monkeypatch.setattr(gptq, "FAR_BLOCK", 32)
    monkeypatch.setattr(gptq, "WIDEST", 48)
    monkeypatch.setattr(hessian, "PANEL", 32)
    for n in (64, 96):
        h, weight, wanted = problem(n)
        expected = gptq.quantize(
            weight.clone(), gptq.prepare(h.clone(), config), config, wanted=wanted.clone()
        )
        with PretendedCard() as card:
            prepared = gptq.prepare(OnCard(h), config)
            before = len(card.taken())
            found = gptq.quantize(OnCard(weight), prepared, config, 16, OnCard(wanted))
            assert len(card.taken()) == 1
        assert before <= 6
        for name in ("codes", "scales", "zeros"):
            made = getattr(found, name)
            assert isinstance(made, OnCard) and torch.equal(made.values, getattr(expected, name))
        assert found.squared_error == pytest.approx(expected.squared_error, rel=1e-5)


def test_no_panel_of_the_factor_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt waits once, also where it fails; the next one starts from the same H."""
    monkeypatch.setattr(products, "ours", lambda *tensors: False)
    monkeypatch.setattr(hessian, "PANEL", 16)
    h, _, _ = problem(128)
    waits, passed = waits_of(lambda: hessian._reverse_cholesky(OnCard(h.clone())))
    assert passed and len(waits) == 1
    h[100, 100] = h[40, 40] = -1.0  # in the first panel that is factored, and in a later one
    h[7, 3] = h[3, 7] = 3.0
    expected = hessian.factor_in_place(h.clone(), 0.01)
    waits, found = waits_of(lambda: hessian.factor_in_place(OnCard(h.clone()), 0.01))
    assert found.damping == expected.damping > 0.01
    assert torch.equal(found.matrix.values, expected.matrix)


def test_grids_and_sums_do_not_wait() -> None:
    h, weight, _ = problem(128)
    total = hessian.Hessian(128, torch.device("meta"))

    def run() -> None:
        total.sum = OnCard(torch.zeros(128, 128))
        total.add(OnCard(weight.T.contiguous()))
        find_grid(OnCard(weight), OnCard(h.diagonal().clone()), 4, False)
        capture._energy(OnCard(weight.T.contiguous()), OnCard(h))

    assert waits_of(run)[0] == []
