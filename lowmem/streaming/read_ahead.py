"""Read the next layer's bytes into the page cache while the current layer is computed.

The system is told which bytes will be needed. That takes none of the process's memory; where it cannot be
told, layers are read when they are needed.
"""

from __future__ import annotations

import contextlib
import threading
import zipfile
from collections.abc import Iterable

from lowmem.checkpoint.source.open import Source
from lowmem.errors import SourceError
from lowmem.platform import system


def read_ahead(source: Source, names: Iterable[str]) -> threading.Thread:
    """Request the tensors' bytes in a new thread."""
    wanted = list(names)

    def ask() -> None:
        with contextlib.suppress(OSError, SourceError, KeyError, zipfile.BadZipFile):
            for part in source.byte_ranges(wanted):
                with part.path.open("rb", buffering=0) as stream:
                    if not system.will_need(stream.fileno(), part.begin, part.size):
                        return

    thread = threading.Thread(target=ask, name="read ahead", daemon=True)
    thread.start()
    return thread
