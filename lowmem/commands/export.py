"""`lowmem export MODEL [OUT.gguf]`: write a checkpoint as a GGUF file, for llama.cpp and Ollama."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from lowmem.text.standard import print_json

if TYPE_CHECKING:
    from lowmem.export.export import Exported

_OPENRAIL = "bigcode-openrail-m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem export`."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder of a converted or 16-bit checkpoint, its name in lowmem list, or hub id",
    )
    parser.add_argument(
        "out", metavar="OUT.gguf", nargs="?", type=Path, help="file to write (default: NAME-TYPE.gguf here)"
    )
    parser.add_argument(
        "--head",
        choices=("stored", "f16", "bf16", "q8_0"),
        default="stored",
        help="type of embedding and head; q8_0 halves them and rounds (default: %(default)s, which is exact)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT.gguf")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Export, and print what the file holds. Returns 0. Raises LowmemError for what the user can correct."""
    from lowmem.export.export import ExportOptions, export

    show = sys.stderr.isatty() and not args.json
    options = ExportOptions(None if args.head == "stored" else args.head, args.force, args.revision)
    signal.signal(signal.SIGTERM, _as_interrupt)
    found = export(
        _place(args.model), args.out, options, _tell, _show_progress if show else lambda done, total: None
    )
    if show:
        print("\r\x1b[K", end="", file=sys.stderr)
    if args.json:
        print_json(_record(found))
    else:
        for line in describe(found):
            print(line)
    return 0


def describe(found: Exported) -> list[str]:
    """What the file holds, what was rounded, what it cannot hold, and its licence: a line each."""
    from lowmem.text.units import format_bytes

    kinds = ", ".join(f"{count} {kind}" for kind, count in found.kinds)
    exact = "without loss" if not found.losses else "with the losses below"
    lines = [
        f"wrote {found.path}: {format_bytes(found.nbytes)}, {found.bits_per_weight:.2f} bits per weight "
        f"in the linears ({kinds}), {exact}"
    ]
    for loss in found.losses:
        lines.append(
            f"rounded: {len(loss.tensors)} × {loss.what}: relative error {loss.relative:.2e}, "
            f"largest {loss.largest:.2e}"
        )
    lines += [f"note: {note}" for note in found.notes]
    if found.license == _OPENRAIL:
        lines.append(f"licence: {_OPENRAIL}; its use restrictions bind this file too: pass them on with it")
    elif found.license:
        lines.append(f"licence: {found.license}, as the checkpoint's")
    else:
        lines.append(
            "licence: the checkpoint names none; look up its base model's before you pass the file on"
        )
    return lines


def _record(found: Exported) -> dict[str, object]:
    return {
        "path": str(found.path),
        "bytes": found.nbytes,
        "linears": dict(found.kinds),
        "bits_per_weight": found.bits_per_weight,
        "exact": not found.losses,
        "rounded": [
            {
                "what": loss.what,
                "tensors": sorted(loss.tensors),
                "relative_error": loss.relative,
                "largest_error": loss.largest,
            }
            for loss in found.losses
        ],
        "notes": list(found.notes),
        "license": found.license,
    }


def _place(model: str) -> str:
    """A checkpoint in lowmem's cache by its name in `lowmem list`; anything else as typed."""
    from lowmem.checkpoint.cache import entries, find
    from lowmem.checkpoint.files.home import typed_path

    if typed_path(model).exists() or not any(entry.name == model for entry in entries()):
        return model
    return str(find(model).path)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show_progress(done: int, total: int) -> None:
    print(f"\r{100 * done // max(total, 1):3d} %", end="", file=sys.stderr, flush=True)


def _as_interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
