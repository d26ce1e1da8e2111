"""The steps of a day at a card. Each is recorded with what it printed, or why it failed."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lowmem.benchmarks.common.processes import ROOT
from lowmem.benchmarks.experiments.common import origin_here, say
from lowmem.benchmarks.experiments.gpu_day.products import TINY, Sizes, all_products
from lowmem.benchmarks.experiments.gpu_day.record import GpuDay, ModelRun, Product, Step
from lowmem.benchmarks.experiments.starchat.dimensions import Dimensions
from lowmem.benchmarks.experiments.starchat.random_weights import write_packed, write_source

from lowmem.cards.find import cards_of, found_cards, is_timed
from lowmem.config import BITS
from lowmem.errors import InvalidRequestError
from lowmem.plan.bandwidth import card_bandwidth
from lowmem.plan.device import bfloat16_is_fast
from lowmem.text.units import format_bytes

_LAST = 2000  # characters of a failed process's output that are kept
_MODULE = "lowmem.benchmarks.experiments.gpu_day.model"


class Day:
    """The steps, in order, and what they found."""

    def __init__(self, args: argparse.Namespace, words: Sequence[str]) -> None:
        """args: of the command. words: as they were typed. Raises InvalidRequestError without a card."""
        self.tiny: bool = args.tiny
        self.only = args.only.split(",") if args.only else None
        self.words = words
        self.work: Path = args.work
        self.device = torch.device("cpu")
        if not self.tiny:
            found = next(filter(is_timed, found_cards()), None)
            if found is None:
                raise InvalidRequestError("torch finds no card", "Use --tiny to run the steps on the CPU")
            self.device = found
        self.dtype = torch.bfloat16 if self.tiny or bfloat16_is_fast(self.device) else torch.float16
        self.steps: list[Step] = []
        self.products: list[Product] = []
        self.models: list[ModelRun] = []

    def run(self) -> GpuDay:
        """All steps."""
        self.work.mkdir(parents=True, exist_ok=True)
        origin = origin_here("gpu_day", self.words, "made-up weights of StarChat Alpha's layout")
        rate = card_bandwidth(self.device)
        for name, step in (
            ("tests", self._tests),
            ("doctor", self._doctor),
            ("kernels", self._kernels),
            ("conversion", self._conversion),
            ("models", self._models),
        ):
            if self.only is None or name in self.only:
                self._step(name, step)
        described = "CPU, in Triton's interpreter"
        if not self.tiny:
            card = cards_of(self.device).properties(self.device)
            described = f"{card.name}, {format_bytes(card.total)}"
        return GpuDay(origin, described, rate, tuple(self.steps), tuple(self.products), tuple(self.models))

    def _step(self, name: str, step: Callable[[], str]) -> None:
        say(f"{name} …")
        start = time.perf_counter()
        try:
            text, status = step(), "ok"
        except Exception as error:  # the next step may still tell something
            text, status = f"{type(error).__name__}: {error}", "failed"
        if text.startswith("skipped: "):
            text, status = text.removeprefix("skipped: "), "skipped"
        self.steps.append(Step(name, status, time.perf_counter() - start, text))
        say(f"    {status}")

    def _process(self, *command: str) -> str:
        """What a command printed. Raises RuntimeError when it fails."""
        line = [sys.executable, "-m", *command]
        environment = {**os.environ, "LOWMEM_CACHE": str(self.work / "cache")}
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
        if done.returncode:
            text = (done.stdout + done.stderr).strip()
            raise RuntimeError(text[-_LAST:] or f"exit code {done.returncode}")
        return done.stdout.strip()

    def _tests(self) -> str:
        """The tests that need a card."""
        if self.tiny:
            return "skipped: they need a card"
        return self._process("pytest", "-m", "gpu", "tests/kernels/test_gpu.py")

    def _doctor(self) -> str:
        """What `lowmem doctor` says."""
        return self._process("lowmem", "doctor", *(["--quick"] if self.tiny else []))

    def _kernels(self) -> str:
        """Single linears with every kernel."""
        sizes = TINY if self.tiny else Sizes()
        for product in all_products(sizes, self.device, self.dtype, borrowed=not self.tiny):
            self.products.append(product)
        failed = sum(bool(product.problem) for product in self.products)
        return f"{len(self.products)} products, {failed} without a time"

    def _conversion(self) -> str:
        """One decoder layer of StarChat Alpha's shape, converted to 4 bits."""
        source = self.work / "source"
        if not source.is_dir():
            write_source(source, self._dimensions(1))
        out = self.work / "converted"
        rows, length = ("4", "64") if self.tiny else ("32", "512")
        words = ["--bits", "4", "--rows", rows, "--row-length", length, "--device", str(self.device)]
        text = self._process("lowmem", "convert", str(source), str(out), *words, "--force", "--json")
        end = json.loads(text.splitlines()[-1])
        return (
            f"{int(rows) * int(length)} tokens, {end['total_seconds']:.1f} s, "
            f"peak memory of the host {format_bytes(end['peak_memory'])}; "
            + ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in end["seconds"].items())
        )

    def _models(self) -> str:
        """A few layers at every width: memory planned and real, decode and prefill."""
        layers = 1 if self.tiny else 4
        for bits in (4,) if self.tiny else BITS:
            folder = self.work / f"packed-{bits}"
            if not folder.is_dir():
                write_packed(folder, self._dimensions(layers), bits, 32 if self.tiny else 128)
            context = 64 if self.tiny else 4096
            text = self._process(_MODULE, str(folder), str(self.device), str(context))
            self.models.append(ModelRun(layers=layers, context=context, **json.loads(text.splitlines()[-1])))
        return f"{len(self.models)} versions"

    def _dimensions(self, layers: int) -> Dimensions:
        if self.tiny:
            return Dimensions(layers, n_embd=64, heads=2, n_positions=256, vocab=4096)
        return Dimensions(layers)
