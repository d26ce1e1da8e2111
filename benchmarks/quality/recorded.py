"""A measured divergence in the manifest of a converted folder; the planner ranks versions by it.

The manifest has digests of all other files, so it is the only file that can change alone: a process that is
killed between two changes would leave a folder that looks damaged.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from lowmem.checkpoint.files.reading import read_json
from lowmem.checkpoint.files.whole import write_whole
from lowmem.checkpoint.manifest import MANIFEST_FILE, REPORT_FILE, digest_file, read_manifest
from lowmem.errors import LowmemError
from lowmem.plan.candidates import MEASURED


def write_kld(folder: Path, kld: float, what: str) -> str:
    """Write `kld` into the manifest of `folder`, if lowmem converted it and the manifest is intact.

    what: the text that it was measured on. Links are not followed: a hub cache's files are links. Returns the
    reason if it could not be written, else "".
    """
    report, manifest = folder / REPORT_FILE, folder / MANIFEST_FILE
    if not report.is_file() or not manifest.is_file() or report.is_symlink() or manifest.is_symlink():
        return ""
    try:
        found, digests = read_json(manifest), read_manifest(folder)
        if digests is None or REPORT_FILE not in digests:
            return ""
        if digest_file(report) != digests[REPORT_FILE]:
            return f"{folder} does not match its manifest and is left unchanged: run lowmem verify {folder}"
        measured = {"kld": kld, "kld_of": what}
        if found.get(MEASURED) == measured:
            return ""
        if not os.access(folder, os.W_OK):
            return f"{folder} cannot be written, so the divergence is not recorded in it"
        text = json.dumps({**found, MEASURED: measured}, indent=1) + "\n"
        write_whole(manifest, [text.encode()])
    except LowmemError as error:
        return f"the divergence is not recorded in {folder}: {error.message}"
    return ""
