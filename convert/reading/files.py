"""The bytes of a file, unpacked and decoded. A file that is not text is refused by what it is."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from pathlib import Path
from typing import IO, Any

from lowmem.errors import CalibrationError

FILE_LIMIT = 1 << 28
"""Bytes that are read, unpacked: far more than calibration needs, and small enough for memory."""
KINDS = "Use text, JSON, JSON Lines, CSV, Parquet or Arrow"
"""The next step after a file of another kind."""
PACKED = (".gz", ".zst", ".bz2", ".xz")
"""Suffixes of compressed files; what follows is decided by the name without them."""

_TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow"}
_BINARY = {
    b"GGUF": "a GGUF file",
    b"%PDF": "a PDF",
    b"SQLite format 3\0": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x7fELF": "a program",
    b"Obj\1": "an Avro file",
    b"ORC": "an ORC file",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
}
_PICKLE = re.compile(rb"\x80[\x02-\x05]|\((?:lp|dp)\d+\n|c(?:copy_reg|__builtin__|builtins)\n")
_PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib")
_HEAD = 4096
_MARKS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def suffix_of(path: Path) -> str:
    """The lower-case suffix of a file's name, without that of its compression."""
    inner = Path(path.name.lower())
    return Path(inner.stem).suffix if inner.suffix in PACKED else inner.suffix


def head_of(path: Path) -> bytes:
    """The first bytes of a regular file; nothing of a pipe, which could be read only once."""
    return _guarded(path, lambda stream: stream.read(_HEAD)) if path.is_file() else b""


def table_kind(head: bytes, path: Path) -> str | None:
    """ "parquet" or "arrow", by a file's first bytes; datasets' .arrow streams have a suffix only."""
    found = next((kind for magic, kind in _TABLES.items() if head.startswith(magic)), None)
    return found or ("arrow" if path.suffix.lower() == ".arrow" and head[:4] == b"\xff" * 4 else None)


def read_bytes(path: Path) -> bytes:
    """Read a file and unpack gzip, zstd, bzip2 and xz.

    Raises CalibrationError if it cannot be read, is too large, or is of a binary kind.
    """
    raw = _guarded(path, lambda stream: stream.read(FILE_LIMIT + 1))
    raw = _unpacked(raw, path)
    if len(raw) > FILE_LIMIT:
        raise CalibrationError(f"{path} is larger than {FILE_LIMIT >> 20} MiB", "Use a part of it")
    if kind := _binary_kind(raw, path):
        raise CalibrationError(f"{path} is {kind}", KINDS)
    return raw


def decode(raw: bytes) -> str:
    """Text of UTF-8, or of UTF-16 or UTF-32 that begins with a byte order mark.

    Bytes that are not UTF-8 become lone surrogates (surrogateescape), so that one bad row costs no others.
    """
    for mark, encoding in _MARKS.items():
        if raw.startswith(mark):
            return raw.decode(encoding, "replace")
    if unmarked := _unmarked_utf16(raw[:_HEAD]):
        return raw.decode(unmarked, "replace")
    return raw.decode("utf-8-sig", "surrogateescape")


def plain_text(text: str, path: Path) -> str:
    """A decoded text with the line ends of Unix. Raises CalibrationError if it is not text."""
    if "\0" in text:
        raise CalibrationError(f"{path} is a binary file", KINDS)
    if bad := re.search("[\ud800-\udfff]", text):
        line = text.count("\n", 0, bad.start()) + 1
        raise CalibrationError(
            f"{path} is not UTF-8 text (line {line})", "Convert it to UTF-8, with iconv for example"
        )
    return text.replace("\r\n", "\n")


def _guarded(path: Path, read: Any) -> bytes:
    """Call `read` with the open file. Raises CalibrationError if that fails."""
    try:
        with path.open("rb") as stream:
            found: bytes = read(stream)
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise CalibrationError(
            f"{path} cannot be read: {reason}", "Check its path and permissions"
        ) from error
    return found


def _unpacked(raw: bytes, path: Path) -> bytes:
    try:
        if raw.startswith(b"\x1f\x8b"):
            return gzip.GzipFile(fileobj=io.BytesIO(raw)).read(FILE_LIMIT + 1)
        if raw.startswith(b"BZh"):
            return bz2.BZ2File(io.BytesIO(raw)).read(FILE_LIMIT + 1)
        if raw.startswith(b"\xfd7zXZ\0"):
            return lzma.LZMAFile(io.BytesIO(raw)).read(FILE_LIMIT + 1)
        if raw.startswith(b"\x28\xb5\x2f\xfd"):
            return _unpacked_zstd(raw, path)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise CalibrationError(
            f"{path} cannot be unpacked: {str(error).splitlines()[0] if str(error) else 'damaged'}",
            "Copy or download it again",
        ) from error
    return raw


def _unpacked_zstd(raw: bytes, path: Path) -> bytes:
    try:
        import pyarrow
    except ImportError as error:
        raise CalibrationError(
            f"{path} is packed with zstd, which needs the package pyarrow",
            f"Unpack it with zstd -d, or: {INSTALL}",
        ) from error
    stream: IO[bytes] = pyarrow.CompressedInputStream(pyarrow.BufferReader(raw), "zstd")
    return stream.read(FILE_LIMIT + 1)


INSTALL = "pip install 'lowmem[datasets]'"
"""Installs pyarrow, which reads Parquet, Arrow and zstd."""


def _binary_kind(raw: bytes, path: Path) -> str | None:
    """What a file is, if it cannot be text."""
    if raw.startswith(b"PK\3\4"):
        return "a PyTorch file" if suffix_of(path) in _PICKLE_SUFFIXES else "a zip archive or a document"
    if _PICKLE.match(raw) or suffix_of(path) in _PICKLE_SUFFIXES:
        return "a Python pickle, which lowmem never opens: it can run programs"
    found = next((kind for magic, kind in _BINARY.items() if raw.startswith(magic)), None)
    if found or raw[257:262] == b"ustar":
        return found or "a tar archive"
    marked = raw.startswith(tuple(_MARKS))
    binary = b"\0" in raw[:_HEAD] and not marked and not _unmarked_utf16(raw[:_HEAD])
    return "a binary file" if binary else None


def _unmarked_utf16(head: bytes) -> str | None:
    """The encoding of UTF-16 without a byte order mark: every other byte of Latin text is zero."""
    half = len(head) // 2
    zeros = head[: 2 * half : 2].count(0), head[1::2].count(0)
    for encoding, many, few in (("utf-16-le", zeros[1], zeros[0]), ("utf-16-be", zeros[0], zeros[1])):
        if half >= 2 and many > 0.6 * half and few <= 0.01 * half:
            return encoding
    return None
