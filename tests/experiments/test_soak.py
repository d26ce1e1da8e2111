"""Hundreds of turns and resets leave nothing behind, and the soak benchmark sees what does."""

from __future__ import annotations

import os
import platform
import random
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from lowmem.benchmarks.common.records import Machine, Origin
from lowmem.benchmarks.experiments.common import write
from lowmem.benchmarks.experiments.endurance.soak import (
    SHOWN,
    SOAK,
    Soak,
    Watch,
    Watched,
    main,
    render,
    trend_of,
)
from lowmem.benchmarks.experiments.endurance.soak_worker import (
    Census,
    SessionRound,
    rebuild_interned,
    take_census,
)
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem.chat.chat import Chat
from lowmem.chat.conversation import ChatState
from lowmem.chat.markdown import THEME
from lowmem.chat.repl import talk
from lowmem.chat.view import TerminalView
from lowmem.config import SamplingParams
from lowmem.generate.prefix_store import PrefixStore
from lowmem.loading.loader import LoadedModel, load
from lowmem.session import Session
from tests.helpers import save_source, tiny_model

WARM, ROUNDS = 2, 5  # rounds before the first count, and between it and the second
TURNS = 20  # of a round


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("soak")
    return load(save_source(tiny_model("gpt_bigcode_mqa", layers=1, positions=128), folder))


def grown(round_of: Callable[[], None]) -> dict[str, float]:
    """What a round leaves behind when WARM rounds have filled every cache; all rounds are the same.

    The median of ROUNDS: a leak is in each of them, while what a library, or another test before this one,
    does once in a process's life is in one.
    """
    for _ in range(WARM):
        round_of()
    found = [figures()]
    for _ in range(ROUNDS):
        round_of()
        found.append(figures())
    return {name: median(b[name] - a[name] for a, b in pairwise(found)) for name in found[0]}


def figures() -> dict[str, int]:
    """Those of a census that are the same every time; without its names of types, which take memory too."""
    found = asdict(take_census())
    assert found["tensors"] > 10 and found["tensor_bytes"] > 0 and found["anonymous"] > 0
    names = ("objects", "blocks", "tensors", "tensor_bytes", "cached", "descriptors", "threads")
    return {name: found[name] for name in names}


