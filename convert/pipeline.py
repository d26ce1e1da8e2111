"""`lowmem convert` from start to end: open, plan, convert layer by layer, assemble, publish."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict
from pathlib import Path

import torch
from lowmem.convert import disk_plan
from lowmem.convert.calibration import CalibrationSpec
from lowmem.convert.inputs import ConversionInputs, prepare
from lowmem.convert.job import ConversionJob, differences
from lowmem.convert.memory_plan import MemoryBudget, MemoryPlan, plan_memory
from lowmem.convert.progress import Reporter
from lowmem.convert.recipe import ConvertOptions, Recipe
from lowmem.convert.result.finish import ResultSummary, assemble
from lowmem.convert.stages.context import CalibrationBatch, LayerContext, Seconds, run_stages
from lowmem.convert.stages.layer import layer_stages
from lowmem.convert.stages.replay import Replay
from torch import nn

from lowmem.cards.find import is_card
from lowmem.checkpoint import cache
from lowmem.checkpoint.files.home import typed_path
from lowmem.checkpoint.files.whole import free_bytes, refusals
from lowmem.checkpoint.manifest import MANIFEST_FILE
from lowmem.config import QuantConfig
from lowmem.errors import OutputError
from lowmem.generate.attention import use_row_attention
from lowmem.models.architecture import decoder_layers
from lowmem.plan import device as machine
from lowmem.streaming.hidden_states import HiddenStates
from lowmem.streaming.layer_calls import LayerCall, catch_calls, embedded
from lowmem.streaming.prefetch import Prefetch, StreamLane
from lowmem.streaming.weights import build_without_layers, empty

_RESULT_OPTIONS = ("shard_size", "store_head", "revision", "compute_dtype")
"""The fields of ConvertOptions that change the result."""


def convert(
    source: str | Path,
    out: str | Path | None = None,
    config: QuantConfig | Recipe | None = None,
    *,
    calibration: CalibrationSpec | None = None,
    options: ConvertOptions | None = None,
    reporter: Reporter | None = None,
) -> ResultSummary:
    """Quantize a checkpoint with GPTQ, one decoder layer at a time.

    source: a folder, a file or a hub id, in 16 or 32 bits. out: the folder to create; None is the folder of
    lowmem's cache that belongs to the source and the recipe. config: how the linears are quantized (to 4
    bits): a QuantConfig for all of them, or a Recipe with exceptions.
    calibration: the text that is run through the model (128 rows of 512 tokens of the built-in text).
    options: device, memory budget and details of the result. reporter: receives the progress.

    The folder appears complete or not at all. An interrupted conversion resumes after its last finished layer
    when it is called again with the same arguments, and gives the same bytes.
    Raises LowmemError for errors that the caller can correct; its message says what to do next.
    """
    options = options or ConvertOptions()
    reporter = reporter or Reporter()
    calibration = calibration or CalibrationSpec()
    target = None if out is None else typed_path(out).absolute()
    if target is not None:  # before the slow part
        reporter.target(target)
        _check_out(ConversionJob(target), options)
    inputs = prepare(str(source), config, calibration, options, reporter)
    if target is None:
        target = _cache_folder(str(source), inputs.recipe, calibration, options)
        reporter.target(target)
        reporter.message(f"converting into {target}")
    try:
        with refusals(target):
            summary = _convert_into(ConversionJob(target), inputs, reporter)
        if out is None:
            reporter.message(f"use it with: lowmem run {shlex.quote(str(source))}")
        return summary
    finally:
        reporter.close()
        if out is None:
            cache.prune(target)


def _check_out(job: ConversionJob, options: ConvertOptions) -> bool:
    """Raise OutputError if OUT cannot be written; True if it is complete and only the job folder is left."""
    if job.was_published():
        return True
    job.remove_waste()
    job.check_out(options.force)
    return False


def _cache_folder(source: str, recipe: Recipe, calibration: CalibrationSpec, options: ConvertOptions) -> Path:
    """The cache's folder for this source and recipe; OutputError if it holds the same conversion already."""
    chosen, usual = (
        asdict(spec) | {name: getattr(given, name) for name in _RESULT_OPTIONS}
        for spec, given in ((calibration, options), (CalibrationSpec(), ConvertOptions()))
    )
    others = {name: value for name, value in chosen.items() if value != usual[name]}
    if recipe.linears:
        others |= {"linears": recipe.entries()["linears"], "for": options.reader}
    label = cache.label_of(recipe.config, others, mixed=bool(recipe.linears))
    target = cache.claim(source, label)
    job = ConversionJob(target)
    if (target / MANIFEST_FILE).is_file() and not options.force and not job.was_published():
        job.remove_waste()
        raise OutputError(
            f"{source} is already converted, in {target}",
            f"Type lowmem run {shlex.quote(source)}, or convert it again with --force",
        )
    return target


