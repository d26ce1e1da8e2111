"""Read the next layer's bytes into the page cache while the current layer is computed.

posix_fadvise tells the kernel which bytes will be needed. That takes none of the process's memory; on systems
without it, layers are read when they are needed.
"""

from __future__ import annotations

import contextlib
import os
import threading
import zipfile
from collections.abc import Iterable

from lowmem.checkpoint.source.open import Source
from lowmem.errors import SourceError


def read_ahead(source: Source, names: Iterable[str]) -> threading.Thread | None:
    """Request the tensors' bytes in a new thread; None on systems without posix_fadvise."""
    if not hasattr(os, "posix_fadvise"):
        return None
    wanted = list(names)

    def ask() -> None:
        with contextlib.suppress(OSError, SourceError, KeyError, zipfile.BadZipFile):
            for part in source.byte_ranges(wanted):
                with part.path.open("rb", buffering=0) as stream:
                    os.posix_fadvise(stream.fileno(), part.begin, part.size, os.POSIX_FADV_WILLNEED)

    thread = threading.Thread(target=ask, name="read ahead", daemon=True)
    thread.start()
    return thread
