"""The memory that an export takes at StarChat Alpha's dimensions."""

from __future__ import annotations

import subprocess
import sys

import pytest
from lowmem.benchmarks.experiments.starchat.dimensions import Dimensions
from lowmem.benchmarks.experiments.starchat.random_weights import write_packed

CHILD = """
import sys
from lowmem.cli import main
code = main(["export", sys.argv[1], sys.argv[2]])
# Not ru_maxrss, which begins with the peak of the process that started this one.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(code, int(peak.split()[1]) * 1024)
"""


@pytest.mark.slow
def test_a_layer_and_the_embedding_take_less_than_1_5_gib(tmp_path):
    """The largest linear has 151 million weights, the embedding 302 million: no tensor is held as floats."""
    write_packed(tmp_path / "m", Dimensions(1), 4, 128)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "m"), str(tmp_path / "m.gguf")]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    code, peak = map(int, out[-1].split())
    assert code == 0 and "4 Q4_0" in out[0] and peak < 1.5 * 2**30
