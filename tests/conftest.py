"""Settings that all tests share."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.chromium import browser  # noqa: F401  (a fixture)
from tests.experiments.crash_helpers import spawner  # noqa: F401  (a fixture)

# The matrices of tests are tiny: a second thread would only wait for the first, and badly so on a busy
# machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _random_numbers_of_its_own():
    """A test draws the same numbers whatever ran before it."""
    torch.manual_seed(0)
