"""The checksums in pickle shards: torch.save writes a zip, which holds one for every tensor."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from lowmem.checkpoint.files.reading import one_line
from lowmem.checkpoint.headers.bin import read_bin_header

_CHUNK = 1 << 20


def checksum_faults(shard: Path, on_bytes: Callable[[int], None]) -> list[tuple[str, str]]:
    """(tensor, problem) for every zip entry whose bytes do not match its checksum; "" if no tensor is in it.

    Reads 1 MiB at a time and calls on_bytes with each piece's length. Raises SourceError when the file is not
    an archive of torch.save.
    """
    names: dict[str, list[str]] = {}
    for name, tensor in read_bin_header(shard).items():
        names.setdefault(tensor.key, []).append(name)
    faults = []
    with zipfile.ZipFile(shard) as archive:
        for entry in archive.infolist():
            try:
                with archive.open(entry) as stream:
                    while piece := stream.read(_CHUNK):
                        on_bytes(len(piece))
            except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
                what = f"cannot be read: {one_line(error)}"
                if "CRC" in str(error):
                    what = "was changed: its bytes do not have the archive's checksum"
                for name in names.get(entry.filename.rpartition("/data/")[2], [""]):
                    faults.append((name, what if name else f"{one_line(Exception(entry.filename))} {what}"))
    return faults
