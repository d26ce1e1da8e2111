"""The session: whole characters whatever the tokens, the right template, and figures that add up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError
from lowmem.generate import engine
from lowmem.loader import LoadedModel, load
from lowmem.models.dialogue import Message
from lowmem.session import Session, TextStream
from tests.helpers import TINY_STARCHAT, save_source, tiny_model

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_STARCHAT, local_files_only=True)


class ByteTokenizer:
    """One token a byte; a decoder that, like sentencepiece's byte fallback, shows each byte of a run
    that is not whole as a U+FFFD, the whole characters before it included."""

    def decode(self, ids: list[int], **_: object) -> str:
        try:
            return bytes(ids).decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(ids)


def pieces(stream: TextStream, ids: list[int]) -> Iterator[str]:
    for token in ids:
        yield stream.push(token)
    yield stream.finish()


@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=30))
def test_no_character_is_split(tokenizer: Any, text: str) -> None:
    """Byte-level tokens hold parts of characters; every piece of text is whole and nothing is lost."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    parts = list(pieces(TextStream(tokenizer), ids))
    assert "".join(parts) == tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


def test_an_emoji_of_four_tokens_comes_at_once(tokenizer: Any) -> None:
    ids = tokenizer("a😀b", add_special_tokens=False).input_ids
    assert len(ids) > 4  # it is in parts, or this test says nothing
    assert [part for part in pieces(TextStream(tokenizer), ids) if part] == ["a", "😀", "b"]


@given(text=st.text(max_size=20).filter(lambda text: "\ufffd" not in text))
def test_no_character_is_split_by_a_run_wise_decoder(text: str) -> None:
    parts = list(pieces(TextStream(ByteTokenizer()), list(text.encode())))
    assert "".join(parts) == text and not any("\ufffd" in part for part in parts)


def test_a_broken_end_is_shown(tokenizer: Any) -> None:
    """max_new_tokens may cut a character: what is left comes as U+FFFD, not as nothing."""
    ids = tokenizer("a😀", add_special_tokens=False).input_ids[:-1]
    parts = list(pieces(TextStream(tokenizer), ids))
    assert parts[0] == "a" and set("".join(parts[1:])) == {"\ufffd"}


def test_spaces_and_special_tokens(tokenizer: Any) -> None:
    ids = tokenizer("x =  1\n\n    return").input_ids
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert "".join(pieces(TextStream(tokenizer), [*ids[:3], end, *ids[3:]])) == "x =  1\n\n    return"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("session")
    return load(save_source(tiny_model("gpt_bigcode_mqa", positions=128), folder))


