"""Every dependency has a wheel on every system and Python that README names."""

from __future__ import annotations

import pytest

from tests.compat.dependencies import PYTHONS, SYSTEMS, refusal, uv


@pytest.mark.slow
@pytest.mark.skipif(uv() is None, reason="no uv")
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_dependencies_have_wheels(system: str, python: str) -> None:
    assert refusal(system, python) == ""
