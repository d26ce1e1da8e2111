"""Imported once by a fork server, so that its children start at once.

transformers imports most modules on first use, so a conversion runs here.
"""

import tempfile
from pathlib import Path

import torch

torch.set_num_threads(1)

import lowmem.chat.store  # noqa: E402
import lowmem.session  # noqa: E402, F401
from lowmem.cli import COMMANDS, command_parser  # noqa: E402
from tests.convert.convert_helpers import quick_convert  # noqa: E402
from tests.helpers import save_source, tiny_model  # noqa: E402

with tempfile.TemporaryDirectory() as _folder:
    quick_convert(save_source(tiny_model("gpt_bigcode_mqa"), Path(_folder) / "source"), Path(_folder) / "out")
for _command in COMMANDS:
    command_parser(_command)
