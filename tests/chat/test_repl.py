"""The chat with a session of scripted answers."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem.chat import commands
from lowmem.chat.chat import Chat, show_conversation
from lowmem.chat.commands import Typed
from lowmem.chat.conversation import ChatState, Conversation, Exchange
from lowmem.chat.repl import talk as talk_to
from lowmem.chat.terminal import Interrupts
from lowmem.chat.view import TerminalView
from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError
from tests.chat.chat_helpers import Answer, FakeSession, Terminal, terminal_console

Typing = str | BaseException | Callable[[], str]


class Script:
    """A user: messages or exceptions in order, then Ctrl-D."""

    def __init__(self, *lines: Typing) -> None:
        self.lines = list(lines)

    def read(self) -> str:
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line if isinstance(line, str) else line()


def talk(*lines: Typing, answers: list[Answer] | None = None, **options: Any) -> tuple[Chat, Terminal]:
    """Run a chat to its end; answers are `one.`, `two.`, … unless given."""
    said = [Answer([word, "."]) for word in ("one", "two", "three", "four")]
    session = FakeSession(said if answers is None else answers, **options)
    console, terminal = terminal_console(100, 50)
    chat = Chat(
        session,  # type: ignore[arg-type]
        console,
        ChatState(params=SamplingParams(seed=5)),
        view=lambda console: TerminalView(console, threaded=False),
    )
    assert talk_to(chat, Script(*lines)) == 0
    return chat, terminal


def asked(chat: Chat) -> list[Any]:
    return [request["prompt"] for request in chat.session.asked]  # type: ignore[attr-defined]


def test_a_request_contains_the_earlier_turns() -> None:
    chat, terminal = talk("a", "b")
    assert asked(chat) == [
        [("user", "a")],
        [("user", "a"), ("assistant", "one."), ("user", "b")],
    ]
    lines = terminal.lines()
    assert lines.index("one.") < lines.index("two.")
    assert sum("7 + 2 tokens · TTFT 0.25 s · 12.5 tokens/s · " in line for line in lines) == 2


def test_freed_memory_is_returned_before_the_next_prompt() -> None:
    """glibc keeps pages between small blocks in use until malloc_trim."""
    before, seen = _anonymous(), []
    kept: list[bytearray] = []

    def typed() -> str:
        seen.append(_anonymous())
        if len(seen) > 1:
            raise EOFError
        blocks = [bytearray(200_000) for _ in range(500)]
        kept.extend(blocks[::50])
        return "/context"

    chat, _ = talk()
    assert talk_to(chat, Script(typed, typed)) == 0
    assert seen[1] - before < 30 << 20


def _anonymous() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024


def test_system_and_settings_apply_from_the_next_turn() -> None:
    chat, terminal = talk(
        "a", "/system Be brief.", "/set temperature 0.9", "b", "/system", "/system none", "c"
    )
    first, second, third = chat.session.asked  # type: ignore[attr-defined]
    assert (first["system"], second["system"], third["system"]) == (None, "Be brief.", None)
    assert (first["params"].temperature, second["params"].temperature) == (0.2, 0.9)
    assert len(second["prompt"]) == 3, "the conversation is kept"
    assert "Be brief." in terminal.lines()


def test_undo_and_reset() -> None:
    chat, terminal = talk("a", "b", "/undo", "c", "/reset", "d", "/undo", "/undo")
    assert asked(chat)[2:] == [[("user", "a"), ("assistant", "one."), ("user", "c")], [("user", "d")]]
    assert 'removed: "b"; 1 exchange left' in terminal.text()
    assert "the conversation is empty" in terminal.text()


def test_retry_uses_another_seed() -> None:
    chat, _ = talk("a", "b", "/retry", "/retry")
    assert asked(chat)[1] == asked(chat)[2] == asked(chat)[3]
    assert [r["params"].seed for r in chat.session.asked] == [5, 5, 6, 7]  # type: ignore[attr-defined]
    assert [e.answer for e in chat.conversation.exchanges] == ["one.", "four."]


def test_a_failed_retry_keeps_the_previous_answer() -> None:
    answers = [Answer(["one."]), Answer([], error=InvalidRequestError("no"))]
    chat, terminal = talk("a", "/retry", answers=answers)
    assert [e.answer for e in chat.conversation.exchanges] == ["one."]
    assert "no" in terminal.lines()


def pressing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Send SIGINT just before piece `number` of an answer is computed."""
    from tests.chat import chat_helpers

    calls = [0]

    def sleep(seconds: float) -> None:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat_helpers.time, "sleep", sleep)


