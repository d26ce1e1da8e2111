"""A tokenizer whose Rust code panics: a message of one line, and the next request is served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders, pre_tokenizers
from transformers import AutoTokenizer

from lowmem.cli import main
from lowmem.errors import InvalidRequestError
from lowmem.models.dialogue import encode_plain
from lowmem.models.template import apply_template
from lowmem.text.stream import TextStream, token_text
from lowmem.text.tokenizing import decode, encode
from tests.helpers import TINY_STARCHAT

ENDLESS = "(a|a)*$"  # two ways for every letter, and none that ends before something else
TEXT = "a" * 40 + "b"


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_STARCHAT, local_files_only=True)


def with_endless_splits(tokenizer: Any) -> None:
    backend = tokenizer.backend_tokenizer
    split = pre_tokenizers.Split(Regex(ENDLESS), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])


@pytest.mark.parametrize(
    "ask",
    [
        lambda tokenizer: encode(tokenizer, TEXT),
        lambda tokenizer: encode_plain(tokenizer, TEXT),
        lambda tokenizer: apply_template(tokenizer, [{"role": "user", "content": TEXT}]),
    ],
)
def test_a_text_that_a_tokenizer_gives_up_on_is_refused_and_the_next_is_not(tokenizer: Any, ask: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    plain = encode(tokenizer, "def f(x):")
    with_endless_splits(tokenizer)
    with pytest.raises(InvalidRequestError, match=r"fails on this text.*tokenizer\.json"):
        ask(tokenizer)
    assert encode(tokenizer, "def f(x):") == plain


def test_tokens_that_a_tokenizer_gives_up_on(tokenizer: Any) -> None:
    long = tokenizer.convert_tokens_to_ids(max(tokenizer.get_vocab(), key=len))
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Fuse(), decoders.Replace(Regex(r"(?:[\s\S]|[\s\S])*\z(?!\z)"), "")]
    )
    for refused in (
        lambda: decode(tokenizer, [long], skip_special_tokens=True),
        lambda: TextStream(tokenizer).push(long),
        lambda: token_text(tokenizer, long),
    ):
        with pytest.raises(InvalidRequestError, match="fails on this text"):
            refused()


def test_what_else_goes_wrong_keeps_its_name() -> None:
    class Interrupted:
        def __call__(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        decode = __call__

    with pytest.raises(KeyboardInterrupt):
        encode(Interrupted(), "text")
    with pytest.raises(KeyboardInterrupt):
        decode(Interrupted(), [1], skip_special_tokens=True)


def test_the_command_ends_with_one_line_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY_STARCHAT, folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": ENDLESS}, "behavior": "Isolated", "invert": False}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, data["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert main(["run", str(folder), "-p", TEXT, "--quiet", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("lowmem run: the model's tokenizer fails on this text")
