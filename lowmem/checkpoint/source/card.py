"""The licence that a model card names."""

from __future__ import annotations

from pathlib import Path

MAX_CARD = 4_000_000
"""Bytes read of a card."""
MAX_LICENCE = 4096
"""Characters of its licence entries."""


def license_of_card(card: Path) -> str | None:
    """`license` (or the `license_name` of "other") in the YAML front matter of a model card."""
    import yaml

    try:
        with card.open("rb") as stream:
            text = stream.read(MAX_CARD).decode("utf-8", errors="replace")
    except OSError:
        return None
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return None
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        return None
    # Only the licence entries are parsed: YAML takes half a minute for a megabyte of benchmark results.
    entries, wanted = [], False
    for line in lines[1:end]:
        if not line.startswith((" ", "-", "#")):
            wanted = line.startswith(("license:", "license_name:"))
        if wanted:
            entries.append(line)
    text = "\n".join(entries)
    if len(text) > MAX_LICENCE:
        return None
    try:
        front = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(front, dict):
        return None
    license = front.get("license")
    if license == "other" and front.get("license_name"):
        license = front["license_name"]
    if isinstance(license, list) and license:
        license = license[0]
    if not isinstance(license, str) or not license.strip() or not license.isprintable():
        return None
    return license.strip()[:100]
