"""`lowmem run` in a pty with a simulated user, for hours."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from pathlib import Path
from typing import Any

from lowmem.benchmarks.experiments.endurance.soak_worker import GREEDY_ANSWER, text_of, warm_texts

PATIENCE = 300.0  # seconds for a prompt to come back, on a machine that others use as well
_OPEN, _CLOSED, _WHERE = b"\x1b[?2004h", b"\x1b[?2004l", b"\x1b[6n"  # prompt opens, closes; cursor query
_SIZES = ((80, 24), (120, 40), (40, 12), (100, 30))
_QUIET = 0.15  # seconds without output after which a prompt is taken as final


class Stuck(Exception):
    """The terminal did not come back to its prompt, or the process ended."""


class Terminal:
    """`lowmem run` in a pty, and its user; `turns` counts the user's turns by kind."""

    def __init__(self, model: str, context: int, folder: Path, seed: int) -> None:
        self._dice, self._folder, self._count = random.Random(seed), folder, 0
        self._samples = folder / "samples.jsonl"
        self.turns: Counter[str] = Counter()
        self._handle, theirs = os.openpty()
        self._resize(80, 24)
        words = [model, "--context", str(context), "--device", "cpu", "--max-new-tokens", "40"]
        worker = "lowmem.benchmarks.experiments.endurance.soak_worker"
        environment = {**os.environ, "XDG_STATE_HOME": str(folder / "state"), "TERM": "xterm-256color"}
        environment.pop("NO_COLOR", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", worker, "terminal", str(self._samples), *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self._seen = b""  # the end of the output
        self._opened = self._shut = 0
        self._kinds = (
            *(self._ask,) * 4,
            self._ask_code,
            self._paste,
            self._paste_too_much,
            *(self._interrupt,) * 3,
            self._clear_line,
            self._undo,
            self._retry,
            self._save_and_load,
            self._command,
            self._stop_strings,
            self._again,
            self._size,
            self._reset,
        )
        self._prompt(0)
        for text in warm_texts(self._dice):
            self._line(f"\x1b[200~{text}\x1b[201~")  # too long to answer: it is only tokenized

    @property
    def kept(self) -> int:
        """Bytes of the files that the chat has written: conversations and history."""
        return sum(file.stat().st_size for file in self._folder.rglob("*") if file != self._samples)

    def round(self, turns: int) -> None:
        """`turns` turns, then a reset and the same short question always. Raises Stuck."""
        for _ in range(turns):
            kind = self._dice.choice(self._kinds)
            self.turns[kind.__name__.strip("_").replace("_", " ")] += 1
            kind()
        for line in (
            "/reset",
            "/set stop none",
            "/set temperature 0",
            f"/set max_new_tokens {GREEDY_ANSWER}",
            "What is a list?",
            "/set temperature 0.7",
            "/set max_new_tokens 40",
            "/reset",
        ):
            self._line(line)

    def census(self) -> dict[str, Any]:
        """The process's own `soak_worker.Census`. Raises Stuck."""
        self._wait_quiet()
        before = self._samples.stat().st_size if self._samples.exists() else 0
        os.kill(self._process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            self._read(0.05)
            data = self._samples.read_bytes()[before:] if self._samples.exists() else b""
            if data.endswith(b"\n"):
                self._samples.unlink()
                found: dict[str, Any] = json.loads(data)
                return found
        raise Stuck("no sample came")

    def leave(self) -> int:
        """Type /exit; the exit code, or -1 if it does not end. Raises Stuck."""
        self._wait_quiet()
        self._type("/exit\r")
        deadline = time.monotonic() + PATIENCE
        while self._process.poll() is None and time.monotonic() < deadline:
            self._read(0.05)
        code = self._process.poll()
        return -1 if code is None else code

    def close(self) -> None:
        """End the process, and close the terminal."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._handle)

    def _ask(self) -> None:
        self._line(text_of(self._dice, 6))

    def _ask_code(self) -> None:
        self._line("Write a Python function with a list, a table and `code`: ```python")

    def _paste(self) -> None:
        text = "\n".join(text_of(self._dice, 5) for _ in range(20))
        self._line(f"\x1b[200~{text}\x1b[201~")

    def _paste_too_much(self) -> None:
        text = "\n".join(text_of(self._dice, 10) for _ in range(400))  # refused in one line
        self._line(f"\x1b[200~{text}\x1b[201~")

    def _interrupt(self) -> None:
        opened = self._opened
        self._type(text_of(self._dice, self._dice.choice((4, 150))) + "\r")
        deadline = time.monotonic() + self._dice.uniform(0.0, 0.4)
        while self._opened == opened and time.monotonic() < deadline:
            self._read(0.01)
        self._type("\x03")
        self._prompt(opened)
        self._wait_quiet()  # if the answer had ended, that was Ctrl-C at the next prompt

    def _clear_line(self) -> None:
        self._wait_quiet()
        self._type("half a line\x03")
        self._wait_quiet()

    def _undo(self) -> None:
        self._line("/undo")

    def _retry(self) -> None:
        self._line("/retry")

    def _save_and_load(self) -> None:
        file = self._folder / f"talk{self._dice.randrange(3)}.json"
        self._line(f"/save {file}")
        self._line(f"/load {file}")

    def _command(self) -> None:
        self._line(self._dice.choice(("/context", "/stats", "/help", "/system Be brief.", "/rety", "/set")))

    def _stop_strings(self) -> None:
        self._line(f"/set stop {self._dice.choice(('the', 'none', 'a , e'))}")

    def _again(self) -> None:
        """The previous message, by the arrow key, with a word inserted before it."""
        self._wait_quiet()
        self._type("\x1b[A")
        self._wait_quiet()
        self._line("\x01And ")

    def _size(self) -> None:
        opened = self._opened
        self._type(text_of(self._dice, 6) + "\r")
        self._resize(*self._dice.choice(_SIZES))
        self._prompt(opened)

    def _reset(self) -> None:
        self._line("/reset")

    def _resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._handle, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _line(self, text: str) -> None:
        """Type a line, and wait for the next prompt."""
        opened = self._opened
        self._type(text + "\r")
        self._prompt(opened)

    def _type(self, text: str) -> None:
        data = text.encode()
        deadline = time.monotonic() + PATIENCE
        while data:
            _, writable, _ = select.select([], [self._handle], [], 0.01)
            if writable:
                data = data[os.write(self._handle, data[:512]) :]
            self._read(0.0)  # otherwise both sides may wait for each other
            if time.monotonic() > deadline:
                raise Stuck("the process does not read its input")

    def _prompt(self, opened: int) -> None:
        """Wait for a prompt later than the `opened`-th."""
        deadline = time.monotonic() + PATIENCE
        while self._opened <= max(opened, self._shut):
            self._read(0.05)
            if time.monotonic() > deadline:
                raise Stuck(f"no prompt after {PATIENCE:g} s; the screen ended with {self._seen[-200:]!r}")

    def _wait_quiet(self) -> None:
        """Wait until a prompt is open and output has stopped."""
        quiet = time.monotonic()
        deadline = quiet + PATIENCE
        while self._opened <= self._shut or time.monotonic() < quiet + _QUIET:
            if self._read(0.02):
                quiet = time.monotonic()
            if time.monotonic() > deadline:
                raise Stuck("the terminal does not come to rest")

    def _read(self, seconds: float) -> bool:
        """Read output for at most `seconds`; whether there was any. Answers cursor queries."""
        readable, _, _ = select.select([self._handle], [], [], seconds)
        if not readable:
            return False
        try:
            data = os.read(self._handle, 1 << 16)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            data = b""
        if not data:
            self._process.wait(PATIENCE)
            if self._process.returncode == 0:
                return False
            tail = self._seen[-400:].decode("utf-8", "replace")
            raise Stuck(f"lowmem run ended with {self._process.returncode}: {tail}")
        known = len(self._seen[-8:])
        window = self._seen[-8:] + data
        for code in (_OPEN, _CLOSED, _WHERE):
            new = window.count(code) - window[:known].count(code)
            if code is _OPEN:
                self._opened += new
            elif code is _CLOSED:
                self._shut += new
            else:
                os.write(self._handle, b"\x1b[1;1R" * new)
        self._seen = (self._seen + data)[-2000:]
        return True
