"""A server in a process of its own: started, waited for, watched, and stopped with all of its children.

It runs in its own process group, so that Ctrl-C reaches only us and we end it in order, and so that whatever
it leaves can be found. Its output goes into a file: a pipe that nobody reads would stop it.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from lowmem.errors import InvalidRequestError, LowmemError
from lowmem.platform import system

TICK = 0.2
"""Seconds between two looks at the process and at signals."""
LOOK = 5.0
"""Seconds between two questions for its health while it serves."""
LAST_WORDS = 10.0
"""Seconds to end after the time for answers is over."""
_LEFT = 3.0
"""Seconds for the children of a process that has ended."""
_OUR_OWN = ("LOWMEM_API_KEY",)
"""Not for another program."""


class EngineEnded(LowmemError):
    """The server's process ended by itself."""

    was_ready = True
    """Whether it had answered before."""


class Interrupts:
    """Counts SIGINT, SIGTERM and SIGHUP instead of ending the program."""

    def __init__(self) -> None:
        self.count = 0

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Count while this runs; a signal that is ignored stays so, as under nohup."""
        names = ("SIGINT", "SIGTERM", "SIGHUP")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


class ServerProcess:
    """A server that listens at host:port and answers /health with 200 when it is ready."""

    def __init__(self, address: tuple[str, int], log: Path, interrupts: Interrupts) -> None:
        self.log = log
        self._address, self._interrupts = address, interrupts
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def start(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it. Raises InvalidRequestError if the program cannot be run."""
        inherited = {name: value for name, value in os.environ.items() if name not in _OUR_OWN}
        try:
            with self.log.open("ab") as output:
                self._process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**inherited, **environment},
                    **system.NEW_GROUP,
                    **system.ENDS_WITH_US,
                )
        except OSError as error:
            reason = error.strerror or str(error)
            raise InvalidRequestError(f"cannot run {words[0]}: {reason}", "Install it again") from error

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return None if self._process is None else self._process.poll()

    def wait_until_ready(self, progress: Callable[[float], None]) -> bool:
        """Wait for /health. Returns False after a signal. Raises EngineEnded if the process ends.

        progress: called with the seconds since the start.
        """
        start = time.monotonic()
        while not self._interrupts.count:
            if self.code is not None:
                error = EngineEnded("the process ended before it was ready")
                error.was_ready = False
                raise error
            if self.health() == 200:
                return True
            progress(time.monotonic() - start)
            time.sleep(TICK)
        return False

    def watch(self, notify: Callable[[str], None]) -> None:
        """Return after a signal. Raises EngineEnded if the process ends. notify: told when health changes."""
        healthy, asked = True, time.monotonic()
        while not self._interrupts.count:
            if self.code is not None:
                raise EngineEnded("the process ended")
            if time.monotonic() - asked > LOOK:
                found, asked = self.health() == 200, time.monotonic()
                if found != healthy:
                    notify("it is healthy again" if found else "it no longer answers that it is healthy")
                healthy = found
            time.sleep(TICK)

    def health(self) -> int | None:
        """The status of GET /health; None while nothing listens."""
        connection = http.client.HTTPConnection(*self._address, timeout=LOOK)
        try:
            connection.request("GET", "/health", headers={"Host": "localhost"})
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def stop(self, seconds: float) -> bool:
        """End it, and all of its children. Returns False if a further signal cut the time for answers short.

        seconds: for running answers.
        """
        process, signals = self._process, self._interrupts.count
        if process is None or self._stopped:
            return True
        if process.poll() is None:
            process.terminate()
            until = time.monotonic() + seconds + LAST_WORDS
            while process.poll() is None and time.monotonic() < until and self._interrupts.count == signals:
                time.sleep(TICK)
        in_order = process.poll() is not None
        self._end_group(_LEFT if in_order else 0)
        process.wait()
        self._stopped = True  # the group's number may be another's from now on
        return self._interrupts.count == signals

    def _end_group(self, seconds: float) -> None:
        """Give the rest of the process group some time, then kill it."""
        assert self._process is not None
        self._wait_for_group(seconds)
        system.kill_group(self._process)
        self._wait_for_group(_LEFT)

    def _wait_for_group(self, seconds: float) -> None:
        assert self._process is not None
        until = time.monotonic() + seconds
        while time.monotonic() < until and system.group_runs(self._process):
            time.sleep(TICK / 10)


def reachable(host: str) -> str:
    """The address at which this machine reaches a server that listens at `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
