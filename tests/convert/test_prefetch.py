"""A layer that is read ahead gives the same bytes, and is read while the one before is computed.

The stream is a recorder: a card's own stream and its copies are not tested here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lowmem.convert import pipeline
from lowmem.convert.memory_plan import MemoryPlan
from lowmem.convert.stages.context import LayerContext
from lowmem.convert.stages.quantize import RoundLinear

from lowmem.checkpoint.source.open import open_source
from lowmem.config import QuantConfig
from lowmem.models.architecture import inspect
from lowmem.streaming.prefetch import Prefetch, StreamLane
from lowmem.streaming.weights import ModelWeights
from tests.convert.convert_helpers import digest_of, quick_convert
from tests.convert.test_memory import starchat_plan
from tests.helpers import save_source, tiny_model

LAYERS = 3


class Recorder:
    """`prefetch.Lane` on the CPU: what a second stream is asked for, in order."""

    def __init__(self, fails_at: int = -1) -> None:
        self.events: list[str] = []
        self.threads: set[str] = set()
        self.fails_at = fails_at

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if len(self.events) == self.fails_at:
            raise RuntimeError("CUDA out of memory")
        self.events.append("copy")
        self.threads.add(threading.current_thread().name)
        return tensor.clone()

    def join(self, tensors: Iterable[torch.Tensor]) -> None:
        self.events.append(f"join {len(list(tensors))}")
        assert threading.current_thread() is threading.main_thread()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefetch") / "source"
    return save_source(tiny_model("gpt_bigcode_mqa", layers=LAYERS), folder, dtype=torch.float16)


def convert_with(lane: Recorder, source: Path, out: Path, patch: pytest.MonkeyPatch) -> None:
    """Convert with a plan that has room for a second layer."""
    real = pipeline.plan_memory

    def planned(*args: Any, **options: Any) -> MemoryPlan:
        return replace(real(*args, **options), prefetch=True)

    patch.setattr(pipeline, "plan_memory", planned)
    patch.setattr(pipeline, "StreamLane", lambda device: lane)
    quick_convert(source, out, QuantConfig(bits=4, group_size=32))


def test_the_bytes_are_the_same_and_reading_overlaps(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_convert(source, tmp_path / "plain", QuantConfig(bits=4, group_size=32))
    lane, begun = Recorder(), []
    real = RoundLinear.run

    def run(stage: RoundLinear, context: LayerContext) -> None:
        assert context.prefetch is not None
        if context.following is not None and context.following.name not in begun:
            begun.append(context.following.name)  # while this layer is computed, the next one is read
            assert context.prefetch._layer == context.following.name
        real(stage, context)

    monkeypatch.setattr(RoundLinear, "run", run)
    convert_with(lane, source, tmp_path / "ahead", monkeypatch)
    assert digest_of(tmp_path / "ahead") == digest_of(tmp_path / "plain")
    tensors = 12  # of a layer: four linears and two norms, with biases
    assert lane.events == ["copy"] * tensors + [f"join {tensors}"] + ["copy"] * tensors + [f"join {tensors}"]
    assert lane.threads == {"prefetch"} and len(begun) == LAYERS - 1


def test_a_prefetch_that_fails_leaves_reading_as_it_is(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card has less memory than it said: the layer is read when it is needed."""
    quick_convert(source, tmp_path / "plain", QuantConfig(bits=4, group_size=32))
    lane = Recorder(fails_at=3)
    convert_with(lane, source, tmp_path / "ahead", monkeypatch)
    assert digest_of(tmp_path / "ahead") == digest_of(tmp_path / "plain")
    assert lane.events == ["copy"] * 3


def test_only_the_layer_that_was_read_is_taken(source: Path) -> None:
    opened = open_source(str(source))
    arch = inspect(opened.config())
    lane = Recorder()
    prefetch = Prefetch(ModelWeights(opened, arch), torch.float32, lane)
    first, second, _ = arch.layers
    assert prefetch.take(first) is None
    prefetch.start(first)
    assert prefetch.take(second) is None
    prefetch.start(second)
    found = prefetch.take(second)
    assert found is not None and set(found) == set(arch.inside(second))
    assert all(tensor.dtype is torch.float32 for tensor in found.values())
    assert prefetch.take(second) is None
    prefetch.start(first)
    prefetch.close()
    assert prefetch.take(first) is None


class FakeStream:
    """`torch.cuda` and a stream of it, which note what they are asked for."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def Stream(self, device: torch.device) -> FakeStream:
        return self

    def stream(self, stream: FakeStream) -> FakeStream:
        return self

    def current_stream(self, device: torch.device) -> FakeStream:
        return self

    def __enter__(self) -> None:
        self.events.append("enter")

    def __exit__(self, *problem: object) -> None:
        self.events.append("exit")

    def synchronize(self) -> None:
        self.events.append("synchronize")

    def wait_stream(self, stream: FakeStream) -> None:
        self.events.append("wait")


def test_a_lane_copies_in_slices_and_lets_the_card_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, recorded = FakeStream(), []
    monkeypatch.setattr("torch.get_device_module", lambda device: fake)
    monkeypatch.setattr("torch.Tensor.record_stream", lambda tensor, stream: recorded.append(tensor))
    lane = StreamLane(torch.device("cpu"))
    lane._pinned = torch.empty(4096, dtype=torch.uint8)  # no card: not pinned
    given = [
        torch.randn(70, 50),
        torch.randn(70, 50).half().T,
        torch.arange(7),
        torch.tensor(1.5),
        torch.ones(3, dtype=torch.bool),
    ]
    copies = [lane.copy(tensor) for tensor in given]
    for tensor, copied in zip(given, copies, strict=True):
        assert torch.equal(copied, tensor) and copied.stride() == tensor.stride()
    assert fake.events.count("synchronize") == 4 + 0 + 1 + 1 + 1  # by tensor; 3,500 floats take four slices
    fake.events.clear()
    lane.join(copies)
    assert fake.events == ["wait"] and len(recorded) == len(copies)


def test_the_plan_counts_a_layer_that_is_read_ahead() -> None:
    """StarChat Alpha's layers have 728 MiB in bfloat16; a card without room for two gets the old plan."""
    roomy = starchat_plan(64 << 30, gpu=24 << 30)
    assert roomy.prefetch
    layer = 2 * 6144 * (6144 + 256 + 6144 + 2 * 24576)
    without = roomy.device_peak - layer
    tight = starchat_plan(64 << 30, gpu=without + layer // 2)
    assert not tight.prefetch
    assert tight.rows_at_a_time == roomy.rows_at_a_time and abs(tight.device_peak - without) < 1 << 20
    assert not starchat_plan(roomy.host_peak - 1, gpu=24 << 30).prefetch
