"""Saved conversations: the round trip, and the files that are refused or left alone."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.chat import store
from lowmem.chat.conversation import ChatState, Conversation, Exchange
from lowmem.chat.settings import NAMES, setting_name, settings_record, with_setting
from lowmem.chat.store import ConversationError, load, save
from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError, LowmemError
from lowmem.models.dialogue import Message

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
CONVERSATION = st.builds(
    Conversation,
    system=st.none() | TEXT,
    exchanges=st.lists(st.builds(Exchange, TEXT, TEXT, st.booleans()), max_size=4).map(tuple),
)
PARAMS = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 10**6),
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 1000),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.1, 10),
    seed=st.none() | st.integers(0, 2**63 - 1),
    stop=st.lists(TEXT.filter(bool), max_size=3).map(tuple),
)
TALK = Conversation("Be brief.", (Exchange("a?", "\nb", True), Exchange("c", "d")))
CARD = SamplingParams()


@settings(deadline=None, max_examples=100)
@given(conversation=CONVERSATION, params=PARAMS)
def test_saved_conversations_round_trip(
    tmp_path_factory: pytest.TempPathFactory, conversation: Conversation, params: SamplingParams
) -> None:
    path = tmp_path_factory.getbasetemp() / "talk.json"
    save(str(path), ChatState(conversation, params, "model"))
    loaded = load(str(path), CARD)
    assert loaded.conversation == conversation
    assert loaded.params == params


def test_the_file_is_private_and_complete(tmp_path: Path) -> None:
    path = save(str(tmp_path / "talk.json"), ChatState(TALK, model="tiny"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["talk.json"]
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["format"] == "lowmem-chat" and record["model"] == "tiny"
    assert record["messages"][1] == {"role": "assistant", "content": "\nb", "stopped": True}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(str(tmp_path / "talk.json"), ChatState(TALK))
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(ConversationError, match="No space left"):
        save(str(path), ChatState())
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["talk.json"]


def test_a_link_stays_a_link_and_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    save(str(target), ChatState())
    link.symlink_to(target)
    save(str(link), ChatState(TALK))
    assert link.is_symlink() and load(str(target), CARD).conversation == TALK
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/target.json", CARD).conversation == TALK


@pytest.mark.parametrize("content", [b"", b"print('mine')\n", b'{"format": "other"}', b"[1, 2]", b"\xff\xfe"])
def test_another_kind_of_file_is_never_overwritten(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.py"
    path.write_bytes(content)
    with pytest.raises(ConversationError, match="not a conversation saved by lowmem"):
        save(str(path), ChatState(TALK))
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["mine.py"]


@pytest.mark.parametrize("name", ["", "pipe", "nowhere/talk.json", "x" * 300, "a\0b", "loop"])
def test_places_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(LowmemError) as caught:
        save(f"{tmp_path}/{name}", ChatState(TALK))
    assert "\n" not in str(caught.value)


GOOD = {
    "format": "lowmem-chat",
    "version": 1,
    "system": None,
    "settings": {},
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "gguf"}, "not a conversation saved by lowmem"),
        ({"version": 2}, "unknown version"),
        ({"version": True}, "unknown version"),
        ({"version": "1"}, "unknown version"),
        ({"system": 3}, "system text"),
        ({"system": "\ud800"}, "system text"),
        ({"settings": []}, "settings"),
        ({"settings": {"temperature": "hot"}}, "temperature"),
        ({"settings": {"temperature": -1}}, "temperature"),
        ({"settings": {"temperature": float("nan")}}, "temperature"),
        ({"settings": {"temperature": 10**400}}, "temperature"),
        ({"settings": {"top_k": True}}, "top_k"),
        ({"settings": {"top_k": 1.5}}, "top_k"),
        ({"settings": {"seed": 10**30}}, "seed"),
        ({"settings": {"stop": "x"}}, "stop"),
        ({"settings": {"stop": [""]}}, "stop"),
        ({"messages": None}, "messages"),
        ({"messages": GOOD["messages"][:1]}, "messages"),
        ({"messages": list(reversed(GOOD["messages"]))}, "message 1"),
        ({"messages": [GOOD["messages"][0], {"role": "assistant"}]}, "message 2"),
        ({"messages": [GOOD["messages"][0], "b"]}, "message 2"),
        ({"messages": [GOOD["messages"][0], {"role": "assistant", "content": "\udc00"}]}, "message 2"),
    ],
)  # fmt: skip
def test_a_file_that_save_would_not_write_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(ConversationError, match=words) as caught:
        load(str(path), CARD)
    assert "\n" not in str(caught.value)


def test_unknown_keys_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({**GOOD, "mood": 1, "settings": {"mirostat": 2, "top_k": 7}}))
    saved = load(str(path), CARD)
    assert saved.conversation.messages() == [Message("user", "a"), Message("assistant", "b")]
    assert saved.params.top_k == 7 and saved.params.temperature == CARD.temperature


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"\xff", b"[" * 200_000, b'"text"', b"[]", b"1" * 5000]
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(content)
    with pytest.raises(ConversationError, match="JSON") as caught:
        load(str(path), CARD)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_wrong_places_to_load_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("", "folder"), ("none", "does not exist"), ("pipe", "not a regular file")):
        with pytest.raises(ConversationError, match=words):
            load(f"{tmp_path}/{name}", CARD)
    monkeypatch.setattr(store, "LARGEST", 100)
    (tmp_path / "large").write_bytes(b" " * 101)
    with pytest.raises(ConversationError, match="larger"):
        load(str(tmp_path / "large"), CARD)
    with pytest.raises(ConversationError, match="larger"):
        save(str(tmp_path / "talk"), ChatState(TALK))


def test_typed_settings() -> None:
    params = with_setting(CARD, "max-new-tokens", "7")
    params = with_setting(params, "Temperature", "0.75")
    params = with_setting(params, "stop", r"### \n\n")
    params = with_setting(params, "seed", "5")
    assert (params.max_new_tokens, params.temperature, params.stop) == (7, 0.75, ("###", "\n\n"))
    assert params.seed == 5 and with_setting(params, "seed", "none").seed is None
    assert with_setting(params, "stop", "none").stop == ()
    assert set(settings_record(params)) == set(NAMES)
    for name, value in (("top_k", "1.5"), ("top_p", "2"), ("seed", "-1"), ("min_p", "x"), ("top_q", "1")):
        with pytest.raises(InvalidRequestError):
            with_setting(CARD, name, value)
    assert setting_name("top-k") == "top_k"


def test_without_a_home_folder_the_history_is_of_this_run(monkeypatch):
    from lowmem.chat.input import open_history
    from lowmem.chat.store import state_folder
    from lowmem.errors import OutputError

    monkeypatch.setenv("HOME", "")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    with pytest.raises(OutputError, match="Set XDG_STATE_HOME"):
        state_folder()
    told: list[str] = []
    history = open_history(told.append)
    history.append_string("one")
    assert history.get_strings() == ["one"] and "no home folder" in told[0]
