"""Fixtures of the tests of decoding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lowmem.kernels.native import library as native


@pytest.fixture
def threads_as_they_were() -> Iterator[None]:
    """A test may set torch's threads; afterwards the library has as many as before."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    native.set_threads()