def _convert_into(job: ConversionJob, inputs: ConversionInputs, reporter: Reporter) -> ResultSummary:
    options = inputs.options
    leftover = _check_out(job, options)
    recipe = inputs.entries()
    with job.working():
        if leftover and (finished := job.load()) and not differences(finished.recipe, recipe):
            job.discard()
            return ResultSummary.of_folder(job.out)
        job.check_out(options.force)
        job.begin(recipe, options.force)
        return _run(job, inputs, reporter)


def _run(job: ConversionJob, inputs: ConversionInputs, reporter: Reporter) -> ResultSummary:
    """Plan memory and disk, refuse what does not fit, and convert."""
    state, work = job.state, inputs.workload
    machine.return_freed_memory()
    used = machine.host_memory_used()
    budget = MemoryBudget(
        base=used,
        host=inputs.options.memory or machine.host_memory_available() + used,
        device=machine.card_memory_free(inputs.device) if is_card(inputs.device) else 0,
    )
    plan = plan_memory(work, budget, fixed_rows=state.run.get("rows_at_a_time"))
    side_bytes = sum(path.stat().st_size for path in inputs.source.side_files())
    plan_after = {
        finished: disk_plan.plan_disk(
            work, finished, side_bytes=side_bytes, store_head=inputs.options.store_head
        )
        for finished in range(len(inputs.arch.layers) + 1)
    }
    needed = plan_after[state.finished_layers].needed
    disk_plan.check(job, needed)
    if job.resumed:
        torch.set_num_threads(state.run["threads"])
    else:
        job.start({"rows_at_a_time": plan.rows_at_a_time, "threads": torch.get_num_threads()})
    reporter.started(plan, len(inputs.arch.layers), state.finished_layers, inputs.describe())
    reporter.disk(needed, free_bytes(job.folder), job.folder.parent)
    with disk_plan.explain_full_disk(job, plan_after):
        return _Conversion(job, inputs, plan, reporter).run()


Streams = tuple[HiddenStates, HiddenStates | None]
"""Of the model as it is converted, and of the unquantized one (None where nothing is compared with it)."""


