"""A measured divergence in the report of a converted folder: what the planner ranks forms by."""

from __future__ import annotations

import os
from pathlib import Path

from lowmem.checkpoint.files import read_json
from lowmem.checkpoint.manifest import MANIFEST_FILE, digest_file, manifest_text, read_manifest
from lowmem.checkpoint.writer import write_json, write_whole
from lowmem.errors import LowmemError
from lowmem.plan.candidates import REPORT_FILE


def write_kld(folder: Path, kld: float, what: str) -> str:
    """Put `kld` into the report of `folder`, and the report's new digest into its manifest.

    what: of which text, in words. Only a folder that lowmem converted, with a sound manifest, is touched, and
    no link is followed (a hub's cache holds its files as links). Nothing is written where the same is there
    already. Returns a line for the user where it could not be written, else "".
    """
    report, manifest = folder / REPORT_FILE, folder / MANIFEST_FILE
    if not report.is_file() or not manifest.is_file() or report.is_symlink() or manifest.is_symlink():
        return ""
    try:
        found, digests = read_json(report), read_manifest(folder)
        if digests is None or REPORT_FILE not in digests:
            return ""
        if digest_file(report) != digests[REPORT_FILE]:
            return f"{folder} is not what its manifest says, and left alone: see lowmem verify {folder}"
        new = {**found, "kld": kld, "kld_of": what}
        if new == found:
            return ""
        if not os.access(folder, os.W_OK):
            return f"{folder} cannot be written: its report does not get the measured divergence"
        digests[REPORT_FILE] = write_json(report, new)
        write_whole(manifest, [manifest_text(digests).encode()])
    except LowmemError as error:
        return f"{folder} does not get the measured divergence: {error.message}"
    return ""
