"""What is taken from vLLM's log: excerpts of real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem.engines.words import cause, doing

STARTING = """\
(APIServer pid=10723) INFO 11-30 14:08:54 [api_utils.py:347]   █▄█▀ █     █  model   /tmp/tiny-4bit
(EngineCore pid=113) INFO 11-30 14:09:51 [core.py:13] Initializing a V1 LLM engine (v0.32) with config: '/x'
(Worker pid=11389) WARNING 11-30 14:10:09 [cpu_worker.py:114] libiomp is not found in LD_PRELOAD.
"""
OF_A_WORKER = """\
(Worker_TP0 pid=127) ERROR 11-30 14:14:22 [executor.py:1063] Traceback (most recent call last):
(Worker_TP0 pid=127) ERROR 11-30 14:14:22 [executor.py:1063]   File "_ops.py", line 1392, in __getattr__
(Worker_TP0 pid=127) ERROR 11-30 14:14:22 [executor.py:1063] AttributeError: '_C' object has no attribute 'x'
(APIServer pid=12584) ERROR 11-30 14:14:22 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: X
Traceback (most recent call last):
  File "main.py", line 9
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
OF_A_CONFIG = """\
Traceback (most recent call last):
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, User-specified max_model_len (9999) is too large. [type=value_error, input_value=A()]
    For further information visit https://errors.pydantic.dev/2.12/v/value_error
"""


def log(folder: Path, text: str) -> Path:
    file = folder / "vllm.log"
    file.write_text(text, encoding="utf-8")
    return file


def test_what_it_does_now(tmp_path: Path) -> None:
    assert doing(log(tmp_path, STARTING)) == "Initializing a V1 LLM engine (v0.32)"
    assert doing(log(tmp_path, "")) == "" and doing(tmp_path / "none") == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (OF_A_WORKER, "AttributeError: '_C' object has no attribute 'x'"),
        (OF_A_CONFIG, "User-specified max_model_len (9999) is too large"),
        (
            "usage: vllm serve [-h]\nvllm serve: error: unrecognized arguments: --new",
            "unrecognized arguments: --new",
        ),
        (
            "RuntimeError: Engine core initialization failed. See above",
            "RuntimeError: Engine core initialization",
        ),
        ("\x1b[31mMemoryError\x1b[0m\n", "MemoryError"),
        (
            "importlib.metadata.PackageNotFoundError: No package metadata was found for vllm",
            "No package metadata",
        ),
        (STARTING, ""),
    ],
)
def test_why_it_ended(text: str, said: str, tmp_path: Path) -> None:
    found = cause(log(tmp_path, text))
    assert said in found and "\n" not in found and bool(said) == bool(found)


def test_a_long_line_is_cut_and_control_characters_are_escaped(tmp_path: Path) -> None:
    found = cause(log(tmp_path, "ValueError: \x07" + "x" * 5000))
    assert len(found) <= 400 and "\x07" not in found
