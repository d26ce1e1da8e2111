"""Whether Triton can run here. Importing this module imports neither torch nor Triton."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

from lowmem.cards.contract import Cards
from lowmem.cards.find import cards_of, is_card


def compiler() -> str | None:
    """The C compiler that Triton would use, or None."""
    names = (os.environ.get("CC"), "gcc", "clang", "cc", "cl")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def nvcc() -> str | None:
    """CUDA's compiler, with which GPTQModel builds kernels, or None."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (found := shutil.which("nvcc", path=str(Path(home) / "bin"))):
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@functools.cache
def why_not_triton(device: str = "cuda") -> str:
    """What our kernels lack on a device ("cuda:0", "xpu:0", or "cpu" for the interpreter); "" if nothing.

    Triton compiles kernels by itself, but needs a C compiler once, for the code that launches them.
    """
    cards = cards_of(device) if is_card(device) else None
    if cards and not cards.triton:
        return f"Triton does not compile for {cards.maker}'s GPUs"
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed: {install_advice(cards)}"
    if cards and cards.triton not in (present := _backends()):
        return f"this Triton is for {' and '.join(present)}, not for {cards.triton}: {install_advice(cards)}"
    if cards is None or os.name == "nt":  # triton-windows brings a compiler
        return ""
    missing = [] if compiler() else ["gcc"]
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        missing.append("python3-dev")
    install = f"Triton needs a C compiler and Python's headers: apt install {' '.join(missing)}"
    return install if missing else ""


def install_advice(cards: Cards | None) -> str:
    """How to get a Triton that compiles for a kind of cards."""
    if cards and cards.triton == "intel":
        return "install torch for XPU, which brings it"
    return f"pip install {'triton-windows' if os.name == 'nt' else 'triton'}"


def _backends() -> list[str]:
    """What the installed Triton compiles for, as "amd" and "nvidia"."""
    return sorted({entry.name for entry in importlib.metadata.entry_points(group="triton.backends")})
