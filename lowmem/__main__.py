"""`python -m lowmem`."""

import sys

# Python puts the current folder first on the path: a torch.py in it would be imported instead of torch.
if not getattr(sys.flags, "safe_path", False):
    del sys.path[0]

from lowmem.cli import main

raise SystemExit(main())
