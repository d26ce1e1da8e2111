"""Makes the pictures of the documents: terminals as SVG, the chat page as PNG.

    python -m tests.docs.images              all of them (needs chromium for the page)
    python -m tests.docs.images plan answer  some

The plan is that of header-only replicas of StarChat Alpha; the answers are those of the embedded model.
"""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lowmem.benchmarks.experiments.starchat.replicas import gptq_header_replica, starchat_header_replica
from lowmem.convert import CalibrationSpec, convert
from rich.console import Console
from rich.text import Text

from lowmem.config import QuantConfig
from tests.helpers import REPO, TINY_STARCHAT

IMAGES = REPO / "docs" / "images"
QUESTION = "Write a function that reverses a string."


def terminal(words: list[str], folder: Path, columns: int = 100) -> str:
    """What a command writes to a terminal, with its colours."""
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm-256color", "HF_HUB_OFFLINE": "1"}
    main, child = pty.openpty()
    command = [sys.executable, "-m", "lowmem", *words]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=child, stdout=child, stderr=child)
    os.close(child)
    data = b""
    while process.poll() is None or select.select([main], [], [], 0.2)[0]:
        try:
            data += os.read(main, 65536)
        except OSError:  # the child has closed its end
            break
    return data.decode().replace("\r\n", "\n")


def svg(name: str, typed: str, written: str, columns: int = 100) -> None:
    """Save a terminal in which a command was typed."""
    with open(os.devnull, "w") as nowhere:
        console = Console(
            record=True, width=columns, file=nowhere, force_terminal=True, color_system="truecolor"
        )
        console.print(Text.assemble(("$ ", "bold green"), typed))
        console.print(Text.from_ansi(written.strip()))
        console.save_svg(str(IMAGES / f"{name}.svg"), title="lowmem", unique_id=name)


def plan() -> None:
    """`lowmem plan` of StarChat Alpha for a card of 12 GiB."""
    with tempfile.TemporaryDirectory() as temporary:
        source = starchat_header_replica(Path(temporary) / "starchat-alpha")
        for bits in (8, 4, 3):
            gptq_header_replica(source.with_name(f"starchat-alpha-{bits}bit"), bits, 128)
        words = ["plan", "starchat-alpha", "--vram", "12GiB", "--bandwidth", "360GB"]
        svg("plan", "lowmem " + " ".join(words), terminal(words, Path(temporary), 126), 126)


def answer() -> None:
    """One answer of `lowmem run`."""
    with tempfile.TemporaryDirectory() as temporary:
        convert(
            TINY_STARCHAT,
            Path(temporary) / "tiny-starchat-4bit",
            QuantConfig(bits=4),
            calibration=CalibrationSpec(rows=16),
        )
        words = ["run", "tiny-starchat-4bit", "-p", QUESTION, "--temperature", "0", "--max-new-tokens", "90"]
        typed = f"lowmem run tiny-starchat-4bit -p '{QUESTION}' --temperature 0"
        svg("answer", typed, terminal(words, Path(temporary)))


def page() -> None:
    """The chat page with an answer."""
    from playwright.sync_api import sync_playwright

    words = [sys.executable, "-m", "lowmem", "serve", str(TINY_STARCHAT), "--port", "8765"]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
            shown = browser.new_page(viewport={"width": 1100, "height": 720})
            for _ in range(120):
                try:
                    shown.goto("http://127.0.0.1:8765")
                    break
                except Exception:  # it still loads
                    time.sleep(0.5)
            shown.get_by_role("textbox").first.fill(QUESTION)
            shown.keyboard.press("Enter")
            time.sleep(15)
            shown.screenshot(path=str(IMAGES / "page.png"))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name in sys.argv[1:] or ["plan", "answer", "page"]:
        {"plan": plan, "answer": answer, "page": page}[name]()
