"""Repacking weights while a model answers changes no bit of what it computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowmem.chat.chat import Chat
from lowmem.chat.conversation import ChatState
from lowmem.chat.repl import talk
from lowmem.config import SamplingParams
from lowmem.generate import repacking
from lowmem.generate.engine import Engine
from lowmem.generate.repacking import Repacking
from lowmem.kernels.native import library as native
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.loading.loader import LoadedModel, load
from lowmem.session import Session
from tests.chat.chat_helpers import terminal_console
from tests.helpers import TINY_STARCHAT
from tests.rtn_helpers import write_rtn_checkpoint

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repacking") / "4bit"
    model = AutoModelForCausalLM.from_pretrained(TINY_STARCHAT, dtype=torch.float32)
    write_rtn_checkpoint(model, folder, bits=4, group_size=128)
    return folder


@pytest.fixture
def loaded(folder: Path) -> LoadedModel:
    return load(folder)


def linears(loaded: LoadedModel) -> Iterator[QuantLinear]:
    return (m for m in loaded.model.modules() if isinstance(m, QuantLinear))


def in_tiles(loaded: LoadedModel) -> list[bool]:
    return [m.packed is not None and bool(m.packed.struct.tiled) for m in linears(loaded)]


def test_every_mapped_linear_is_repacked_and_computes_the_same_bits(loaded: LoadedModel) -> None:
    work = Repacking(loaded.model)
    assert len(work) == len(list(linears(loaded))) > 0
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        before = loaded.model(input_ids=ids).logits
        work.run(0.0)
        assert len(work) == len(in_tiles(loaded))
        work.finish()
        after = loaded.model(input_ids=ids).logits
    assert not work and all(in_tiles(loaded))
    assert torch.equal(before, after)
    assert not Repacking(loaded.model)


def test_the_weights_can_still_be_read_in_the_files_order(loaded: LoadedModel) -> None:
    """The pages are forgotten, and come again from the file."""
    linear = next(linears(loaded))
    before = linear.dequantize()
    Repacking(loaded.model).finish()
    assert torch.equal(linear.dequantize(), before)


def test_short_memory_leaves_everything_as_it_is(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repacking, "host_memory_available", lambda: 1 << 20)
    work = Repacking(loaded.model)
    work.finish()
    assert not work and not any(in_tiles(loaded))


def test_memory_that_ran_out_meanwhile_ends_it_and_a_fault_is_told(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), ValueError("x")):

        def fail(linear: QuantLinear, error: Exception = error) -> bool:
            raise error

        monkeypatch.setattr(QuantLinear, "use_tiled_layout", fail)
        work = Repacking(loaded.model)
        if isinstance(error, ValueError):
            with pytest.raises(ValueError, match="x"), work.in_background():
                pass
        else:
            work.run_one()
        assert not work and not any(in_tiles(loaded))


def test_it_goes_on_while_somebody_types_and_stops_with_that(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end waits for the linear that has been begun, and nothing happens after it."""
    work = Repacking(loaded.model)
    count = len(work)
    begun, typed = threading.Event(), threading.Event()
    use_tiled_layout = QuantLinear.use_tiled_layout

    def slowly(linear: QuantLinear) -> bool:
        begun.set()
        assert typed.wait(60)
        return use_tiled_layout(linear)

    monkeypatch.setattr(QuantLinear, "use_tiled_layout", slowly)
    with pytest.raises(KeyboardInterrupt), work.in_background():
        assert begun.wait(60)
        threading.Timer(0.2, typed.set).start()
        raise KeyboardInterrupt  # Ctrl-C at the prompt
    assert len(work) == count - 1 == count - sum(in_tiles(loaded))
    with work.in_background():
        while work:
            time.sleep(0.01)
    assert all(in_tiles(loaded))
    with work.in_background():
        assert not any(t.name.startswith("repacking") for t in threading.enumerate())


def test_a_chat_has_all_done_while_the_first_question_is_typed(folder: Path) -> None:
    session = Session(load(folder), context=64)

    class Reader:
        def read(self) -> str:
            while session.engine.repacking:
                time.sleep(0.01)
            raise EOFError

    console, _ = terminal_console()
    assert session.engine.repacking
    assert talk(Chat(session, console, ChatState()), Reader()) == 0
    assert all(in_tiles(session.loaded))


def test_an_answer_repacks_the_model_and_is_the_same(folder: Path) -> None:
    params = SamplingParams(max_new_tokens=24, temperature=0.0)
    prompt = [3, 17, 240, 9, 77]
    answers = []
    for first in (False, True):
        loaded = load(folder)
        engine = Engine(loaded.model, context=64)
        if first:
            engine.repacking.finish()
            assert all(in_tiles(loaded))
        answers.append([token.id for token in engine.generate(prompt, params)])
        assert all(in_tiles(loaded))
    assert answers[0] == answers[1]
