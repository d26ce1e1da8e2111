"""Reports of users of other runtimes, rebuilt small and tried; docs/reliability.md lists them with links."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowmem.cli import main
from lowmem.commands.run import read_prompt
from lowmem.config import SamplingParams
from lowmem.loading.loader import LoadedModel, LoadOptions, load
from lowmem.models.dialogue import Message
from lowmem.session import Session
from lowmem.text.stream import TextStream
from tests.commands.command_lines import ENVIRONMENT
from tests.commands.faulty_environment import Fault, run_all
from tests.helpers import TINY_STARCHAT, save_source, tiny_model

FLOAT32 = LoadOptions(dtype=torch.float32)
GREEDY = SamplingParams(temperature=0, max_new_tokens=24)
QUESTION = "Write a Python function that adds two numbers."


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(TINY_STARCHAT, FLOAT32)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users may enter."""
    path = Path(tempfile.mkdtemp(prefix="lowmem-reports-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def test_a_container_user_without_a_name(tmp_path: Path) -> None:
    """torch's inductor asks getpass for the user's name: KeyError 'getpwuid(): uid not found'."""
    script = """
import os, pwd, sys
def nobody(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = nobody
for name in ("USER", "LOGNAME", "LNAME", "USERNAME", "HOME", "XDG_CACHE_HOME", "LOWMEM_CACHE"):
    os.environ.pop(name, None)
from lowmem.cli import main
sys.exit(main())
"""
    words = ["run", str(TINY_STARCHAT), "-p", "hi", "--max-new-tokens", "2", "--quiet", "--quantize", "nf4"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path
    )
    assert done.returncode == 0 and done.stdout.strip() and not done.stderr
    assert not list(tmp_path.iterdir()), "nothing is written into a folder named ~"


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
def test_a_hub_cache_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = folder / "hub" / "models--owner--name"
    files = save_source(tiny_model("llama", layers=1), folder / "files")
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    for number, file in enumerate(sorted(files.iterdir())):
        shutil.copy(file, repo / "blobs" / str(number))
        (repo / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{number}")
        (repo / "blobs" / str(number)).chmod(0o444)
    variables = {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    for name, value in variables.items():  # huggingface_hub reads them when it is imported
        monkeypatch.setitem(ENVIRONMENT, name, value)
    before = sorted(folder.rglob("*"))
    words = ["run", "owner/name", "-p", "hi", "--max-new-tokens", "2", "--quiet"]
    (result,) = run_all([(words, Fault("read-only hub cache", {"HOME": "/nonexistent"}, user=54321))], folder)
    assert result.code == 0 and result.stdout and not result.stderr, result
    assert sorted(folder.rglob("*")) == before


def test_a_path_with_spaces_umlauts_and_signs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "Mod\u00e8les #1 (100 %) & \u6a21\u578b"
    source = save_source(tiny_model("gpt_bigcode_mqa", layers=2), place / "so 'm\u00fc' ch")
    out = str(place / "4 bit")
    words = ["--rows", "2", "--row-length", "32", "--plain", "--quiet"]
    assert main(["convert", str(source), out, *words]) == 0
    for command in (["plan", out], ["verify", out], ["run", out, "-p", "x", "--max-new-tokens", "2"]):
        assert main(command) == 0, capsys.readouterr().err


def test_a_byte_order_mark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Windows editors write one: it is no part of a prompt. In a config, transformers refuses it too."""
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfSay hi\r\n")
    assert read_prompt(None, str(tmp_path / "prompt.txt")) == "Say hi"
    model = shutil.copytree(TINY_STARCHAT, tmp_path / "model")
    config = model / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert main(["plan", str(model)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.json" in line and "BOM" in line


def test_a_generation_config_that_names_another_end(tmp_path: Path) -> None:
    """Its end of text does not replace the token that ends a turn."""
    model = shutil.copytree(TINY_STARCHAT, tmp_path / "model")
    plain = load(model, FLOAT32)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert set(load(model, FLOAT32).stop_ids) >= {0, *plain.stop_ids}
    assert plain.tokenizer.convert_tokens_to_ids("<|end|>") in plain.stop_ids


def test_a_template_that_writes_the_first_token_too(tmp_path: Path) -> None:
    """The tokenizer adds a first token, and so does the template: the model sees one."""
    folder = save_source(tiny_model("llama", layers=1), tmp_path / "model")
    for path in folder.glob("*.json"):  # or lowmem's own dialogue would be used
        path.write_text(path.read_text().replace("<|assistant|>", "<|helper|>"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"bos_token": "<|endoftext|>", "add_bos_token": True, "chat_template": (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    model = json.loads((folder / "tokenizer.json").read_text())
    first = next(t["id"] for t in model["added_tokens"] if t["content"] == "<|endoftext|>")
    model["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [first], "tokens": ["<|endoftext|>"]}
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(model))
    session = Session(load(folder))
    assert session.encode("x", raw=True)[0] == first, "the tokenizer adds it to a plain text"
    ids = session.encode([Message("user", "Say hi")])
    assert ids[0] == first and ids.count(first) == 1


def test_a_cached_prompt_gives_the_same_answer(loaded: LoadedModel) -> None:
    """In float32. In bfloat16 the last bits of cached keys may differ: see ARCHITECTURE.md."""
    fresh = [Session(loaded).complete(text, GREEDY).text for text in (QUESTION, QUESTION + " Then test it.")]
    session = Session(loaded)
    assert [session.complete(QUESTION, GREEDY).text for _ in range(3)] == [fresh[0]] * 3
    assert session.complete(QUESTION + " Then test it.", GREEDY).text == fresh[1]


def test_characters_of_several_tokens_are_streamed_whole(loaded: LoadedModel) -> None:
    text = "a\U0001f642\u00e9 \u6f22\u5b57 \U0001f468\u200d\U0001f469\u200d\U0001f467!"
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text), "its characters are split"
    stream = TextStream(loaded.tokenizer)
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_a_stop_text_across_tokens_neither_leaks_nor_takes_what_is_before_it(loaded: LoadedModel) -> None:
    session = Session(loaded)
    whole = session.complete(QUESTION, GREEDY).text
    for begin in range(1, len(whole) - 4):
        stop = whole[begin : begin + 4]
        params = SamplingParams(temperature=0, max_new_tokens=24, stop=(stop,))
        pieces = [response.text for response in session.stream(QUESTION, params)]
        assert "".join(pieces) == whole[: whole.index(stop)], stop
    never = SamplingParams(temperature=0, max_new_tokens=24, stop=(whole[-1] + "never",))
    assert session.complete(QUESTION, never).text == whole, "a stop text that only began"


def test_calibration_that_says_little(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hessians without full rank: one repeated word, and fewer tokens than inputs."""
    source = save_source(tiny_model("gpt_bigcode_mqa", layers=2), tmp_path / "source")
    (tmp_path / "text.txt").write_text("same " * 200)
    out = tmp_path / "out"
    words = ["--calibration", str(tmp_path / "text.txt"), "--rows", "1", "--row-length", "16", "--quiet"]
    assert main(["convert", str(source), str(out), *words]) == 0, capsys.readouterr().err
    assert main(["verify", str(out)]) == 0
    assert main(["run", str(out), "-p", "x", "--max-new-tokens", "2", "--check"]) == 0


def test_a_vocabulary_that_is_padded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model has more rows than the tokenizer has tokens, as Qwen's: the rest is never an error."""
    source = save_source(tiny_model("llama", layers=1, vocab=4224), tmp_path / "source")
    session = Session(load(source))
    model, tokens = session.loaded.model.get_input_embeddings().num_embeddings, len(session.loaded.tokenizer)
    assert model > tokens, "the tiny model's vocabulary is padded"
    hot = SamplingParams(temperature=5.0, top_k=0, top_p=1.0, max_new_tokens=60, seed=1)
    assert session.complete("x", hot, raw=True).new_tokens > 0
