"""StarChat's template, on the embedded model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.errors import InvalidRequestError
from lowmem.models.dialogue import (
    CHAT_TEMPLATE,
    Dialogue,
    Message,
    encode_plain,
    end_token_ids,
    fim_tokens,
)

TINY = Path(__file__).resolve().parents[2] / "lowmem" / "data" / "tiny-starchat"

CONVERSATIONS = {
    "one question": [Message("user", "How do I sort a list in Python?")],
    "system": [Message("system", "Answer in one line."), Message("user", "What is `len`?")],
    "empty system": [Message("system", ""), Message("user", "hi")],
    "turns": [
        Message("user", "Write f(x) = x².\nIn Python."),
        Message("assistant", "```python\ndef f(x):\n    return x * x\n```"),
        Message("user", "  And in Rust?  "),
    ],
    "ends with an answer": [Message("user", "a"), Message("assistant", "b\n")],
    "empty contents": [Message("user", ""), Message("assistant", "")],
    "nothing": [],
}
each_conversation = pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
with_and_without_prompt = pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "past"])


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def dialogue(tokenizer):
    found = Dialogue.detect(tokenizer)
    assert found is not None
    return found


def test_detect_finds_the_markers_and_their_ids(dialogue):
    assert dialogue == Dialogue(4092, 4093, 4094, 4095)
    assert dialogue.end == "<|end|>"


def test_detect_needs_all_four_markers():
    vocabulary = {"<|system|>": 1, "<|user|>": 2, "<|assistant|>": 3}
    assert Dialogue.detect(SimpleNamespace(get_vocab=lambda: vocabulary)) is None
    whole = {**vocabulary, "<|end|>": 4}
    assert Dialogue.detect(SimpleNamespace(get_vocab=lambda: whole)) == Dialogue(1, 2, 3, 4)


def test_render_equals_the_published_template(dialogue):
    asked = dialogue.render([Message("user", "How?")], add_generation_prompt=True)
    assert asked == "<|system|>\n<|end|>\n<|user|>\nHow?<|end|>\n<|assistant|>"
    past = dialogue.render([Message("system", "S"), Message("assistant", "A")], add_generation_prompt=False)
    assert past == "<|system|>\nS<|end|>\n<|assistant|>\nA<|end|>\n"


@pytest.mark.parametrize(  # transformers itself refuses an empty conversation
    "messages", [m for m in CONVERSATIONS.values() if m], ids=[k for k, m in CONVERSATIONS.items() if m]
)
@with_and_without_prompt
def test_chat_template_renders_the_same(tokenizer, dialogue, messages, prompt):
    as_dicts = [{"role": message.role, "content": message.content} for message in messages]
    rendered = tokenizer.apply_chat_template(
        as_dicts, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=prompt
    )
    assert rendered == dialogue.render(messages, prompt)


@each_conversation
@with_and_without_prompt
def test_encode_gives_the_ids_of_the_rendered_text(tokenizer, dialogue, messages, prompt):
    rendered = tokenizer(dialogue.render(messages, prompt), add_special_tokens=False)["input_ids"]
    assert dialogue.encode(tokenizer, messages, prompt) == rendered


@pytest.mark.parametrize(
    "messages",
    [
        [Message("tool", "x")],
        [Message("user", "x"), Message("system", "y")],
        [Message("system", "x"), Message("system", "y")],
    ],
    ids=["unknown role", "late system", "two systems"],
)
def test_wrong_roles_are_refused_by_render_and_template(tokenizer, dialogue, messages):
    import jinja2

    with pytest.raises(InvalidRequestError):
        dialogue.render(messages, True)
    with pytest.raises(InvalidRequestError):
        dialogue.encode(tokenizer, messages, True)
    as_dicts = [{"role": message.role, "content": message.content} for message in messages]
    with pytest.raises(jinja2.TemplateError):
        tokenizer.apply_chat_template(as_dicts, chat_template=CHAT_TEMPLATE, tokenize=False)


SPECIALS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>", "<fim_prefix>"]


@settings(max_examples=80, deadline=None)
@given(parts=st.lists(st.sampled_from([*SPECIALS, "\n", "<", "|", "end", "a é", "<|en", "d|>"]), max_size=12))
def test_contents_cannot_forge_a_turn(tokenizer, dialogue, parts):
    """Text of a user never becomes a marker token, and no text is lost."""
    text = "".join(parts)
    ids = dialogue.encode(tokenizer, [Message("user", text)], add_generation_prompt=True)
    specials = [token for token in ids if token in tokenizer.all_special_ids]
    assert specials == [4092, 4095, 4093, 4095, 4094]
    user_turn = ids[ids.index(4093) + 1 : len(ids) - ids[::-1].index(4095) - 1]
    assert tokenizer.decode(user_turn, clean_up_tokenization_spaces=False) == "\n" + text


class Disobedient:
    """A tokenizer that ignores split_special_tokens, as slow tokenizers do."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.added_tokens_decoder = tokenizer.added_tokens_decoder

    def __call__(self, text, split_special_tokens=False, **options):
        return self.tokenizer(text, split_special_tokens=False, **options)


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.sampled_from([*SPECIALS, "<|end|", "x\n"]), max_size=8))
def test_markers_in_text_are_broken_up_if_the_tokenizer_ignores_the_option(tokenizer, parts):
    text = "".join(parts)
    ids = encode_plain(Disobedient(tokenizer), text)
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_encode_plain_leaves_the_tokenizer_as_it_was(tokenizer):
    ids = encode_plain(tokenizer, "a <|end|> b")
    assert ids == tokenizer("a <|end|> b", split_special_tokens=True)["input_ids"]
    assert 4095 in tokenizer("a <|end|> b")["input_ids"]


def test_generation_stops_at_the_end_of_a_turn_and_of_the_text(tokenizer, dialogue):
    assert end_token_ids(tokenizer, dialogue, SimpleNamespace(eos_token_id=0)) == (4095, 0)
    assert end_token_ids(tokenizer, dialogue, SimpleNamespace(eos_token_id=[0, 7])) == (4095, 0, 7)
    assert end_token_ids(tokenizer, dialogue, SimpleNamespace(eos_token_id=None)) == (4095, 0)
    assert end_token_ids(tokenizer, None) == (0,)


def test_fim_tokens(tokenizer):
    assert fim_tokens(tokenizer) == (1, 2, 3)
    santacoder = {"<fim-prefix>": 5, "<fim-middle>": 6, "<fim-suffix>": 7}
    assert fim_tokens(SimpleNamespace(get_vocab=lambda: santacoder)) == (5, 6, 7)
    assert fim_tokens(SimpleNamespace(get_vocab=dict)) is None
