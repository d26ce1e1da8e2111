"""A measured divergence beside a converted folder's digests: what the planner ranks forms by.

It goes into the manifest, which is one file: in the report it would change the digest that the manifest has
of it, and a process that is killed between the two would leave a folder that looks damaged.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from lowmem.checkpoint.files.reading import read_json
from lowmem.checkpoint.files.whole import write_whole
from lowmem.checkpoint.manifest import MANIFEST_FILE, digest_file, read_manifest
from lowmem.errors import LowmemError
from lowmem.plan.candidates import MEASURED, REPORT_FILE


def write_kld(folder: Path, kld: float, what: str) -> str:
    """Put `kld` into the manifest of `folder`.

    what: of which text, in words. Only a folder that lowmem converted, with a sound manifest, is touched, and
    no link is followed (a hub's cache holds its files as links). Nothing is written where the same is there
    already. Returns a line for the user where it could not be written, else "".
    """
    report, manifest = folder / REPORT_FILE, folder / MANIFEST_FILE
    if not report.is_file() or not manifest.is_file() or report.is_symlink() or manifest.is_symlink():
        return ""
    try:
        found, digests = read_json(manifest), read_manifest(folder)
        if digests is None or REPORT_FILE not in digests:
            return ""
        if digest_file(report) != digests[REPORT_FILE]:
            return f"{folder} is not what its manifest says, and left alone: see lowmem verify {folder}"
        measured = {"kld": kld, "kld_of": what}
        if found.get(MEASURED) == measured:
            return ""
        if not os.access(folder, os.W_OK):
            return f"{folder} cannot be written: it does not get the measured divergence"
        text = json.dumps({**found, MEASURED: measured}, indent=1) + "\n"
        write_whole(manifest, [text.encode()])
    except LowmemError as error:
        return f"{folder} does not get the measured divergence: {error.message}"
    return ""