def scripted(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> list[list[int]]:
    """Make the model say `ids`; the returned list hears what it is fed."""
    fed: list[list[int]] = []

    def last_logits(model: Any, given: torch.Tensor, cache: Any) -> torch.Tensor:
        fed.append(given[0].tolist())
        return torch.nn.functional.one_hot(torch.tensor([ids[len(fed) - 1]]), 4096).float()

    monkeypatch.setattr(engine, "_last_logits", last_logits)
    return fed


def test_dialogue_template_and_stop(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = loaded.tokenizer
    answer = tokenizer("\nUse sorted(x).", add_special_tokens=False).input_ids
    fed = scripted(monkeypatch, [*answer, 4095, *answer])
    params = replace(GREEDY, max_new_tokens=100)
    responses = list(Session(loaded).stream("How do I sort?", params, system="Be brief."))
    prompt = "<|system|>\nBe brief.<|end|>\n<|user|>\nHow do I sort?<|end|>\n<|assistant|>"
    assert fed[0] == tokenizer(prompt).input_ids
    assert "".join(response.text for response in responses) == "\nUse sorted(x)."
    last = responses[-1]
    assert last.finish_reason == "stop" and all(r.finish_reason is None for r in responses[:-1])
    assert last.prompt_tokens == len(fed[0]) and last.new_tokens == len(answer) + 1 == len(fed)
    assert 0 < last.ttft_seconds < 60 and last.tokens_per_second > 0


def test_a_stop_id_is_never_text(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation config may name an ordinary token, which would decode to text."""
    word = loaded.tokenizer("return", add_special_tokens=False).input_ids
    stop = loaded.tokenizer(";", add_special_tokens=False).input_ids
    scripted(monkeypatch, [*word, *stop])
    answer = Session(replace(loaded, stop_ids=tuple(stop))).complete("x", GREEDY)
    assert answer.text == "return" and answer.finish_reason == "stop"


def test_complete_is_the_stream_joined(loaded: LoadedModel) -> None:
    session = Session(loaded)
    whole = session.complete("Hi", GREEDY)
    parts = list(session.stream("Hi", GREEDY))
    assert whole.text == "".join(part.text for part in parts)
    assert whole.new_tokens == parts[-1].new_tokens == 12 and whole.finish_reason == "length"


def test_messages_and_raw(loaded: LoadedModel) -> None:
    session, tokenizer = Session(loaded), loaded.tokenizer
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    text = (
        "<|system|>\n<|end|>\n<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n<|user|>\nc<|end|>\n<|assistant|>"
    )
    assert session.encode(turns) == tokenizer(text).input_ids
    assert session.encode("def f(", raw=True) == tokenizer("def f(").input_ids
    with pytest.raises(InvalidRequestError, match="template"):
        session.encode("x", system="y", raw=True)
    with pytest.raises(InvalidRequestError, match="template"):
        session.encode(turns, raw=True)


def test_the_tokenizers_own_template_is_second(loaded: LoadedModel) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_STARCHAT, local_files_only=True)
    session = Session(replace(loaded, dialogue=None, tokenizer=tokenizer))
    assert session.encode("Hi") == tokenizer("Hi").input_ids  # no template at all
    with pytest.raises(InvalidRequestError, match="this model has none"):
        session.encode("Hi", system="x")
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}=>"
    assert session.encode("Hi", system="S") == tokenizer("[system]S[user]Hi=>").input_ids
    tokenizer.chat_template = "{{ raise_exception('no system turn here') }}"
    with pytest.raises(InvalidRequestError, match="no system turn here"):
        session.encode("Hi")


def test_bad_requests_come_before_the_first_piece(loaded: LoadedModel) -> None:
    session = Session(loaded)
    with pytest.raises(InvalidRequestError, match="positions"):
        session.stream("word " * 200)
    with pytest.raises(InvalidRequestError, match="temperature"):
        session.stream("x", replace(GREEDY, temperature=-1))


def run_command(arguments: list[str]) -> int:
    import argparse

    from lowmem import run_command

    parser = argparse.ArgumentParser()
    run_command.add_arguments(parser)
    return run_command.run(parser.parse_args(arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tiny_model("gpt_bigcode_mqa", positions=128), tmp_path_factory.mktemp("run"))


def test_run_prints_the_answer_alone_on_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--temperature", "0", "--max-new-tokens", "6", "--device", "cpu", "--dtype", "float32"]
    assert run_command([str(folder), "-p", "Hi", *options]) == 0
    captured = capsys.readouterr()
    expected = Session(load(folder)).complete("Hi", replace(GREEDY, max_new_tokens=6))
    assert captured.out == expected.text + "\n"
    assert "loaded in" in captured.err and "+ 6 tokens (length), TTFT" in captured.err
    assert run_command([str(folder), "-p", "Hi", "--json", *options]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"] == expected.text and record["new_tokens"] == 6 and record["bits"] is None


def test_run_reads_the_prompt_from_a_pipe(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    options = ["--temperature", "0", "--max-new-tokens", "4"]
    assert run_command([str(folder), "-p", "Hi\nthere", *options]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nthere\n"))
    assert run_command([str(folder), *options]) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    with pytest.raises(InvalidRequestError, match="empty"):
        run_command([str(folder)])
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    with pytest.raises(InvalidRequestError, match="no prompt"):
        run_command([str(folder)])


def test_ctrl_c_ends_the_answer_cleanly(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = engine._last_logits, [0]

    def interrupted(*args: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(engine, "_last_logits", interrupted)
    assert run_command([str(folder), "-p", "Hi", "--temperature", "0"]) == 130
    captured = capsys.readouterr()
    assert captured.out.endswith("\n") and "interrupted" in captured.err


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:77", "cuda:x", ""])
def test_a_device_that_is_not_there_is_refused(folder: Path, device: str) -> None:
    with pytest.raises(InvalidRequestError, match="device"):
        run_command([str(folder), "-p", "Hi", "--device", device])