class _Conversion:
    """The run of a planned conversion over the unfinished layers."""

    def __init__(
        self, job: ConversionJob, inputs: ConversionInputs, plan: MemoryPlan, reporter: Reporter
    ) -> None:
        self.job = job
        self.inputs = inputs
        self.plan = plan
        self.reporter = reporter
        self.prefetch: Prefetch | None = None

    def run(self) -> ResultSummary:
        """Convert every unfinished layer, and assemble and publish the checkpoint."""
        if self.plan.prefetch:
            lane = StreamLane(self.inputs.device)
            self.prefetch = Prefetch(self.inputs.weights, self.inputs.dtype, lane)
        try:
            return self._run()
        finally:
            if self.prefetch is not None:
                self.prefetch.close()

    def _run(self) -> ResultSummary:
        job, inputs, arch = self.job, self.inputs, self.inputs.arch
        started, before = time.monotonic(), job.state.seconds
        model = build_without_layers(inputs.weights, inputs.source.config(), inputs.dtype, inputs.device)
        use_row_attention(model)  # our own kernels, where they support the model
        rows, rows_a_step = self.plan.rows_at_a_time, self.plan.rows_a_step
        calls, step_calls = self._calls(model, rows), self._calls(model, rows_a_step)
        states, unquantized = self._streams(model)
        empty(model)
        _, layers = decoder_layers(model, inputs.source.config())
        totals = Seconds()
        for index in range(job.state.finished_layers, len(arch.layers)):
            batches = CalibrationBatch(calls[index], rows), CalibrationBatch(step_calls[index], rows_a_step)
            context = self._context(index, layers[index], (states, unquantized), batches)
            self._convert(index, context)
            states, unquantized = context.states, context.unquantized
            totals += context.seconds
            job.state.finished_layers = index + 1
            job.state.reports.append(context.reports)
            job.state.seconds = before + time.monotonic() - started
            job.commit()
            job.hidden(index).unlink(missing_ok=True)
            job.unquantized(index).unlink(missing_ok=True)
            self.reporter.layer(index, context.reports, context.seconds)
            del context  # the memory plan does not count its packed tensors for the next layer
        summary = assemble(job, inputs)
        job.publish()
        total = before + time.monotonic() - started
        summary = summary.with_run(asdict(totals), total, machine.host_memory_peak())
        self.reporter.finished(asdict(summary))
        return summary

    def _calls(self, model: nn.Module, rows: int) -> list[LayerCall]:
        """How the model calls each of its layers with that many rows."""
        return catch_calls(model, self.inputs.arch, self.inputs.rows.tokens[:rows].to(self.inputs.device))

    def _streams(self, model: nn.Module) -> Streams:
        """The hidden states at the input of the first unfinished layer."""
        inputs, tokens, finished = self.inputs, self.inputs.rows.tokens, self.job.state.finished_layers
        shape = (tokens.shape[0], tokens.shape[1], inputs.workload.hidden)
        keep = self.plan.keep_hidden

        def stream(path: Path) -> HiddenStates:
            if finished:
                return HiddenStates.reopen(path, shape, inputs.dtype, keep=keep)
            chunks = embedded(model, tokens, self.plan.rows_at_a_time, inputs.device)
            return HiddenStates.create(path, shape, inputs.dtype, chunks, keep=keep)

        follows = inputs.recipe.config.follows_unquantized
        unquantized = stream(self.job.unquantized(finished)) if follows else None
        return stream(self.job.hidden(finished)), unquantized

    def _context(
        self,
        index: int,
        layer: nn.Module,
        streams: Streams,
        batches: tuple[CalibrationBatch, CalibrationBatch],
    ) -> LayerContext:
        inputs, layers, replay = self.inputs, self.inputs.arch.layers, None
        spec = layers[index]
        if inputs.workload.replays:
            replay = Replay(self.job.folder, inputs.workload.row_length)
            replay.clear()
        return LayerContext(
            layer,
            spec,
            inputs.recipe,
            streams[0],
            batches[0],
            self.job.layer_files(index),
            device=inputs.device,
            unquantized=streams[1],
            step_batch=batches[1],
            replay=replay,
            weights=inputs.weights,
            following=layers[index + 1] if index + 1 < len(layers) else None,
            prefetch=self.prefetch,
            stored_dtype=lambda name: inputs.weights.plan(f"{spec.name}.{name}").dtype,
            on_linear=lambda report: self.reporter.linear(index, report),
        )

    def _convert(self, index: int, context: LayerContext) -> None:
        """Run the stages of one layer. It counts as finished once job.json says so."""
        stages = layer_stages(context.spec, context.recipe, replays=context.replay is not None)
        run_stages(stages, context, lambda name: self.reporter.phase(index, name))
        for report in context.reports:
            for warning in report.warnings(context.recipe.config.damp_percent):
                self.reporter.message(f"{context.spec.name}.{report.name}: {warning}")
        empty(context.layer)
