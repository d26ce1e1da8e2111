"""The command line: quick help, and one line for every mistake."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.cli import main
from tests.commands.command_lines import ENVIRONMENT, Done, in_one_process
from tests.convert.convert_helpers import calibration_file, digest_of
from tests.helpers import TINY_STARCHAT, save_source, tiny_model


def lowmem(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lowmem", *arguments], capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd
    )


def in_this_process(*arguments: str) -> int:
    """The exit code; restores the SIGTERM handler that a conversion replaces."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        return main(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in ("convert", "plan", "run", "fim", "list", "rm", "doctor")),
        ["convert", "--bits", "5"],
        ["run", "m", "--quantize", "5"],
    ],
)
def test_help_and_mistakes_do_not_load_torch(arguments):
    """A typo is reported without importing libraries that take seconds."""
    code = (
        "import sys\nfrom lowmem.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["run", "nowhere", "-p", "x"], 2),
        (["run", str(TINY_STARCHAT), "-p", "x", "--context", "99999"], 2),
        (["fim", "nowhere", "--prefix-file", __file__], 2),
        (["serve", "nowhere"], 2),
        (["plan", str(TINY_STARCHAT)], 0),
        (["list"], 0),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else str(value),
)
def test_a_plan_does_not_load_torch(arguments: list[str], code: int, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom lowmem.cli import main\ncode = main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'fastapi'} & set(sys.modules)\nsys.exit(code)"
    )
    environment = {**ENVIRONMENT, "LOWMEM_CACHE": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment
    )
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr


