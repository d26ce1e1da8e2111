"""Tokenizer files, checked before transformers reads them.

transformers reads them whole, with its own parsers, and opens further files that they name.
"""

from __future__ import annotations

import os
from pathlib import Path

from lowmem.checkpoint.files.links import check_file, check_folder
from lowmem.checkpoint.files.patterns import PROCESSOR_FILE, TEMPLATE_FOLDER, TOKENIZER_PATTERNS
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
    PROCESSOR_FILE,
)
MAX_TEMPLATE_FILE = 2**22
"""Bytes of one file of a chat template."""
MAX_TEMPLATES = 64
"""Named templates in one folder; those with most have three."""
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
            _named(settings.get("chat_template"), file)
            if name == "tokenizer_config.json":
                _check_settings(folder, file, settings)
    _check_templates(folder)


def template_files(folder: Path) -> list[Path]:
    """The files that hold chat templates and do not lie beside the tokenizer's own."""
    processor = folder / PROCESSOR_FILE
    named = sorted(path for path in (folder / TEMPLATE_FOLDER).glob("*.jinja") if path.is_file())
    return [*([processor] if processor.is_file() else []), *named]


def processor_template(folder: Path) -> str | dict[str, str] | None:
    """The chat templates of a model whose processor holds them, not its tokenizer; None without one.

    In the order in which transformers' processors look: processor_config.json, then chat_template.json.
    """
    for name in (PROCESSOR_FILE, "chat_template.json"):
        if (folder / name).is_file():
            found = _named(read_json(folder / name).get("chat_template"), folder / name)
            if found:
                return found
    return None


def _named(value: object, file: Path) -> str | dict[str, str] | None:
    """A `chat_template` setting: one template, or several by name, from a list or an object.

    Raises SourceError for anything else.
    """
    if value is None or isinstance(value, str):
        return value
    entries = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list):
        entries = [
            (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
            for entry in value
        ]
    found = {name: text for name, text in entries if isinstance(name, str) and isinstance(text, str)}
    if len(found) != len(entries) or not isinstance(value, (list, dict)):
        raise SourceError(
            f"chat_template in {file} is neither a text nor a list of templates with names",
            "Replace the file by the model's own",
        )
    return found


def _check_templates(folder: Path) -> None:
    """Raise SourceError for too many named templates, large ones, and links that lead out of the folder."""
    files = [*(folder / TEMPLATE_FOLDER).glob("*.jinja")]
    if len(files) > MAX_TEMPLATES:
        raise SourceError(f"{folder / TEMPLATE_FOLDER} holds {len(files)} templates", "Download it again")
    for file in (folder / "chat_template.jinja", *files):
        check_file(file)
        if file.is_file() and file.stat().st_size > MAX_TEMPLATE_FILE:
            raise SourceError(
                f"{file} is larger than any chat template: {file.stat().st_size} bytes", "Download it again"
            )


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
