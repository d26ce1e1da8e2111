"""What describes a GPTQ checkpoint: its `quantization_config`, and the manifest with its files' digests."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowmem.checkpoint.files.links import check_folder
from lowmem.checkpoint.files.reading import is_plain_name, read_json
from lowmem.checkpoint.files.whole import FileDigest, write_whole
from lowmem.checkpoint.foreign import foreign_method
from lowmem.checkpoint.formats import (
    FormatException,
    LinearFormat,
    QuantizationFormat,
    exceptions_for,
    layout_for,
)
from lowmem.checkpoint.gptq_config import parse_quantization
from lowmem.checkpoint.headers.config import read_config
from lowmem.config import QuantConfig
from lowmem.errors import SourceError, VerifyError

MANIFEST_FILE = "lowmem-manifest.json"
REPORT_FILE = "lowmem-report.json"
"""What the converter did, and with what error."""
_DIGEST_CHUNK = 1 << 20


def read_quantization(folder: str | Path) -> QuantizationFormat:
    """The format of the GPTQ checkpoint in `folder`.

    From config.json's `quantization_config`, otherwise from quantize_config.json, as old auto-gptq wrote it.
    Raises SourceError when there is neither, or it is not a GPTQ format that can be read.
    """
    found = find_quantization(folder)
    if found is None:
        raise SourceError(
            f"{folder} has no quantization_config", "Convert it first: lowmem convert SOURCE OUT"
        )
    return found


def find_quantization(path: str | Path) -> QuantizationFormat | None:
    """As `read_quantization`, but None for a checkpoint that is not quantized."""
    folder = Path(path).parent if os.path.isfile(path) else Path(path)
    check_folder(folder)
    file = folder / "config.json"
    return quantization_in(read_config(file) if file.is_file() else {}, folder)


def quantization_in(config: Mapping[str, Any], folder: Path) -> QuantizationFormat | None:
    """Return the format that `config`, or else quantize_config.json, declares; None if neither does.

    config: the object in the folder's config.json. Raises SourceError if the format cannot be read.
    """
    file, data = folder / "config.json", config.get("quantization_config")
    if data is None and (folder / "quantize_config.json").is_file():
        file = folder / "quantize_config.json"
        data = read_json(file)
        if "quant_method" not in data and not foreign_method(data):
            data = {"quant_method": "gptq", **data}  # auto-gptq often leaves it out of its own file
    if data is None:
        return None
    if not isinstance(data, dict):
        raise SourceError(f"quantization_config in {file} is not an object")
    return parse_quantization(data, str(file))


def quantization_config_dict(
    config: QuantConfig, *, version: str, linears: Mapping[str, LinearFormat | None] | None = None
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint quantized with `config` by lowmem `version`.

    linears: those that are stored otherwise, by full name; None for one that is not quantized. They become
    GPTQModel's `dynamic`.

    desc_act is false even when columns were quantized in act-order: the groups are static, so g_idx is
    column // group_size and readers need no permutation. `static_groups` and `meta.act_order` record it.
    Raises ValueError for a group size that the converter has not chosen yet.
    """
    if config.group_size == 0:
        raise ValueError("the group size is not chosen yet")
    exceptions = exceptions_for(linears or {})
    formats = [exception.format for exception in exceptions if exception.format]
    quantizer = [f"lowmem:{version}"]
    if not all((config.sym, *(format.sym for format in formats))):
        # GPTQModel refuses asymmetric v1 files unless the quantizer is a GPTQModel version with exact
        # zero-points. Ours are exact (1..2^bits-1, see packing.py).
        quantizer.append("gptqmodel:0.9.0:zero-points")
    return {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "sym": config.sym,
        "desc_act": False,
        "static_groups": config.desc_act,
        "damp_percent": config.damp_percent,
        "true_sequential": config.true_sequential,
        "lm_head": False,
        "checkpoint_format": layout_for((config.bits, *(format.bits for format in formats))),
        "pack_dtype": "int32",
        **({"dynamic": dict(_dynamic(exception) for exception in exceptions)} if exceptions else {}),
        "meta": {
            "quantizer": quantizer,
            "act_order": config.desc_act,
            "correction": config.correction,
            "passes": config.passes,
            "tune_steps": config.tune_steps,
        },
    }


def _dynamic(exception: FormatException) -> tuple[str, dict[str, int | bool]]:
    """An entry of GPTQModel's `dynamic`."""
    format = exception.format
    if format is None:
        return f"-:{exception.pattern}", {}
    settings = {"bits": format.bits, "group_size": format.group_size, "sym": format.sym}
    return f"+:{exception.pattern}", settings


def digest_file(file: Path, on_bytes: Callable[[int], None] | None = None) -> FileDigest:
    """The sha256 and length of a file, read 1 MiB at a time; `on_bytes` gets each piece's length."""
    sha, length = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while piece := stream.read(_DIGEST_CHUNK):
            sha.update(piece)
            length += len(piece)
            if on_bytes:
                on_bytes(len(piece))
    return FileDigest(sha.hexdigest(), length)


def checkpoint_files(folder: Path) -> list[str]:
    """Names of the files in `folder` that a manifest lists, sorted: all plain files but the manifest."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_file() and entry.name != MANIFEST_FILE)


def manifest_text(digests: Mapping[str, FileDigest]) -> str:
    """The text of `lowmem-manifest.json` for these files."""
    files = {name: vars(digest) for name, digest in digests.items()}
    return json.dumps({"version": 1, "files": files}, indent=1) + "\n"


def write_manifest(folder: str | Path, digests: Mapping[str, FileDigest] | None = None) -> None:
    """Write `lowmem-manifest.json` atomically, with the digest of every file of `folder`.

    digests: known digests, of files that are not read again. Raises OutputError when it cannot be written.
    """
    folder, known = Path(folder), digests or {}
    files = {name: known.get(name) or digest_file(folder / name) for name in checkpoint_files(folder)}
    write_whole(folder / MANIFEST_FILE, [manifest_text(files).encode()])


def read_manifest(folder: str | Path) -> dict[str, FileDigest] | None:
    """The digests by file name; None when the folder has no manifest, as lowmem did not write it.

    Raises VerifyError for a manifest that is damaged, or names a file outside the folder.
    """
    file = Path(folder) / MANIFEST_FILE
    if not file.is_file():
        return None
    try:
        data = read_json(file)
    except SourceError as error:
        raise VerifyError(error.message, "The manifest is damaged; convert or download again") from None
    files = data.get("files")
    if data.get("version") != 1 or not isinstance(files, dict):
        raise VerifyError(f"{file} is not a manifest of version 1", "Update lowmem, or convert again")
    manifest = {}
    for name, entry in files.items():
        sha = entry.get("sha256") if isinstance(entry, dict) else None
        length = entry.get("bytes") if isinstance(entry, dict) else None
        if not is_plain_name(name) or not isinstance(sha, str) or not isinstance(length, int):
            raise VerifyError(f"{file}: the entry {name!r} is malformed", "Convert or download again")
        manifest[name] = FileDigest(sha.lower(), length)
    return manifest
