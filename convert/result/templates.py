"""Store chat templates in a converted checkpoint, whose files all lie in one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem.checkpoint.files.reading import read_json
from lowmem.checkpoint.files.whole import FileDigest, write_json, write_whole

TEMPLATE_FILE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"


def store_templates(
    folder: Path, templates: str | Mapping[str, str] | None, digests: dict[str, FileDigest]
) -> None:
    """Write the templates in use where transformers' tokenizers read them, unless they already do.

    One template becomes chat_template.jinja; several, which may come from a folder of their own, become the
    list in tokenizer_config.json. digests: of the files in `folder`; brought up to date.
    """
    if not templates or templates == _stored(folder):
        return
    if isinstance(templates, str):
        digests[TEMPLATE_FILE] = write_whole(folder / TEMPLATE_FILE, [templates.encode()])
        return
    (folder / TEMPLATE_FILE).unlink(missing_ok=True)  # it would hide the list
    digests.pop(TEMPLATE_FILE, None)
    settings: dict[str, Any] = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    digests[_CONFIG] = write_json(folder / _CONFIG, settings)


def _stored(folder: Path) -> Any:
    """The templates that transformers' tokenizers read in a folder without folders inside."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    if not (folder / _CONFIG).is_file():
        return None
    stored = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("chat_template")
    if isinstance(stored, list):
        return {entry["name"]: entry["template"] for entry in stored}
    return stored
