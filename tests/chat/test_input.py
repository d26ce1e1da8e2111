"""Keys, pastes and history, with prompt_toolkit's pipe instead of a terminal."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit import utils
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import History, InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from lowmem.chat import commands, input
from lowmem.chat.input import CommandCompleter, Prompt, open_history

ENTER, ALT_ENTER, CTRL_C, CTRL_D, CTRL_J, CTRL_R, UP = "\r", "\x1b\r", "\x03", "\x04", "\n", "\x12", "\x1b[A"


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe:
        yield pipe


def prompt(keys: PipeInput, history: History | None = None) -> Prompt:
    return Prompt(
        history or InMemoryHistory(), commands.names(), commands.choices(), source=keys, target=DummyOutput()
    )


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (f"hello{ENTER}", "hello"),
        (f"a{ALT_ENTER}b{ENTER}", "a\nb"),
        (f"a{CTRL_J}b{ENTER}", "a\nb"),
        (f"a\\{ENTER}b{ENTER}", "a\nb"),
        (f"{ENTER}  {ENTER}x{ENTER}", "  x"),
        (f"\x1b[200~a\r\n  b\n\n/exit\x1b[201~{ENTER}", "a\n  b\n\n/exit"),
        (f"gone{CTRL_C}kept{ENTER}", "kept"),
        (f"naïve 日本 😀{ENTER}", "naïve 日本 😀"),
        (f"a\\b{ENTER}", "a\\b"),
    ],
)
def test_what_is_typed_is_sent(keys: PipeInput, typed: str, message: str) -> None:
    keys.send_text(typed)
    assert prompt(keys).read() == message


@pytest.mark.parametrize(("key", "end"), [(CTRL_C, KeyboardInterrupt), (CTRL_D, EOFError)])
def test_an_empty_prompt_can_be_left(keys: PipeInput, key: str, end: type[BaseException]) -> None:
    keys.send_text(key)
    with pytest.raises(end):
        prompt(keys).read()


def test_messages_of_earlier_runs_can_be_recalled(
    keys: PipeInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    notes: list[str] = []
    first = prompt(keys, open_history(notes.append))
    for text in ("how to sort", "two\\\rlines", "last"):
        keys.send_text(text + ENTER)
        first.read()
    path = tmp_path / "lowmem" / "history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    second = prompt(keys, open_history(notes.append))
    keys.send_text(UP + UP + ENTER)
    assert second.read() == "two\nlines"
    keys.send_text(CTRL_R + "sort" + ENTER + ENTER)
    assert second.read() == "how to sort"
    assert notes == []


def test_an_old_history_is_made_private_and_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(input, "_LARGEST_HISTORY", 1000)
    path = tmp_path / "lowmem" / "history"
    path.parent.mkdir()
    path.write_text("".join(f"\n# date\n+entry {n}\n" for n in range(100)))
    os.chmod(path, 0o644)
    history = open_history(pytest.fail)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.stat().st_size <= 1000
    entries = list(history.load_history_strings())
    assert entries[0] == "entry 99" and 40 < len(entries) < 60
    assert set(entries) <= {f"entry {n}" for n in range(100)}
    history.append_string("y" * 100_000)  # a pasted file
    assert path.stat().st_size <= 1000


def test_a_history_stays_short_during_a_chat(
    keys: PipeInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """prompt_toolkit keeps all messages of a run in memory, also pasted files."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(input, "_LARGEST_HISTORY", 1000)
    monkeypatch.setattr(input, "_MOST_CHARACTERS", 1000)
    monkeypatch.setattr(input, "_MOST_ENTRIES", 20)
    path = tmp_path / "lowmem" / "history"
    for history in (open_history(pytest.fail), input._RunHistory()):
        for number in range(200):
            history.append_string(f"entry {number}")
            assert not path.exists() or path.stat().st_size <= 1000
        assert history.get_strings() == [f"entry {number}" for number in range(180, 200)]
        history.append_string("y" * 50_000)
        assert history.get_strings() == ["y" * 50_000], "a large message can be had back at once"
        history.append_string("after")
        assert history.get_strings() == ["after"]
    reader = prompt(keys, open_history(pytest.fail))
    keys.send_text(UP + UP + ENTER)
    assert reader.read() == "entry 199"


def test_the_cache_of_widths_is_bounded(keys: PipeInput, monkeypatch: pytest.MonkeyPatch) -> None:
    """prompt_toolkit caches the width of every short text that it has shown."""
    monkeypatch.setattr(input, "_MOST_WIDTHS", 200)
    reader = prompt(keys)
    for number in range(300):
        utils.get_cwidth(f"text {number} that was shown")
    keys.send_text("a" + ENTER)
    assert reader.read() == "a"
    assert 0 < len(utils._CHAR_SIZES_CACHE) < 200 and utils.get_cwidth("日本") == 4


def test_a_chat_works_without_a_writable_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lowmem").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    notes: list[str] = []
    assert isinstance(open_history(notes.append), InMemoryHistory) and len(notes) == 1
    monkeypatch.setenv("XDG_STATE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_history(notes.append)
    assert (tmp_path / "home" / ".local" / "state" / "lowmem" / "history").is_file()


def completions(text: str) -> list[str]:
    completer = CommandCompleter(commands.names(), commands.choices())
    return [c.text for c in completer.get_completions(Document(text), CompleteEvent())]


def test_completion(tmp_path: Path) -> None:
    (tmp_path / "talk.json").touch()
    assert completions("/s") == ["/system", "/save", "/set", "/stats"]
    assert completions("/set t") == ["temperature", "top_k", "top_p"]
    assert completions(f"/load {tmp_path}/ta") == ["lk.json"]
    assert completions("text /s") == completions("/set top_k 5 ") == completions("") == []
    assert completions("/s\nx") == []
