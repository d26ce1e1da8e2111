"""lm-evaluation-harness against `lowmem serve`, beside the harness's own `hf` model on the same checkpoint.

    pip install lm-eval
    python -m lowmem.benchmarks.experiments.harness                       tiny-starchat and SmolLM2
    python -m lowmem.benchmarks.experiments.harness tiny-starchat --limit 8
    python -m lowmem.benchmarks.experiments.harness --show

Three tasks, made from tiny-starchat's held-out Python files, so that nothing is downloaded: the next line
among four (log-likelihoods), the perplexity of the lines before it (rolling log-likelihoods), and the rest of
the next line (generation). Both sides compute in float32. Ends with 1 where figures differ by more than
rounding.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lowmem.benchmarks.common.processes import ROOT
from lowmem.benchmarks.common.records import Origin
from lowmem.benchmarks.experiments.common import RESULTS, Experiment, made_with, origin_here, say, table
from lowmem.benchmarks.experiments.reports import MODELS

from lowmem.errors import InvalidRequestError, LowmemError

NAMES = tuple(model.name for model in MODELS)
TOLERANCE = 1e-4
"""Largest difference of a figure, relative to it, that is rounding."""
START_SECONDS = 300.0
_CONTEXT = 1024  # tokens: the positions of tiny-starchat
_COMMON = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
num_fewshot: 0
"""
TASKS = {
    "next_line": """\
output_type: multiple_choice
doc_to_text: "{{before}}"
doc_to_choice: "{{lines}}"
doc_to_target: "{{right}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "lines": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{before}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "finish_line": """\
output_type: generate_until
doc_to_text: "{{begun}}"
doc_to_target: "{{rest}}"
target_delimiter: ""
generation_kwargs: {until: ["\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}, {metric: chrf}]
""",
}


@dataclass(frozen=True)
class Figure:
    """One figure of a task."""

    task: str
    metric: str
    served: float
    """Through `lowmem serve`."""
    own: float
    """Of the harness's `hf` model."""

    @property
    def equal(self) -> bool:
        """Whether they are equal but for rounding."""
        return abs(self.served - self.own) <= TOLERANCE * max(1.0, abs(self.own))


@dataclass(frozen=True)
class ModelFigures:
    """One model through both."""

    model: str
    figures: tuple[Figure, ...]
    requests: int
    """Documents of all tasks together."""
    worst_nats: float
    """Largest difference of a log-likelihood, in nats, over all requests."""
    greedy_differs: int
    """Requests of which only one side says that greedy decoding gives the text."""
    same_texts: int
    """Generated texts that are the same."""
    texts: int


@dataclass(frozen=True)
class Record:
    """What `harness` found."""

    origin: Origin
    harness: str
    """Version of lm-eval."""
    models: tuple[ModelFigures, ...]


def write_tasks(folder: Path, documents: int) -> None:
    """Write the tasks and their documents."""
    text = resources.files("lowmem").joinpath("data/tiny-starchat/heldout.txt").read_text("utf-8")
    lines = text.splitlines()
    draw = random.Random(0)
    places = sorted(draw.sample(range(40, len(lines) - 1), 40 * documents))
    # A line that says something, after a few lines of the same file.
    places = [at for at in places if len(lines[at].strip()) > 12][:documents]
    rows = []
    for at in places:
        before, half = "\n".join(lines[at - 12 : at]) + "\n", len(lines[at]) * 2 // 3
        others = draw.sample([line for line in lines if len(line.strip()) > 12], 3)
        choices = draw.sample([lines[at], *others], 4)
        rows.append(
            {
                "before": before,
                "begun": before + lines[at][:half],
                "rest": lines[at][half:],
                "lines": choices,
                "right": choices.index(lines[at]),
            }
        )
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rest in TASKS.items():
        (folder / f"{name}.yaml").write_text(_COMMON.format(name=name, data=data) + rest)


def own_arguments(source: Path) -> tuple[str, Path]:
    """(what the harness's `hf` model loads, a folder with the tokenizer)."""
    if source.is_dir():
        return f"pretrained={source}", source
    from transformers import AutoTokenizer

    folder = source.parent / "tokenizer"
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    return f"pretrained={source.parent},gguf_file={source.name}", folder


@contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    """Serve a model in float32; gives the address. Raises LowmemError if it does not start."""
    words = [sys.executable, "-m", "lowmem", "serve", str(model), "--port", "0", "--served-name", "model"]
    words += ["--dtype", "float32", "--quantize", "none", "--device", "cpu", "--context", str(_CONTEXT)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("w") as stream:
        process = subprocess.Popen(
            words, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": path}
        )
    try:
        for _ in range(int(START_SECONDS * 4)):
            found = re.search(r"serving model at (\S+)", log.read_text())
            if found:
                yield found.group(1)
                return
            if process.poll() is not None:
                break
            time.sleep(0.25)
        raise LowmemError("the server did not start", f"See {log}")
    finally:
        process.terminate()
        process.wait(60)


def evaluate(folder: Path, name: str, words: Sequence[str], limit: int) -> dict[str, Any]:
    """One run of the harness: its results, with every sample. Raises LowmemError if it fails."""
    out = folder / name
    command = [sys.executable, "-m", "lm_eval", "--tasks", ",".join(TASKS), "--include_path", str(folder)]
    command += ["--output_path", str(out), "--log_samples", "--limit", str(limit), *words]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "HF_DATASETS_OFFLINE": "1"}
    log = folder / f"{name}.log"
    with log.open("w") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | offline)
    files = sorted(out.rglob("results_*.json"))
    if done.returncode or not files:
        raise LowmemError("lm-eval failed", f"See {log}")
    results: dict[str, Any] = json.loads(files[-1].read_text())["results"]
    samples = {
        task: [json.loads(line) for line in sorted(out.rglob(f"samples_{task}_*.jsonl"))[-1].open()]
        for task in TASKS
    }
    return {"results": results, "samples": samples}


def compare(model: str, served_run: dict[str, Any], own_run: dict[str, Any]) -> ModelFigures:
    """The figures of two runs side by side."""
    figures = tuple(
        Figure(task, metric.partition(",")[0], float(value), float(own_run["results"][task][metric]))
        for task in TASKS
        for metric, value in served_run["results"][task].items()
        if isinstance(value, float) and "stderr" not in metric
    )
    worst, same, texts, requests, greedy = 0.0, 0, 0, 0, 0
    for task, mine in served_run["samples"].items():
        for one, other in zip(_in_order(mine), _in_order(own_run["samples"][task]), strict=True):
            requests += 1
            for a, b in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                if task == "finish_line":
                    texts, same = texts + 1, same + (a == b)
                else:
                    worst = max(worst, abs(_nats(a) - _nats(b)))
                    greedy += _greedy(a) != _greedy(b)
    return ModelFigures(model, figures, requests, worst, greedy, same, texts)


def _in_order(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda sample: int(sample["doc_id"]))


def _nats(response: Any) -> float:
    """The log-likelihood in a response, which the harness writes as [figure, is greedy] or alone."""
    return float(response[0] if isinstance(response, list) else response)


def _greedy(response: Any) -> str:
    """Whether the text is what greedy decoding gives, as the harness writes it."""
    return str(response[1]) if isinstance(response, list) else ""


def measure(names: Sequence[str], limit: int, work: Path) -> Record:
    """Run both sides on each model. Raises LowmemError."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InvalidRequestError("lm-evaluation-harness is not installed", "pip install lm-eval")
    origin = origin_here("harness", sys.argv[1:], ", ".join(names))
    found = []
    for model in (model for model in MODELS if model.name in names):
        folder = work / model.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        model.fetch(folder)
        write_tasks(folder, limit)
        source = folder / model.source
        arguments, tokenizer = own_arguments(source)
        say(f"{model.name}: the harness's own model")
        own = ["--model", "hf", "--batch_size", "1", "--device", "cpu"]
        own += ["--model_args", f"{arguments},dtype=float32,max_length={_CONTEXT}"]
        other = evaluate(folder, "hf", own, limit)
        say(f"{model.name}: through lowmem serve")
        with served(source, folder / "serve.log") as url:
            arguments = f"model=model,base_url={url}/v1/completions,tokenizer={tokenizer}"
            arguments += f",tokenizer_backend=huggingface,max_length={_CONTEXT}"
            words = ["--model", "local-completions", "--batch_size", "4", "--model_args", arguments]
            mine = evaluate(folder, "served", words, limit)
        found.append(compare(model.name, mine, other))
    return Record(origin, version("lm-eval"), tuple(found))


def render(record: Record) -> str:
    """The record as Markdown."""
    cells = [
        (entry.model, figure.task, figure.metric, f"{figure.served:.5f}", f"{figure.own:.5f}")
        for entry in record.models
        for figure in entry.figures
    ]
    lines = [table(("model", "task", "metric", "lowmem serve", "hf"), cells), ""]
    for entry in record.models:
        lines += [
            f"{entry.model}: {entry.requests} documents. Log-likelihoods differ by at most "
            f"{entry.worst_nats:.1e} nats, and {entry.greedy_differs} are greedy on one side only. "
            f"{entry.same_texts} of {entry.texts} generated texts are the same.",
            "",
        ]
    return "\n".join([*lines, made_with(record.origin, [("lm-eval", record.harness)])])


EXPERIMENT = Experiment("harness", Record, RESULTS / "harness.json", render)


def main() -> int:
    """The command; returns its exit code: 1 where figures differ."""
    parser = EXPERIMENT.parser(__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument(
        "--limit", type=int, default=40, metavar="N", help="documents of a task (%(default)s)"
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where to work (default: a temporary folder)"
    )
    args = parser.parse_args()
    if unknown := set(args.models) - set(NAMES):
        parser.error(f"{min(unknown)!r} is not one of {', '.join(NAMES)}")
    found: list[Record] = []

    def run() -> Record:
        with tempfile.TemporaryDirectory() as temporary:
            found.append(measure(args.models or NAMES, args.limit, args.work or Path(temporary)))
        return found[0]

    code = EXPERIMENT.run(args, run)
    return code or int(any(not agree(entry) for record in found for entry in record.models))


def agree(entry: ModelFigures) -> bool:
    """Whether both sides found the same."""
    same = entry.same_texts == entry.texts and entry.greedy_differs == 0
    return same and all(figure.equal for figure in entry.figures)


if __name__ == "__main__":
    sys.exit(main())
