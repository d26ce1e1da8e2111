"""The Python API: `lowmem.load` returns objects for transformers' pipelines, as in docs/python-api.md."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lowmem
from lowmem.errors import InvalidRequestError, SourceError
from tests.commands.command_lines import ENVIRONMENT
from tests.convert.convert_helpers import quick_convert
from tests.helpers import REPO, TINY_STARCHAT


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-starchat with a 4-bit version beside it."""
    folder = tmp_path_factory.mktemp("api") / "tiny-starchat"
    shutil.copytree(TINY_STARCHAT, folder)
    quick_convert(folder, folder.with_name("tiny-starchat-4bit"))
    return folder


def snippet() -> str:
    """The Python block of docs/python-api.md that loads StarChat Alpha."""
    text = (REPO / "docs" / "python-api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    (found,) = [block for block in blocks if "lowmem.load(" in block]
    return "import lowmem\n" + found


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_the_snippet_of_the_python_guide(
    model: Path, bits: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pipeline call of the guide, on the source, on a converted version and on int8."""
    code = snippet()
    assert '"HuggingFaceH4/starchat-alpha"' in code
    option = "" if bits is None else f", bits={bits}"
    code = code.replace('"HuggingFaceH4/starchat-alpha"', f"{str(model)!r}{option}")
    code = code.replace("max_new_tokens=256", "max_new_tokens=40")
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(code, "python-api.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "How do I sort a list in Python?" in printed
    answer = names["outputs"][0]["generated_text"]
    assert len(answer) > len(names["prompt"]) and answer in printed


def test_generation_stops_at_the_end_of_a_turn_by_itself(model: Path) -> None:
    """Without eos_token_id too, although StarChat's own files name only <|endoftext|>."""
    loaded, tokenizer = lowmem.load(str(model), bits=4)
    assert loaded.generation_config.eos_token_id[0] == tokenizer.convert_tokens_to_ids("<|end|>")
    ids = tokenizer("def f(x):", return_tensors="pt").input_ids
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def test_open_model_and_make_plan(model: Path) -> None:
    opened = lowmem.open_model(str(model), bits=4, context=128)
    assert opened.label == "4-bit g128" and opened.context == 128
    plan = lowmem.make_plan(str(model), vram="6GiB")
    assert plan.chosen.device == "card" and plan.budget.card == 6 << 30
    with pytest.raises(SourceError, match="nowhere"):
        lowmem.load("nowhere")
    with pytest.raises(InvalidRequestError, match="context"):
        lowmem.load(str(model), context=1 << 20)
    with pytest.raises(AttributeError):
        lowmem.nonsense  # noqa: B018


def test_import_does_not_import_torch() -> None:
    code = "import sys, lowmem; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT).returncode == 0