def test_ctrl_c_stops_the_answer_and_keeps_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    pressing(monkeypatch, 3)
    before = signal.getsignal(signal.SIGINT)
    chat, terminal = talk("a", "b", answers=[Answer(["one ", "two ", "three"]), Answer(["ok"])])
    assert chat.conversation.exchanges[0].answer == "one two " and chat.conversation.exchanges[0].stopped
    assert asked(chat)[1] == [("user", "a"), ("assistant", "one two "), ("user", "b")]
    assert "one two" in terminal.lines() and "stopped" in terminal.text()
    assert chat.session.closed == 2, "the engine's work was ended"  # type: ignore[attr-defined]
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_before_the_first_token_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pressing(monkeypatch, 1)
    chat, terminal = talk("a", "b", answers=[Answer(["one"]), Answer(["ok"])])
    assert asked(chat)[1] == [("user", "b")]
    assert "not kept" in terminal.text()


def test_ctrl_c_is_deferred_outside_of_armed() -> None:
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
        with pytest.raises(KeyboardInterrupt), interrupts.armed():
            reached = False
    assert reached


def test_ctrl_c_between_an_answer_and_the_prompt_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own handler would end the program there and lose the conversation."""
    monkeypatch.setattr(
        "lowmem.chat.chat.figures", lambda *a, **k: os.kill(os.getpid(), signal.SIGINT) or "figures"
    )
    chat, terminal = talk("a", "b")
    assert [e.answer for e in chat.conversation.exchanges] == ["one.", "two."]
    assert not any(e.stopped for e in chat.conversation.exchanges), "it was not about the next answer"
    assert terminal.text().count("figures") == 2


def test_ctrl_c_stops_a_command_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(*arguments: Any, **options: Any) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it goes on")

    monkeypatch.setattr(FakeSession, "count", count)
    chat, terminal = talk("a", "/context", "b")
    assert [e.answer for e in chat.conversation.exchanges] == ["one.", "two."]
    assert terminal.lines().count("stopped") == 1


def test_leaving() -> None:
    ctrl_c = KeyboardInterrupt
    chat, terminal = talk(ctrl_c(), "a", ctrl_c(), ctrl_c(), "never read")
    assert asked(chat) == [[("user", "a")]]
    assert terminal.text().count("Ctrl-C again") == 2
    for word in ("/exit", "/quit", "/bye", "/EXIT"):
        assert asked(talk(word, "never read")[0]) == []


def test_dropped_turns_are_reported() -> None:
    answers = [Answer(["a"]), Answer(["b"], dropped_turns=1), Answer(["c"], dropped_turns=2)]
    chat, terminal = talk("1", "2", "3", "/context", answers=answers)
    assert "the oldest turn was left out to fit the context" in terminal.text()
    assert "the oldest 2 turns were left out to fit the context" in terminal.text()
    assert chat.dropped == 2 and terminal.text().count("(left out)") == 2


def test_a_cut_answer_says_why() -> None:
    answers = [Answer(["a"], finish_reason="length"), Answer(["b"], finish_reason="context")]
    _, terminal = talk("1", "2", answers=answers)
    assert "cut at 1 new tokens" in terminal.text()
    assert "/set max_new_tokens N)" in " ".join(terminal.lines())
    assert "the context is full" in terminal.text()


def test_a_refused_request_is_one_line_and_the_chat_goes_on() -> None:
    answers = [Answer([], error=InvalidRequestError("too long", "Shorten it")), Answer(["fine"])]
    chat, terminal = talk("a", "b", answers=answers)
    assert "too long. Shorten it" in terminal.lines() and asked(chat)[1] == [("user", "b")]


def test_out_of_memory_does_not_end_the_chat() -> None:
    answers = [Answer(["x"]), Answer([], error=MemoryError()), Answer(["fine"])]
    chat, terminal = talk("a", "b", "c", answers=answers)
    assert "out of memory" in terminal.text()
    assert [e.question for e in chat.conversation.exchanges] == ["a", "c"]


def test_a_bug_keeps_its_traceback_and_saves_the_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        talk("a", "b", answers=[Answer(["one"]), Answer(["tw"], error=ZeroDivisionError())])
    record = json.loads((tmp_path / "lowmem" / "rescued.json").read_text())
    assert [m["content"] for m in record["messages"]] == ["a", "one"]


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    keep, forget = ("a", "/system S", f"/save {path}"), ("/reset", "/set top_k 3")
    chat, terminal = talk(*keep, *forget, f"/load {path}", "b", f"/load {path}x", "/save")
    assert asked(chat)[1] == [("user", "a"), ("assistant", "one."), ("user", "b")]
    assert chat.conversation.system == "S" and chat.params.top_k == 50
    assert "> a" in terminal.lines(), "the last exchange is shown"
    assert "does not exist" in terminal.text() and "/save needs FILE" in terminal.text()


def test_stats_context_help_and_set() -> None:
    _, terminal = talk(
        "a b c", "/system one two", "/stats", "/context", "/help", "/set", "/set top_k", "/set x 1"
    )
    text = terminal.text()
    assert "4-bit g128, 13 MiB of weights" in text and "answers       1, 2 tokens" in text
    assert "6 of 1,000 tokens" in text and "2  system: one two" in text and "4  a b c" in text
    assert all(f"/{command.name}" in text for command in commands.COMMANDS)
    assert (
        "max_new_tokens     256" in text
        and "/set top_k needs a value" in text
        and "'x' is not a setting" in text
    )


def test_a_model_without_a_template_continues_single_messages() -> None:
    chat, terminal = talk("def f(", "/system x", "g(", "/context", templated=False)
    first, second = chat.session.asked  # type: ignore[attr-defined]
    assert (first["prompt"], first["raw"], second["prompt"]) == ("def f(", True, "g(")
    assert "needs a dialogue template" in terminal.text()
    chat.greet(quiet=True)
    assert "no dialogue template" in terminal.text() and "MiB of weights" not in terminal.text()


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("/help", Typed("help", "")),
        ("  /SYSTEM  Be brief. \n Please. ", Typed("system", "Be brief. \n Please.")),
        ("/?", Typed("?", "")),
        ("/etc", Typed("etc", "")),
        ("/etc/hosts is what?", "/etc/hosts is what?"),
        ("/ 2", "/ 2"),
        ("/2", "/2"),
        ("//help me", "/help me"),
        ("// a comment", "// a comment"),
        ("//etc/hosts", "//etc/hosts"),
        ("see /help", "see /help"),
    ],
)
def test_commands_and_messages(text: str, meaning: Typed | str) -> None:
    assert commands.parse(text) == meaning


@given(st.text())
def test_every_text_is_a_message_or_a_command(text: str) -> None:
    parsed = commands.parse(text)
    assert isinstance(parsed, Typed) or parsed == text or "/" + parsed == text.strip()


def test_an_unknown_command_names_the_nearest() -> None:
    _, terminal = talk("/rety", "/xyzzy", "/reset now")
    assert (
        "unknown command /rety. Did you mean /retry? Type //rety to send it as a message" in terminal.lines()
    )
    assert "unknown command /xyzzy. See /help. Type //xyzzy to send it as a message" in terminal.lines()
    assert "/reset takes no argument" in terminal.text()


def test_escape_codes_of_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    """A saved file is untrusted. The Terminal raises for any unexpected escape code."""
    path = tmp_path / "talk.json"
    evil = "\x1b[2Jevil\x07"
    messages = [{"role": "user", "content": evil}, {"role": "assistant", "content": evil}]
    path.write_text(json.dumps({"format": "lowmem-chat", "version": 1, "system": evil, "messages": messages}))
    _, terminal = talk(f"/load {path}", "/system", "/context", "/undo", f"/load {evil}")
    assert "[2Jevil" in terminal.text()


def test_half_a_surrogate_pair_can_be_asked() -> None:
    chat, _ = talk("a\udce9b")
    assert asked(chat) == [[("user", "a?b")]]


def test_settings_of_the_chat_do_not_change_in_place() -> None:
    chat, _ = talk("/set seed none", "a")
    assert chat.params == replace(SamplingParams(seed=5), seed=None)


def test_a_resumed_chat_shows_the_last_exchange() -> None:
    session = FakeSession([Answer(["new"])])
    console, terminal = terminal_console(100, 50)
    chat = Chat(
        session,  # type: ignore[arg-type]
        console,
        ChatState(Conversation("S", (Exchange("a", "b"),))),
    )
    show_conversation(console, chat.conversation)
    assert talk_to(chat, Script("c")) == 0
    lines = terminal.lines()
    assert lines.index("> a") < lines.index("b") < lines.index("new")
    assert session.asked[0]["prompt"] == [("user", "a"), ("assistant", "b"), ("user", "c")]
