"""Coverage-guided fuzzing of the targets with atheris (libFuzzer for Python).

    python -m tests.fuzz.coverage_guided SECONDS CORPUS TARGET...

CORPUS holds one folder of inputs for each target. A missing folder is created with the target's seeds. Inputs
that reach new code are kept, so a later run continues from them.
Prints one line of JSON for each target: executions, edges reached in lowmem's own code, and the failing
input, if there was one. In that case the exit code is 1.

The fuzzer runs in a separate process, because libFuzzer ends its process. Limits: 3 GiB of memory, and two
minutes for each input.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent.parent

MEMORY_MIB = 3072
INPUT_SECONDS = 120
MAX_LENGTH = {"gguf_model": 1 << 20, "tokenizer": 1 << 17}
_WORDS = {
    "config": (
        *(
            "model_type",
            "gpt_bigcode",
            "llama",
            "qwen2",
            "n_layer",
            "n_head",
            "n_embd",
            "n_inner",
            "vocab_size",
        ),
        *(
            "num_hidden_layers",
            "hidden_size",
            "multi_query",
            "activation_function",
            "text_config",
            "auto_map",
        ),
        *("tie_word_embeddings", "rope_parameters", "rope_type", "layer_types", "dtype", "get_text_config"),
    ),
    "quantization": (
        "bits",
        "group_size",
        "quant_method",
        "gptq",
        "checkpoint_format",
        "dynamic",
        "desc_act",
        "sym",
    ),
    "template": (
        "{% for",
        "{% endfor %}",
        "{{",
        "}}",
        "{% if",
        "{% endif %}",
        "range(",
        "namespace(",
        "~",
        "**",
        "messages",
        "|join",
        "|tojson",
        ".__class__",
        "{% set",
        "{% macro",
        "{% generation %}",
    ),
    "safetensors": ("data_offsets", "shape", "dtype", "F16", "F8_E8M0", "__metadata__", "[0,0]"),
    "index": ("weight_map", "../", "model-00001-of-00002.safetensors"),
}


@dataclass(frozen=True)
class Run:
    """The result of a run. edges: libFuzzer's `cov`. features: its `ft`. fault: the file with the failing
    input and the last lines of its traceback; empty if nothing failed."""

    target: str
    seconds: int
    executions: int
    edges: int
    features: int
    corpus: int
    fault: str = ""
    traceback: str = ""


def fuzz(targets: Sequence[str], seconds: int, corpus: Path) -> list[Run]:
    """Fuzz the targets one after another, each for `seconds`, starting from its seeds and `corpus`/TARGET.

    Imports take seconds, so one process imports everything and forks for each target."""
    for target in targets:
        (corpus / target).mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.coverage_guided", "--child", str(seconds), str(corpus), *targets],
        cwd=REPO,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    codes = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    return [
        _parse(target, seconds, corpus / target, codes.get(target, done.returncode or 1))
        for target in targets
    ]


def _parse(target: str, seconds: int, corpus: Path, code: int) -> Run:
    log = corpus.with_name(corpus.name + ".log")
    output = log.read_text(errors="replace") if log.exists() else ""
    edges = [int(n) for n in re.findall(r"cov: (\d+)", output)]
    features = [int(n) for n in re.findall(r"ft: (\d+)", output)]
    counted = re.findall(r"number_of_executed_units: +(\d+)", output) or re.findall(
        r"^#(\d+)\t", output, re.M
    )
    fault = "".join(re.findall(r"Test unit written to (\S+)", output)[-1:])
    if code and not fault:
        fault = f"exit code {code}"
    return Run(
        target,
        seconds,
        int(counted[-1]) if counted else 0,
        max(edges, default=0),
        max(features, default=0),
        len(list(corpus.iterdir())),
        fault,
        output[-3000:] if fault else "",
    )


def _child(seconds: str, corpus: Path, targets: Sequence[str]) -> None:
    """Import lowmem's modules with instrumentation, and fork for each target."""
    import atheris

    with atheris.instrument_imports(include=["lowmem"]):
        from tests.fuzz import fuzz_targets
    codes = {}
    for target in targets:
        child = os.fork()
        if not child:
            _become_libfuzzer(atheris, fuzz_targets, target, seconds, corpus / target)
        codes[target] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(codes))


def _become_libfuzzer(atheris: Any, fuzz_targets: Any, target: str, seconds: str, corpus: Path) -> None:
    log = os.open(corpus.with_name(corpus.name + ".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        function = fuzz_targets.TARGETS.get(target)
        for data in fuzz_targets.seeds_of(target):
            (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
            if function:
                function(data)  # do not charge imports and the valid checkpoint to an input's time
        words = corpus.with_name(corpus.name + ".dict")
        lines = [re.sub(r'(["\\])', r"\\\1", word) for word in _WORDS.get(target, ())]
        words.write_text("".join(f'"{line}"\n' for line in lines))
        options = [
            str(corpus),
            f"-max_total_time={seconds}",
            f"-rss_limit_mb={MEMORY_MIB}",
            f"-timeout={INPUT_SECONDS}",
            f"-report_slow_units={INPUT_SECONDS}",  # wall time: a busy machine would report inputs as slow
            f"-max_len={MAX_LENGTH.get(target, 1 << 14)}",
            f"-artifact_prefix={corpus}.",
            "-print_final_stats=1",
            "-seed=1",
            *([f"-dict={words}"] if lines else ()),
        ]
        atexit.register(fuzz_targets.clean_up)
        atheris.Setup([sys.argv[0], *options], function or fuzz_targets.broken)
        atheris.Fuzz()
    except Exception:  # not SystemExit, which ends Fuzz; libFuzzer saves the input on the way
        traceback.print_exc()
        os._exit(1)


def main() -> int:
    """The command line."""
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seconds", metavar="SECONDS", type=int)
    parser.add_argument("corpus", metavar="CORPUS", type=Path)
    parser.add_argument("targets", metavar="TARGET", nargs="+")
    args = parser.parse_args()
    faults = 0
    for target in args.targets:  # one call for each target, so that each line is printed at once
        (run,) = fuzz([target], args.seconds, args.corpus)
        print(
            json.dumps({name: value for name, value in asdict(run).items() if name != "traceback"}),
            flush=True,
        )
        if run.fault:
            faults += 1
            print(run.traceback, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