def assert_flat(found: dict[str, float]) -> None:
    """Not one object in ten turns, and no tensor, descriptor or thread at all.

    Blocks are of numbers and strings too, which caches of libraries gather for some rounds more.
    """
    slack = {"objects": TURNS // 10, "blocks": 5 * TURNS}
    assert all(amount <= slack.get(name, 0) for name, amount in found.items()), found


def session_rounds(loaded: LoadedModel, folder: Path) -> Callable[[], None]:
    session = Session(loaded)
    session.engine.store = PrefixStore(64 << 10)

    def once() -> None:
        SessionRound(session, folder, random.Random(3), new_tokens=4).run(TURNS)

    return once


def test_turns_and_resets_of_a_session_leave_nothing(loaded: LoadedModel, tmp_path: Path) -> None:
    assert_flat(grown(session_rounds(loaded, tmp_path)))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how malloc keeps freed pages is glibc's")
def test_pages_that_were_freed_between_blocks_that_live_on_are_given_back_after_an_answer(
    loaded: LoadedModel,
) -> None:
    session, params = Session(loaded), SamplingParams(max_new_tokens=4)
    session.complete("a question", params)
    blocks = [b"x" * (64 << 10) for _ in range(1024)]
    kept = take_census().anonymous
    del blocks[::2]
    assert kept - take_census().anonymous < 4 << 20  # freed, and still with the process
    session.complete("a question", params)
    assert kept - take_census().anonymous > 24 << 20
    assert len(blocks) == 512  # the others live on


def test_what_is_kept_is_seen() -> None:
    """The count itself: of tensors, their bytes, blocks, descriptors and threads."""
    kept: list[Any] = []
    ended = threading.Event()

    def leak() -> None:
        thread = threading.Thread(target=ended.wait)
        thread.start()
        kept.extend((torch.zeros(100), [f"{number} of many" for number in range(1000)], thread))
        kept.append(open(os.devnull, "rb"))  # noqa: SIM115

    tensors = [torch.zeros(2) for _ in range(11)]
    # Tensors without a storage, which other parts of a process may have, do not cause an error.
    with FakeTensorMode():
        bare = [torch.zeros(2)]
    bare += [torch._to_functional_tensor(torch.zeros(2)), torch.zeros(2).to_sparse()]
    bare.append(torch.zeros(2, device="meta"))
    try:
        found = grown(leak)
    finally:
        ended.set()
        for thing in kept:
            if isinstance(thing, threading.Thread):
                thing.join()
            elif isinstance(thing, BufferedReader):
                thing.close()
    assert (len(tensors), len(bare)) == (11, 4)
    assert (found["tensors"], found["tensor_bytes"]) == (1, 400)
    assert (found["descriptors"], found["threads"]) == (1, 1)
    assert found["blocks"] > 1000
    with pytest.raises(AssertionError):
        assert_flat(found)


def test_interned_strings_that_come_and_go_take_no_more_once_their_table_is_rebuilt() -> None:
    rebuild_interned()
    before = take_census().heap
    for number in range(100_000):
        sys.intern(f"another {number}")
    assert take_census().heap - before < 1 << 20


class _Interrupting(TerminalView):
    """Ctrl-C comes with every third piece."""

    pieces = 0

    def push(self, text: str) -> None:
        super().push(text)
        type(self).pieces += 1
        if self.pieces % 3 == 0:
            os.kill(os.getpid(), signal.SIGINT)


class _Script:
    """The same lines in every round."""

    def __init__(self, lines: list[str | type[BaseException]]) -> None:
        self._lines = iter(lines)

    def read(self) -> str:
        line = next(self._lines, EOFError)
        if isinstance(line, str):
            return line
        raise line


@pytest.mark.slow
def test_turns_and_resets_of_a_chat_leave_nothing(loaded: LoadedModel, tmp_path: Path) -> None:
    """Drawn as at a terminal, stopped in the middle, taken back, saved, loaded, refused and left out."""
    session, file = Session(loaded), tmp_path / "talk.json"
    with open(os.devnull, "w", encoding="utf-8") as sink:
        console = Console(
            file=sink, force_terminal=True, width=80, theme=THEME, highlight=False, markup=False, emoji=False
        )
        lines: list[str | type[BaseException]] = [
            *("a question", "another `one`", "/undo", "/retry", KeyboardInterrupt, "// a comment"),
            *("/context", "/stats", f"/save {file}", "/system Be brief.", "and on", f"/load {file}"),
            *("/set stop e a", "many words " * 30, "a question", "/set stop none", "word " * 500, "/rety"),
            *("/system none", "/reset"),
        ]
        assert len(lines) == TURNS

        def once() -> None:
            _Interrupting.pieces = 0
            chat.params = SamplingParams(max_new_tokens=8, seed=1)
            assert talk(chat, _Script(lines)) == 0

        chat = Chat(session, console, ChatState(), view=_Interrupting)
        found = grown(once)
        assert chat.answers > 5 * (WARM + ROUNDS) and _Interrupting.pieces > 9
    assert_flat(found)


def census(number: int, **figures: Any) -> dict[str, Any]:
    noise = random.Random(number).randrange(1 << 20)
    steady = dict.fromkeys(Census.__dataclass_fields__, 5) | {"anonymous": (400 << 20) + noise, "types": {}}
    return {**steady, "kept": 0, **figures}


MINUTES = [number / 4 for number in range(240)]


def judge(
    counts: list[dict[str, Any]], name: str = "x", wrong: tuple[str, ...] = (), **turns: int
) -> Watched:
    return Watch(name, MINUTES[: len(counts)], counts, list(wrong)).judge(turns)


def test_noise_is_flat_and_a_leak_is_not() -> None:
    steady = [census(number) for number in range(240)]
    assert judge(steady).faults == ()
    # 5 MiB an hour beneath 1 MiB of noise, and the type of what leaks is named.
    leaking = [
        census(n, types={"builtins.list": 7 + n, "builtins.set": 3}) | {"anonymous": value}
        for n, value in enumerate(count["anonymous"] + n * (5 << 20) // 240 for n, count in enumerate(steady))
    ]
    watched = judge(leaking)
    assert len(watched.faults) == 1 and watched.faults[0].startswith("anonymous may rise by 5 MiB")
    assert watched.growing == (("builtins.list", 120),)
    assert {t.figure: t for t in watched.trends}["anonymous"].slope == pytest.approx(5 << 20, rel=0.2)


def test_what_filled_in_the_first_quarter_is_no_leak() -> None:
    filling = [census(n, heap=min(n, 60) << 20) for n in range(240)]
    assert judge(filling).faults == ()


@pytest.mark.parametrize("figure", ["descriptors", "threads"])
def test_one_descriptor_or_thread_more_is_a_leak(figure: str) -> None:
    counts = [census(n, **{figure: 6 if n > 200 else 5}) for n in range(240)]
    assert judge(counts).faults == (f"{figure} are 6, and were 5 in the second quarter",)


def test_what_went_wrong_is_a_fault_and_few_samples_are_no_judgement() -> None:
    counts = [census(n) for n in range(5)]
    watched = judge(counts, wrong=("it ended with 1",), ask=3)
    assert watched.faults == ("it ended with 1", "5 samples are too few to judge") and not watched.trends


def test_neighbours_that_move_together_count_for_less() -> None:
    """Alternating residuals are independent at best; those that wander are fewer than they look."""
    wave = [float(n // 30 % 2) for n in range(240)]
    flicker = [float(n % 2) for n in range(240)]
    slow, fast = trend_of("x", MINUTES, wave), trend_of("x", MINUTES, flicker)
    assert slow.correlation > 0.8 and fast.correlation == 0.0
    assert slow.error > 4 * fast.error


def test_a_record_is_written_read_and_shown(tmp_path: Path) -> None:
    watched = judge([census(n) for n in range(240)], "terminal", ask=9)
    origin = Origin("python", "2026-01-01", Machine("c", (), 2, 1, "cpu", 0), (), "m", "", 0.5)
    record = Soak(origin, "AVX2", 512, 60.0, 240, SHOWN, (("anonymous", 1.0),), (watched,))
    write(record, tmp_path / "soak.json")
    assert len((tmp_path / "soak.json").read_text().splitlines()) < 240 + 80  # a sample a line
    assert SOAK.read(tmp_path / "soak.json") == record
    assert record.watched[0].samples[7][1 + SHOWN.index("anonymous")] == census(7)["anonymous"]
    assert (
        record.passed and "terminal: 9 turns (9 ask)" in render(record) and "| anonymous |" in render(record)
    )


def test_the_committed_record_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--show"]) == 0
    assert "session: 18840 turns" in capsys.readouterr().out
