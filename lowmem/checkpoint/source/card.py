"""The licence and the base model that a model card names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MAX_CARD = 4_000_000
"""Bytes read of a card."""
MAX_ENTRIES = 4096
"""Characters of the entries that are parsed."""


def license_of_card(card: Path) -> str | None:
    """`license` (or the `license_name` of "other") in the YAML front matter of a model card."""
    front = _front(card, ("license", "license_name"))
    license = front.get("license")
    if license == "other" and front.get("license_name"):
        license = front["license_name"]
    if isinstance(license, list) and license:
        license = license[0]
    if not isinstance(license, str) or not license.strip() or not license.isprintable():
        return None
    return license.strip()[:100]


def base_model_of_card(card: Path) -> str | None:
    """`base_model` in the front matter of a model card: a hub id, or the name of a folder."""
    base = _front(card, ("base_model",)).get("base_model")
    if isinstance(base, list) and len(base) == 1:
        base = base[0]
    if not isinstance(base, str) or not base.strip() or not base.isprintable():
        return None
    return base.strip()[:200]


def _front(card: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """These entries of the YAML front matter of a model card; empty where it cannot be read."""
    import yaml

    try:
        with card.open("rb") as stream:
            text = stream.read(MAX_CARD).decode("utf-8", errors="replace")
    except OSError:
        return {}
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        return {}
    # Only these entries are parsed: YAML takes half a minute for a megabyte of benchmark results.
    entries, wanted = [], False
    for line in lines[1:end]:
        if not line.startswith((" ", "-", "#")):
            wanted = line.startswith(tuple(f"{key}:" for key in keys))
        if wanted:
            entries.append(line)
    text = "\n".join(entries)
    if len(text) > MAX_ENTRIES:
        return {}
    try:
        front = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return front if isinstance(front, dict) else {}
