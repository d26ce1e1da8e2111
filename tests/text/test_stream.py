"""Text from tokens: whole characters for any tokens, ended exactly where a stop string begins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.text.stream import StopStrings, TextStream, token_text
from tests.helpers import TINY_STARCHAT


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


class ChunkTokenizer:
    """Each token is an arbitrary run of bytes. Bytes that do not form a character decode to U+FFFD."""

    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = chunks

    def decode(self, ids: list[int], **_: object) -> str:
        return b"".join(self.chunks[token] for token in ids).decode(errors="replace")


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
    """max_new_tokens may cut a character: the rest is returned as U+FFFD."""
    ids = tokenizer("a😀", add_special_tokens=False).input_ids[:-1]
    parts = list(pieces(TextStream(tokenizer), ids))
    assert parts[0] == "a" and set("".join(parts[1:])) == {"\ufffd"}


def test_spaces_and_special_tokens(tokenizer: Any) -> None:
    ids = tokenizer("x =  1\n\n    return").input_ids
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert "".join(pieces(TextStream(tokenizer), [*ids[:3], end, *ids[3:]])) == "x =  1\n\n    return"


def before_the_first(text: str, stops: list[str]) -> str:
    """The oracle: the text before the stop string that starts first."""
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]


# Few letters, so that stop strings match, overlap, repeat themselves and nearly match all the time.
TEXTS = st.text(st.sampled_from("ab\n é😀"), max_size=30)
STOPS = st.lists(st.text(st.sampled_from("ab\n é😀"), min_size=1, max_size=5), max_size=4)


@settings(deadline=None, max_examples=600)
@given(text=TEXTS, stops=STOPS, data=st.data())
def test_the_text_ends_at_the_first_stop_string(text: str, stops: list[str], data: st.DataObject) -> None:
    """Tokens cut the text's bytes anywhere; no piece ever holds a part of the stop string that ends it."""
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=20)))
    chunks = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    stream, filter = TextStream(ChunkTokenizer(chunks)), StopStrings(stops)
    expected = before_the_first(text, stops)
    given_out, arrived = "", ""
    for token in range(len(chunks)):
        piece = stream.push(token)
        arrived += piece
        given_out += filter.push(piece)
        assert expected.startswith(given_out)  # never a character of the stop string
        # Held back is only what a stop string may still claim: its beginning, at the end of what arrived.
        held = arrived[len(given_out) :]
        assert filter.found or not held or any(stop.startswith(held[: len(stop)]) for stop in stops)
    given_out += filter.push(stream.finish()) + filter.finish()
    assert given_out == expected
    assert filter.found == (expected != text)


def test_text_is_held_back_no_longer_than_needed() -> None:
    filter = StopStrings(["</code>", "User:"])
    assert [filter.push(piece) for piece in ("a <", "/co", "l> b", " Us", "e", "r", "s: x")] == [
        "a ",
        "",
        "</col> b",
        " ",
        "",
        "",
        "Users: x",
    ]
    assert filter.push(" and </code> more") == " and " and filter.found
    assert filter.push("more") == "" and filter.finish() == ""


def test_a_longer_stop_string_that_began_earlier_wins() -> None:
    """ "bc" is whole while "abcd" is not yet: which of them starts first shows a character later."""
    for text, expected in (("xabcd", "x"), ("xabce", "xa"), ("xabc", "xa")):
        filter = StopStrings(["abcd", "bc"])
        assert "".join(map(filter.push, text)) + filter.finish() == expected
        assert filter.found


def test_no_stop_string_holds_nothing() -> None:
    filter = StopStrings(())
    assert filter.push("abc") == "abc" and filter.finish() == "" and not filter.found
    with pytest.raises(ValueError):
        StopStrings(["a", ""])


def test_the_text_of_one_token(tokenizer: Any) -> None:
    for text in (" return", "x", "\n", "<|end|>"):
        (token,) = tokenizer(text, add_special_tokens=False).input_ids
        assert token_text(tokenizer, token) == text
    part = tokenizer("😀", add_special_tokens=False).input_ids[0]
    assert token_text(tokenizer, part) == "\ufffd"

    class DropsTheFirstSpace:
        """As sentencepiece's decoders do."""

        def decode(self, ids: list[int], **_: object) -> str:
            return "".join((" the", "na")[token] for token in ids).removeprefix(" ")

    assert [token_text(DropsTheFirstSpace(), token) for token in (0, 1)] == [" the", "na"]
