"""A folder, a file or a hub id → one lazy `Source`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowmem.checkpoint.files.home import typed_path
from lowmem.checkpoint.files.reading import is_hub_id
from lowmem.checkpoint.foreign import check_disguise, refuse_foreign
from lowmem.checkpoint.formats import QuantizationFormat
from lowmem.checkpoint.headers.bin import read_bin_shard
from lowmem.checkpoint.headers.folder import headers_by_name, layout_of, read_config_json
from lowmem.checkpoint.headers.gguf import is_gguf
from lowmem.checkpoint.headers.safetensors import read_header
from lowmem.checkpoint.manifest import quantization_in
from lowmem.checkpoint.source.base import Source, TensorInfo
from lowmem.checkpoint.source.bin import BinSource
from lowmem.checkpoint.source.gguf import GgufSource
from lowmem.checkpoint.source.hub import download
from lowmem.checkpoint.source.safetensors import SafetensorsSource
from lowmem.errors import SourceError

__all__ = ["Source", "TensorInfo", "open_source"]


def open_source(
    source: str | Path,
    revision: str | None = None,
    offline: bool = False,
    progress: Callable[[str], None] | None = None,
    *,
    quantized: bool = True,
    check: Callable[[Path], None] | None = None,
) -> Source:
    """Open a checkpoint for lazy reading; only headers and config.json are read.

    source: a folder with safetensors or .bin shards or one GGUF, a .safetensors or .gguf file, or a hub id
    `owner/name` (downloaded; `revision` and `offline` apply to the download). A path that exists is always
    local. progress: called with a line of text while a download goes on. quantized: accept GPTQ checkpoints.
    check: called with the folder of a hub id before its weights are downloaded; it raises to refuse them.
    Raises SourceError for everything that cannot be read, naming the file and tensor at fault.
    """
    display = str(source)
    path = typed_path(display)
    try:
        found = bool(display) and path.exists()
    except (OSError, ValueError):  # a name too long, or with a zero byte
        found = False
    if found and not path.is_dir():
        return _open_file(path, display, quantized)
    if not found and not is_hub_id(display):
        raise SourceError(
            f"{display!r} does not exist", "Give a folder, a .safetensors or .gguf file, or owner/name"
        )

    def check_first(folder: Path) -> None:
        _read_config(folder, quantized)
        if check:
            check(folder)

    folder = path if found else download(display, revision, offline, progress, check_first)
    return _open_folder(folder, display, quantized)


def _open_file(path: Path, display: str, quantized: bool) -> Source:
    if not path.is_file():
        raise SourceError(f"{display} is neither a file nor a folder")
    if path.stat().st_size == 0:
        raise SourceError(f"{display} is empty (0 bytes)", "Download or copy it again")
    if path.suffix == ".gguf" or is_gguf(path):
        return GgufSource(path, display)
    if path.suffix == ".safetensors":
        config, format = _read_config(path.parent, quantized)
        header = read_header(path)
        return SafetensorsSource(path.parent, display, dict.fromkeys(header.tensors, header), config, format)
    check_disguise(path)
    raise SourceError(
        f"{display} is not a checkpoint that can be read",
        "Give a folder, a .safetensors file or a .gguf file",
    )


def _open_folder(folder: Path, display: str, quantized: bool) -> Source:
    layout = layout_of(folder, display)
    if layout.kind == "gguf":
        return GgufSource(folder / layout.files[0], display)
    config, format = _read_config(folder, quantized)
    if format is not None and (folder / "adapter_config.json").is_file():
        raise SourceError(f"{folder} holds an adapter, not a model", "Give the folder of the whole model")
    if layout.kind == "safetensors":
        headers = headers_by_name(folder, layout, read_header)
        return SafetensorsSource(folder, display, headers, config, format)
    return BinSource(folder, display, headers_by_name(folder, layout, read_bin_shard), config, format)


def _read_config(folder: Path, quantized: bool) -> tuple[Mapping[str, Any], QuantizationFormat | None]:
    """config.json of a folder, and its format; SourceError where the caller cannot use a quantized model."""
    config = read_config_json(folder)
    refuse_foreign(folder, config)
    format = quantization_in(config, folder)
    if format is not None and not quantized:
        raise SourceError(
            f"{folder} is already quantized ({format.label})", "Use the 16-bit original instead"
        )
    return config, format
