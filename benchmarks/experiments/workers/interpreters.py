"""Which peers are installed, and in which interpreters."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass

from lowmem.errors import InvalidRequestError

PEERS = (
    # name, module, pip requirement, the option that names an interpreter of its own
    ("GPTQModel", "gptqmodel", "gptqmodel==7.7", ""),
    ("bitsandbytes", "bitsandbytes", "bitsandbytes", ""),
    ("llama.cpp", "llama_cpp", "llama-cpp-python", "--llama-python"),
    ("AutoRound", "auto_round", "auto-round", "--autoround-python"),
)


@dataclass(frozen=True)
class Peers:
    """The peers to compare with."""

    names: frozenset[str] = frozenset()
    llama: str = sys.executable
    """The interpreter that has llama-cpp-python."""
    autoround: str = sys.executable
    """The interpreter that has AutoRound."""
    left_out: tuple[str, ...] = ()
    """A line for each peer that is not installed."""

    def llama_version(self) -> str:
        """The version of llama-cpp-python; empty without llama.cpp."""
        if "llama.cpp" not in self.names:
            return ""
        ask = "from importlib.metadata import version; print(version('llama-cpp-python'))"
        return subprocess.check_output([self.llama, "-c", ask], text=True).strip()


def find_peers(llama: str | None = None, autoround: str | None = None) -> Peers:
    """The installed peers. llama, autoround: interpreters that have these peers, None for this one.

    Raises InvalidRequestError for an interpreter that lacks its peer.
    """
    interpreters = {"llama.cpp": llama, "AutoRound": autoround}
    names, left_out = [], []
    for name, module, requirement, option in PEERS:
        python = interpreters.get(name)
        if python is None:
            if importlib.util.find_spec(module) is None:
                where = f", or name another interpreter with {option} PYTHON" if option else ""
                left_out.append(f"{name} is left out: pip install {requirement}{where}")
                continue
        elif not _has(python, module, option):
            raise InvalidRequestError(
                f"{python} has no {requirement}", f"Install it: {python} -m pip install {requirement}"
            )
        names.append(name)
    return Peers(frozenset(names), llama or sys.executable, autoround or sys.executable, tuple(left_out))


def _has(python: str, module: str, option: str) -> bool:
    check = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        return not subprocess.run([python, "-c", check], capture_output=True, check=False).returncode
    except OSError as error:
        raise InvalidRequestError(
            f"{python} cannot be run: {error.strerror}", f"Give {option} an interpreter"
        ) from error
