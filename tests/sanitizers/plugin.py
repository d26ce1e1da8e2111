"""For `pytest -p tests.sanitizers.plugin`: load the kernels from the library that $LOWMEM_SANITIZED names."""

from __future__ import annotations

import os
from pathlib import Path

from lowmem.kernels.native import library as native

native.library_path = lambda: Path(os.environ["LOWMEM_SANITIZED"])
