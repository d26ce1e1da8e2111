"""The chat in a real terminal (tmux): typing, interrupting, saving, leaving and resuming."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests.helpers import REPO, TINY_STARCHAT

PATIENCE = 60  # seconds to wait for each output, on a busy machine

if shutil.which("tmux") is None and not os.environ.get("CI"):
    pytest.skip("tmux is not installed", allow_module_level=True)


class Tmux:
    """One window of a tmux server of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tmux = ["tmux", "-S", str(folder / "socket"), "-f", "/dev/null"]
        environment = {
            "HOME": str(folder),
            "XDG_STATE_HOME": str(folder / "state"),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPO),
            "OMP_NUM_THREADS": "1",
            "LANG": "C.UTF-8",
            "TERM": "xterm-256color",
            "PS1": "shell> ",
        }
        shell = [
            "env",
            "-i",
            "-C",
            str(folder),
            *(f"{name}={value}" for name, value in environment.items()),
            "bash",
            "--norc",
        ]
        self("new-session", "-d", "-x", "80", "-y", "24", "-c", str(folder), *shell)
        self("set-option", "-g", "history-limit", "5000")

    def __call__(self, *words: str) -> str:
        result = subprocess.run([*self._tmux, *words], capture_output=True, text=True, timeout=PATIENCE)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def keys(self, *keys: str) -> None:
        """Press keys by tmux's names, such as Enter and C-c."""
        self("send-keys", *keys)

    def type(self, text: str) -> None:
        """Type a line and send it."""
        self("send-keys", "-l", text)
        self.keys("Enter")

    def text(self) -> str:
        """The window with its scrollback."""
        return self("capture-pane", "-p", "-S", "-5000")

    def wait(self, found: str | Callable[[str], object]) -> str:
        """Poll until a text appears or a condition holds; returns the window's text."""
        deadline = time.monotonic() + PATIENCE
        while True:
            text = self.text()
            if found in text if isinstance(found, str) else found(text):
                return text
            assert time.monotonic() < deadline, f"{found!r} did not come; the window:\n{text}"
            time.sleep(0.05)


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Tmux]:
    window = Tmux(tmp_path)
    yield window
    window("kill-server")


def ready(text: str) -> bool:
    """Whether an empty prompt is at the end."""
    return text.rstrip().endswith("\n>")


def answered(count: int) -> Callable[[str], bool]:
    return lambda text: text.count("TTFT") == count and ready(text)


