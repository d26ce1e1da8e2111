"""Rows of data sets on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from lowmem.convert.reading.files import INSTALL

from lowmem.errors import CalibrationError

HUB_NAMES = {"oasst1": "OpenAssistant/oasst1", "dolly": "databricks/databricks-dolly-15k"}
HUB_LICENSES = {"oasst1": "Apache-2.0", "dolly": "CC-BY-SA-3.0"}
USE_LOCAL = "Use --calibration builtin, or a local file"


def hub_rows(name: str, limit: int | None) -> list[Mapping[str, Any]]:
    """Read the first rows of a hub data set's training split, read as data only.

    Raises CalibrationError if there is no network connection or the data set does not exist.
    """
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise CalibrationError(
            "the package datasets is not installed", f"Install it with: {INSTALL}. {USE_LOCAL}"
        ) from error
    try:
        return list(islice(load_dataset(name, split="train", streaming=True), limit))
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CalibrationError(f"the data set {name} cannot be read ({reason})", USE_LOCAL) from error
