"""Speed of `lowmem.benchmarks.experiments.peers.command`: every form in its own runtime, in turns, so that all see the same machine."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

from lowmem.benchmarks.common.record_file import from_json
from lowmem.benchmarks.common.records import Repeated
from lowmem.benchmarks.experiments.peers.forms import Form, RuntimeSpeed, SpeedTable, speed_forms
from lowmem.benchmarks.experiments.peers.run import STEPS, Run, StepError, convert, method_of, path_of, say
from lowmem.benchmarks.experiments.peers.worker import Round, Worker, WorkerError

from lowmem.errors import OutputError

SETTLE_SECONDS = 0.3
"""Between two runtimes: threads of the last one still spin for a moment."""


def shaped_run(run: Run, layers: int) -> Run:
    """StarChat Alpha's dimensions with made-up weights: only llama.cpp converts any."""
    work = run.work / f"shaped-{layers}"
    work.mkdir(exist_ok=True)
    if not (work / "prepared.json").is_file():
        say(f"StarChat Alpha's dimensions with {layers} layers, and made-up weights …")
        command = [sys.executable, "-m", STEPS, "shape", str(layers), "--work", str(work)]
        try:
            run.process(command, f"shaped-{layers}")
        except StepError as error:
            raise OutputError(f"the model cannot be made: {error}", f"See {work}") from error
    packed = tuple((bits, work / f"packed-{bits}") for bits in (8, 4, 3, 2))
    return Run(str(work / "source"), work, run.peers, run.iterations, run.only, run.threads, packed)


def measure_speed(run: Run, model: str, args: argparse.Namespace) -> SpeedTable:
    """Time all wanted forms in turns: each round every runtime once, in another order each time."""
    forms = [form for form in speed_forms(run.peers.names, run.prepare().dtype) if run.wants(form)]
    settings = {
        "model": model,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "threads": run.threads,
        "rounds": args.rounds,
        "most_seconds": args.most_seconds,
    }
    kept = run.kept("speed")
    same = {**settings, "forms": [form.key for form in forms]}
    if kept is not None and kept["settings"] == same:
        table: SpeedTable = from_json(SpeedTable, kept["table"])
        return table
    failures: dict[str, str] = {}
    for form in forms:
        try:
            convert(run, form)
        except StepError as error:
            failures[form.key] = str(error)
    ready = [form for form in forms if form.key not in failures]
    times = in_turns(
        {form.label: partial(_worker, run, form, args) for form in ready},
        args.rounds,
        keep_open=_fit_together(run, len(ready)),
    )
    runtimes = []
    for form in forms:
        found = times.get(form.label) or Times(failure=failures.get(form.key, "it was not started"))
        runtimes.append(found.speed(form.peer, form.label, args.prompt_tokens))
    table = SpeedTable(**settings, runtimes=tuple(runtimes))
    run.keep("speed", {"settings": same, "table": asdict(table)})
    return table


@dataclass
class Times:
    """What a runtime showed so far."""

    kernel: str = ""
    load_seconds: float = 0.0
    peak_bytes: int = 0
    rounds: tuple[Round, ...] = ()
    loads: tuple[float, ...] = ()
    failure: str = ""

    def speed(self, peer: str, label: str, prompt_tokens: int) -> RuntimeSpeed:
        """As it is recorded."""
        done = [found for found in self.rounds if found.decode_seconds]
        prefill = repeated([prompt_tokens / found.prefill_seconds for found in done])
        decode = repeated([median(found.decode_seconds) for found in done])
        return RuntimeSpeed(
            peer,
            label,
            self.kernel,
            round(self.load_seconds, 3),
            self.peak_bytes,
            prefill,
            decode,
            self.loads,
            self.failure,
        )


def in_turns(
    workers: Mapping[str, Callable[[], Worker]], rounds: int, *, keep_open: bool
) -> dict[str, Times]:
    """Each round every worker once, the first one after another each time; a warm-up before the first.

    keep_open: all workers at once in memory; otherwise each is started anew for its turn. A worker that
    fails is left out from then on, with its reason.
    """
    times = {label: Times() for label in workers}
    labels = list(workers)
    with ExitStack() as stack:
        opened: dict[str, Worker] = {}
        for number in range(rounds):
            say(f"round {number + 1} of {rounds} …")
            turn = number % max(1, len(labels))
            for label in labels[turn:] + labels[:turn]:
                own = times[label]
                if own.failure:
                    continue
                try:
                    with ExitStack() as after:
                        worker = opened.get(label)
                        if worker is None:
                            worker = workers[label]()
                            if keep_open:
                                opened[label] = worker
                                stack.callback(worker.close)
                            else:
                                after.callback(worker.close)
                            worker.round()
                        own.kernel, own.load_seconds = worker.started.kernel, worker.started.load_seconds
                        time.sleep(SETTLE_SECONDS)
                        own.loads += (round(os.getloadavg()[0], 2),)
                        own.rounds += (worker.round(),)
                        own.peak_bytes = max(own.peak_bytes, worker.peak_bytes())
                except WorkerError as error:
                    own.failure = str(error)
                    say(f"    {label} failed: {error}")
    return times


def repeated(values: Sequence[float]) -> Repeated | None:
    """The median and the extremes, or None of nothing."""
    return Repeated(median(values), min(values), max(values), tuple(values)) if values else None


def _worker(run: Run, form: Form, args: argparse.Namespace) -> Worker:
    """A process that times the form in its own runtime."""
    path, method = path_of(run, form), method_of(form)
    if form.peer == "llama.cpp":
        command = [run.peers.llama, "-m", "lowmem.benchmarks.experiments.peers.llama", "serve", str(path)]
    else:
        method = "gptqmodel" if form.peer == "GPTQModel" else method
        command = [sys.executable, "-m", STEPS, "serve", run.source, "--method", method, "--path", str(path)]
    command += ["--threads", str(run.threads), "--prompt-tokens", str(args.prompt_tokens)]
    command += ["--new-tokens", str(args.new_tokens), "--most-seconds", str(args.most_seconds)]
    threads = {"OMP_NUM_THREADS": str(run.threads)}
    # GPTQModel's own default, but never the one worker with which it cannot load.
    workers = {"GPTQMODEL_CPU_WORKERS": str(max(2, run.threads))}
    return Worker(command, run.work / f"{form.key}.speed.log", {**workers, **threads})


def _fit_together(run: Run, count: int) -> bool:
    """Whether all runtimes may be in memory at once: each takes no more than 1 GiB beside two copies."""
    weights = sum(file.stat().st_size for file in Path(run.source).glob("*.safetensors"))
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    return count * (2 * weights + (1 << 30)) < available
