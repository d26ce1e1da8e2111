"""The checksums of pickle shards: torch.save writes a zip, which has one of every tensor's bytes."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from lowmem.checkpoint.files.reading import one_line
from lowmem.checkpoint.headers.bin import read_bin_header

_CHUNK = 1 << 20


def checksum_faults(shard: Path, on_bytes: Callable[[int], None]) -> list[tuple[str, str]]:
    """(tensor, problem) for every entry with a wrong checksum; the name is "" if it is not a tensor.

    Reads 1 MiB at a time and calls on_bytes with the length of each piece. Raises SourceError if the file is
    not such an archive.
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