def with_positions(folder: Path, count: int) -> Path:
    """tiny-starchat with `count` positions, by repeating the learned ones, for long answers."""
    shutil.copytree(TINY_STARCHAT, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "transformer.wpe.weight"
    rows = tensors[name].shape[0]
    tensors[name] = tensors[name].repeat(-(-count // rows), 1)[:count].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_positions": count}))
    return folder


def test_a_chat(tmux: Tmux) -> None:
    # 8000 tokens, so that the answer does not end before Ctrl-C.
    model = with_positions(tmux.folder / "model", 8192)
    run = f"{sys.executable} -m lowmem run {model} --temperature 0 --max-new-tokens"
    tmux.wait("shell>")
    tmux.type(f"{run} 8000 --no-speculation; echo left with $?")
    tmux.wait(lambda text: "MiB of weights" in text and ready(text))

    # An answer is stopped in the middle, and the chat continues.
    tmux.type("Write a function that sorts a list.")
    first = tmux.wait(lambda text: len(said(text)) > 40)
    assert "TTFT" not in first
    tmux.wait(lambda text: len(said(text)) > len(said(first)) + 20)
    tmux.keys("C-c")
    text = tmux.wait(answered(1))
    assert "stopped" in text and "Traceback" not in text
    partial = said(text).partition(" tokens · TTFT")[0].rsplit("\n", 1)[0].strip()
    assert len(partial) > 40

    tmux.type("/set max_new_tokens 12")
    tmux.wait(lambda text: "next answer on" in text and ready(text))
    tmux("set-buffer", "What does\n  it return?")
    tmux("paste-buffer", "-p")
    tmux.wait("it return?")
    tmux.keys("Enter")
    tmux.wait(answered(2))

    tmux.type("/save talk.json")
    tmux.wait("saved: 2 exchanges")
    record = json.loads((tmux.folder / "talk.json").read_text(encoding="utf-8"))
    questions = [m["content"] for m in record["messages"] if m["role"] == "user"]
    assert questions == ["Write a function that sorts a list.", "What does\n  it return?"]
    assert record["messages"][1]["stopped"] is True and record["settings"]["max_new_tokens"] == 12
    assert squeeze(partial)[:20] in squeeze(record["messages"][1]["content"])

    tmux.type("/reset")
    tmux.wait("forgotten: 2 exchanges")
    tmux.type("/context")
    tmux.wait("the conversation is empty")
    tmux.type("/load talk.json")
    tmux.wait("loaded: 2 exchanges")
    tmux.type("/undo")
    tmux.wait("1 exchange left")
    tmux.type("/retry")
    tmux.wait(answered(3))
    tmux.type("/stats")
    tmux.wait("answers       3")

    # Ctrl-C clears a line; Ctrl-D leaves.
    tmux.keys("x", "C-c", "C-d")
    tmux.wait("left with 0")
    assert_restored(tmux)

    # A second run recalls messages of the first.
    tmux.type(f"{run} 8; echo left with $?")
    tmux.wait(lambda text: "MiB of weights" in text and ready(text))
    tmux.keys("Up")
    tmux.wait("> /stats")
    tmux.keys("C-c")
    tmux.wait(lambda text: ready(text) and "> /stats" not in text)
    tmux.keys("C-r")
    tmux.wait("search")
    tmux("send-keys", "-l", "sorts a")
    tmux.wait("> Write a function that sorts a list.")
    tmux.keys("Enter", "Enter")
    tmux.wait(answered(1))
    tmux.keys("C-c")
    tmux.wait("Ctrl-C again")
    # SIGTERM at the prompt, where prompt_toolkit's own loop runs.
    shell = psutil.Process(int(tmux("display-message", "-p", "#{pane_pid}")))
    shell.children()[0].terminate()
    tmux.wait("left with 143")
    assert_restored(tmux)


SLOW = """
import sys, time

class Slow:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            time.sleep(2)

sys.meta_path.insert(0, Slow())
"""


def start_slowly(tmux: Tmux, model: Path) -> None:
    """Type `lowmem run` with an import of torch that takes two seconds more; wait for the prompt."""
    (tmux.folder / "sitecustomize.py").write_text(SLOW)
    tmux.wait("shell>")
    paths = f"PYTHONPATH={tmux.folder}:{REPO}"
    command = f"{sys.executable} -m lowmem run {model} --temperature 0 --max-new-tokens 4"
    tmux.type(f"clear; {paths} {command}; echo left with $?")
    tmux.wait(lambda text: "\n>" in text and "loading" in text)


def test_a_message_is_typed_while_the_model_loads(tmux: Tmux) -> None:
    start_slowly(tmux, TINY_STARCHAT)
    tmux("send-keys", "-l", "typed early")
    assert "loading" in tmux.wait("> typed early") and "MiB of weights" not in tmux.text()
    tmux.keys("Enter")
    assert "MiB of weights" not in tmux.wait(lambda text: "loading" in text.rpartition("typed early")[2])
    text = tmux.wait(answered(1))
    assert text.index("> typed early") < text.index("MiB of weights") < text.index("TTFT")
    assert "loading" not in text
    tmux.keys("C-d")
    tmux.wait("left with 0")
    assert_restored(tmux)


@pytest.mark.parametrize(
    ("keys", "code"),
    [("C-c", 130), ("C-d", 0), ("/exit Enter", 0), ("hello Enter C-c", 130)],
)
def test_loading_can_be_left(tmux: Tmux, keys: str, code: int) -> None:
    start_slowly(tmux, TINY_STARCHAT)
    for key in keys.split():
        tmux.keys(key)
        time.sleep(0.2)
    text = tmux.wait("left with")
    assert f"left with {code}" in text and "Traceback" not in text and "MiB of weights" not in text
    assert ("interrupted" in text) == (code == 130)
    assert_restored(tmux)


def test_a_failed_load_is_one_line(tmux: Tmux) -> None:
    model = shutil.copytree(TINY_STARCHAT, tmux.folder / "model")
    (model / "tokenizer.json").write_text("{}")
    start_slowly(tmux, model)
    tmux("send-keys", "-l", "half a mess")
    text = tmux.wait("left with 2")
    assert text.count("lowmem run: ") == 1 and "Traceback" not in text
    assert_restored(tmux)


STREAM = """
import time
from rich.console import Console
from lowmem.chat.markdown import THEME
from lowmem.chat.view import TerminalView
lines = [f"- item {n:03}" + " and more words" * 6 for n in range(20)] + ["", "```python"]
lines += [f"line_{n:03} = 'words'  # " + "a comment " * 7 for n in range(60)] + ["```"]
with TerminalView(Console(theme=THEME)) as view:
    for line in lines:
        view.push(line + chr(10))
        time.sleep(0.05)
print("finished")
"""


@pytest.mark.parametrize(
    ("sizes", "copies"),
    [
        ([(100, 30), (100, 14), (120, 24), (120, 40), (140, 16)], 0),
        # A narrower window wraps rows, and tmux scrolls some of the tail away.
        ([(60, 24), (100, 30), (50, 12), (80, 24), (70, 14)], 25),
    ],
)
def test_the_window_changes_its_size_while_an_answer_comes(
    tmux: Tmux, sizes: list[tuple[int, int]], copies: int
) -> None:
    """A terminal reflows its text: every line must still appear, and only once where possible."""
    (tmux.folder / "stream.py").write_text(STREAM)
    tmux.wait("shell>")
    tmux.type(f"{sys.executable} stream.py")
    for number, (columns, rows) in zip((2, 12, 24, 40, 60), sizes, strict=True):
        tmux.wait(f"item {number:03}" if number < 20 else f"line_{number - 20:03}")
        tmux("resize-window", "-x", str(columns), "-y", str(rows))
    text = "".join(tmux.wait("\nfinished").split())
    counts = [text.count(f"item{number:03}") for number in range(20)]
    counts += [text.count(f"line_{number:03}") for number in range(60)]
    assert min(counts) == 1
    assert sum(counts) - len(counts) <= copies


def assert_restored(tmux: Tmux) -> None:
    """Echo and line mode are on again."""
    tmux.type("stty -a | grep -ow -e '-echo' -e echo -e '-icanon' -e icanon; echo done")
    tmux.wait("\ndone")
    modes = tmux.text().rpartition("echo done")[2].split()
    assert "echo" in modes and "icanon" in modes and "-echo" not in modes and "-icanon" not in modes
    tmux.type("clear")
    tmux.wait(lambda text: "stty" not in text[-2000:])
    tmux("clear-history")


def said(text: str) -> str:
    """The text below the first question."""
    return text.partition("> Write a function that sorts a list.")[2].strip()


def squeeze(text: str) -> str:
    """Without spaces and markdown marks."""
    return re.sub(r"[\s*`]", "", text)
