"""Settings that all tests share."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():  # Triton's interpreter, which runs our kernels for cards on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.chromium import browser  # noqa: F401  (a fixture)
from tests.experiments.crash_helpers import spawner  # noqa: F401  (a fixture)

# The matrices of tests are tiny: a second thread costs more than it saves, above all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed_random_numbers():
    """Seed every test, so that its random numbers do not depend on the tests before it."""
    torch.manual_seed(0)
