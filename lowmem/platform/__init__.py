"""What differs between operating systems; only this package imports what some of them lack.

`system` is the module of this machine's: `posix` for Linux and macOS, or `windows`. Both define the same
names. Needs no torch.
"""

import sys

if sys.platform == "win32":
    from lowmem.platform import windows as system
else:
    from lowmem.platform import posix as system

__all__ = ["system"]
