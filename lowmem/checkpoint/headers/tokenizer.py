"""Tokenizer files, checked before transformers reads them.

transformers reads them whole, with its own parsers, and opens further files that they name.
"""

from __future__ import annotations

import os
from pathlib import Path

from lowmem.checkpoint.files.links import check_folder
from lowmem.checkpoint.files.patterns import TOKENIZER_PATTERNS
from lowmem.checkpoint.files.reading import about_values, is_plain_name, read_json
from lowmem.errors import SourceError

MAX_TOKENIZER = 64 * 2**20
"""Bytes of one file; the largest vocabularies (260,000 tokens) take 35 MB."""
MAX_TOKENIZER_VALUES = 5_000_000
"""Values in one file; 260,000 tokens with 515,000 merges are two million."""
MAX_TOKEN_ID = 2**24
_SMALL = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.json",
)
# Settings that name files to open. Not `tokenizer_file`: many published files hold its path on another
# machine, and transformers ignores it.
_OPENED = (
    *("vocab_file", "merges_file", "spm_file", "source_spm", "target_spm", "vocab", "merges"),
    *("gguf_file", "fast_tokenizer_files", "tokenizer_object", "init_inputs"),
)


def check_tokenizer_files(folder: Path) -> None:
    """Raise SourceError for tokenizer files that lead out of the folder, are not JSON, or are too large."""
    check_folder(folder)
    for pattern in (*TOKENIZER_PATTERNS, "chat_template.jinja"):
        for file in folder.glob(pattern):
            if not file.is_file():
                continue
            size = file.stat().st_size
            if size > MAX_TOKENIZER or (
                size > MAX_TOKENIZER_VALUES and about_values(file.read_bytes()) > MAX_TOKENIZER_VALUES
            ):
                raise SourceError(f"{file} is larger than any tokenizer: {size} bytes", "Download it again")
    for name in _SMALL:
        file = folder / name
        if file.is_file():
            settings = read_json(file)
            if name == "tokenizer_config.json":
                _check_settings(folder, file, settings)


def _check_settings(folder: Path, file: Path, settings: dict[str, object]) -> None:
    for key in _OPENED:
        value = settings.get(key)
        for path in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(path, str) and not is_plain_name(path) and _exists(folder / path):
                raise SourceError(
                    f"{file} names a file outside its folder: {key} is {path[:200]!r}",
                    "Move that file into the folder, and remove the entry",
                )
    tokens = settings.get("added_tokens_decoder")
    for number in tokens if isinstance(tokens, dict) else ():
        if not number.isdecimal() or len(number) > 9 or int(number) > MAX_TOKEN_ID:
            raise SourceError(
                f"{file} has a token with the id {number[:40]!r}, which no vocabulary has",
                "Download it again",
            )


def _exists(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):  # a zero byte, or too long a name
        return False