MISTAKES: list[tuple[list[str], str]] = [
    ([], "a command is missing"),
    (["convert"], "SOURCE"),
    (["convert", "nowhere", "out"], "nowhere"),
    (["convert", "empty.safetensors", "out"], "empty"),
    (["convert", "a", "b", "--bits", "9"], "choose from"),
    (["convert", "a", "b", "--group-size", "7"], "group size 7"),
    (["convert", "a", "b", "--damp-percent", "2"], "damp"),
    (["convert", "a", "b", "--memory", "lots"], "--memory 'lots'"),
    (["convert", "a", "b", "--rows", "0"], "rows"),
    (["run", "nowhere", "-p", "x"], "nowhere"),
    (["run", "owner/name", "-p", "x"], "no version of owner/name"),
    (["run", "a", "-p", "x", "--vram", "much"], "vram 'much'"),
    (["plan", "nowhere"], "nowhere"),
    (["plan", "owner/name", "--vram", "6GiB"], "lowmem convert owner/name"),
    (["fim", "nowhere", "empty.safetensors"], "empty.safetensors"),
    (["rm", "nothing"], "nothing"),
    (["verify", "nowhere"], "nowhere"),
    (["nonsense"], "nonsense"),
    (["rnu", "m"], "lowmem: unknown command 'rnu'. Did you mean run?"),
    (
        ["run", "m", "--max-new-tokns", "3"],
        "lowmem run: unknown option --max-new-tokns. Did you mean --max-new-tokens?",
    ),
    (["run", "m", "--quantise=int8"], "lowmem run: unknown option --quantise. Did you mean --quantize?"),
    (
        ["bench", "quality", "m", "--refernce", "r"],
        "lowmem bench quality: unknown option --refernce. Did you mean --reference?",
    ),
    (["run", "m", "a prompt"], "lowmem run: unexpected argument 'a prompt'"),
]


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory) -> list[Done]:
    """The results of MISTAKES, in order."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "empty.safetensors").touch()
    return in_one_process([arguments for arguments, _ in MISTAKES], folder)


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=lambda number: " ".join(MISTAKES[number][0]))
def test_a_mistake_is_one_line_and_exit_code_2(number: int, mistakes: list[Done]) -> None:
    result = mistakes[number]
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert MISTAKES[number][1] in lines[0]
    assert result.stdout == ""
    assert result.names == ["empty.safetensors"]


PLAIN = ["--correction", "0", "--passes", "0", "--tune-steps", "0"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "source"
    return save_source(tiny_model("gpt_bigcode_mqa", layers=3), folder)


def arguments_for(source: Path, out: Path) -> list[str]:
    text = calibration_file(source.parent)
    return [
        "convert",
        str(source),
        str(out),
        "--calibration",
        str(text),
        "--rows",
        "8",
        "--row-length",
        "64",
        "--tune-steps",
        "4",
    ]


@pytest.fixture(scope="module")
def done(source: Path) -> dict[str, Done]:
    """Conversions and what uses them, in a new process."""
    base = source.parent
    commands = {
        "quiet": [*arguments_for(source, base / "quiet"), "--quiet"],
        "convert": [*arguments_for(source, base / "out"), "--bits", "8"],
        "verify": ["verify", str(base / "out")],
        "run": ["run", str(base / "out"), "-p", "Hello", "--max-new-tokens", "4", "--seed", "1"],
        "plain": [*arguments_for(source, base / "plain"), "--plain"],
        "spelled": [*arguments_for(source, base / "spelled"), *PLAIN],
    }
    return dict(zip(commands, in_one_process(list(commands.values()), base), strict=True))


def test_convert_verify_run(source, done):
    result = done["convert"]
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("layer ")] == ["1/3", "2/3", "3/3"]
    assert done["verify"].returncode == 0
    answer = done["run"]
    assert answer.returncode == 0, answer.stderr
    assert "tokens/s" in answer.stderr
    assert "tokens/s" not in answer.stdout
    # A damaged byte is found, and its file named.
    out = source.parent / "out"
    shard = out / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 0xFF
    shard.write_bytes(data)
    damaged = lowmem("verify", str(out))
    assert damaged.returncode == 2
    assert "model.safetensors" in damaged.stdout + damaged.stderr


def test_quiet_says_nothing(done):
    """Neither do the libraries: it is the first command of its process."""
    result = done["quiet"]
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_plain_is_gptq_alone(source, done):
    assert done["plain"].returncode == done["spelled"].returncode == 0
    plain, spelled = source.parent / "plain", source.parent / "spelled"
    meta = json.loads((plain / "config.json").read_bytes())["quantization_config"]["meta"]
    assert (meta["correction"], meta["passes"], meta["tune_steps"]) == (0, 0, 0)
    assert (plain / "model.safetensors").read_bytes() == (spelled / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "steps", "rows"),
    [
        ([], 80, 128),
        (["--effort", "fast"], 0, 128),
        (["--effort", "best"], 256, 384),
        (["--effort", "best", "--bits", "8"], 0, 384),
        (["--effort", "best", "--rows", "16", "--tune-steps", "7"], 7, 16),
        (["--effort", "best", "--plain"], 0, 384),
        (["--bits", "8", "--tune-steps", "3"], 3, 128),
    ],
)
def test_the_effort_sets_steps_and_rows(words, steps, rows, monkeypatch):
    from lowmem.convert import pipeline

    seen = []
    monkeypatch.setattr(pipeline, "convert", lambda *a, **k: seen.append((a[2], k["calibration"])))
    assert main(["convert", str(TINY_STARCHAT), "out", *words]) == 0
    ((config, calibration),) = seen
    assert (config.tune_steps, calibration.rows) == (steps, rows)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A source that takes a while to convert, and the digests of its conversion."""
    folder = tmp_path_factory.mktemp("long")
    source = save_source(tiny_model("gpt_bigcode_mqa", layers=24), folder / "source")
    assert in_this_process(*arguments_for(source, folder / "whole")) == 0
    return source, digest_of(folder / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_job_that_can_be_resumed(tmp_path, number, long):
    source, whole = long
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "lowmem", *arguments_for(source, out)],
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        # Background jobs of a shell ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith("layer 1/"):
            process.send_signal(number)
            break
    said += process.stderr.read()
    assert process.wait() == 130, "the conversion was over before the signal arrived"
    assert "Repeat the command" in said
    assert "Traceback" not in said
    assert not out.exists()
    assert in_this_process(*arguments_for(source, out)) == 0
    assert digest_of(out) == whole
