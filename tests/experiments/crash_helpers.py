"""Processes of their own for trials that kill them."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def spawner():
    """Processes that have the libraries loaded already, so that a fault falls into the work."""
    with pytest.MonkeyPatch.context() as patch:
        # The server is a process of its own, and passes over what it cannot import.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent.parent))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.chat.preload"])
        yield context
