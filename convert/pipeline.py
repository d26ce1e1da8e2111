"""`lowmem convert`: the whole story, one decoder layer at a time."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lowmem.convert import disk, memory
from lowmem.convert.calibration import CalibrationRows, CalibrationSpec, load_rows
from lowmem.convert.job import Job, differences
from lowmem.convert.progress import Reporter
from lowmem.convert.recipe import Options, compute_dtype, describe, fit_group_size, recipe_of
from lowmem.convert.result.finish import ResultSummary, put_together
from lowmem.convert.stages.layer import LayerResult, Seconds, quantize_layer
from lowmem.convert.stages.replay import Replay
from lowmem.convert.stages.targets import record

from lowmem.checkpoint import cache
from lowmem.checkpoint.files.whole import free_bytes, refusals
from lowmem.checkpoint.files.writer import TensorPlan, write_tensors
from lowmem.checkpoint.manifest import MANIFEST_FILE
from lowmem.checkpoint.source.open import Source, open_source
from lowmem.config import QuantConfig
from lowmem.errors import CalibrationError, OutputError
from lowmem.generate.attention import use_row_attention
from lowmem.models.architecture import Architecture, build_model, decoder_layers, inspect
from lowmem.models.dialogue import Dialogue
from lowmem.plan import device as machine
from lowmem.streaming.hidden_states import HiddenStates
from lowmem.streaming.layer_calls import LayerCall, catch_calls, embed
from lowmem.streaming.weights import Weights, empty, move_buffers

# Of Options: what changes the result, beside the quantization itself.
_RESULT_OPTIONS = ("shard_size", "store_head", "revision", "compute_dtype")


@dataclass
class _Streams:
    """The hidden states at the input of the layer that comes next: of the model as it is converted, and of
    the unquantized one (None where nothing is corrected towards it)."""

    converted: HiddenStates
    unquantized: HiddenStates | None


@dataclass(frozen=True)
class _Calls:
    """How the model calls its layers: with the rows that run at a time, and with a tuning step's."""

    usual: list[LayerCall]
    step: list[LayerCall]


@dataclass(frozen=True)
class _Work:
    """All that the layers need, checked before the first is read."""

    source: Source
    arch: Architecture
    weights: Weights
    config: QuantConfig
    options: Options
    rows: CalibrationRows
    tokenizer: Any
    dialogue: Dialogue | None
    dtype: torch.dtype
    device: torch.device


def convert(
    source: str | Path,
    out: str | Path | None = None,
    config: QuantConfig | None = None,
    *,
    calibration: CalibrationSpec | None = None,
    options: Options | None = None,
    reporter: Reporter | None = None,
    on_target: Callable[[Path], None] | None = None,
) -> ResultSummary:
    """Quantize the checkpoint `source` into the folder `out` with GPTQ.

    source: a folder, file or hub id (see lowmem.checkpoint.source.open). out: None is the place in lowmem's own
    cache that belongs to the source and the recipe (see lowmem.checkpoint.cache). on_target: called with the
    folder once it is known, before anything is written. The folder appears whole or not at all. An
    interrupted conversion goes on after its last finished layer when it is called again with the same
    arguments, and gives the same bytes.
    Raises LowmemError in one line for everything that the caller can mend.
    """
    options = options or Options()
    reporter = reporter or Reporter()
    calibration = calibration or CalibrationSpec()
    on_target = on_target or (lambda _: None)
    target = None if out is None else Path(out).expanduser().absolute()
    if target is not None:  # before the slow part
        on_target(target)
        _check_out(Job(target), options)
    work = _prepare(str(source), config, calibration, options, reporter)
    if target is None:
        target = _place_in_cache(str(source), work.config, calibration, options)
        on_target(target)
        reporter.message(f"converting into {target}")
    try:
        with refusals(target):
            summary = _convert_into(Job(target), work, reporter)
        if out is None:
            reporter.message(f"use it with: lowmem run {shlex.quote(str(source))}")
        return summary
    finally:
        reporter.close()
        if out is None:
            cache.prune(target)


def _check_out(job: Job, options: Options) -> bool:
    """Refuse what cannot be written; True if all is written, and only the job's folder was left over."""
    if job.was_published():
        return True
    job.remove_waste()
    job.check_out(options.force)
    return False


def _place_in_cache(source: str, config: QuantConfig, calibration: CalibrationSpec, options: Options) -> Path:
    """The folder of the cache for this source and recipe; OutputError if the same is there already."""
    asked, usual = (
        asdict(spec) | {name: getattr(given, name) for name in _RESULT_OPTIONS}
        for spec, given in ((calibration, options), (CalibrationSpec(), Options()))
    )
    others = {name: value for name, value in asked.items() if value != usual[name]}
    target = cache.claim(source, cache.label_of(config, others))
    if (target / MANIFEST_FILE).is_file() and not options.force and not Job(target).was_published():
        Job(target).remove_waste()
        raise OutputError(
            f"{source} is converted already, in {target}",
            f"Type lowmem run {shlex.quote(source)}, or convert it again with --force",
        )
    return target


def _convert_into(job: Job, work: _Work, reporter: Reporter) -> ResultSummary:
    """The conversion, once it is known of what and where to."""
    options = work.options
    leftover = _check_out(job, options)
    recipe = recipe_of(
        work.source.fingerprint(), work.config, work.rows.digest, work.dtype, work.device, options
    )
    with job.working():
        if leftover and (finished := job.load()) and not differences(finished.recipe, recipe):
            job.discard()
            return ResultSummary.of_folder(job.out)
        job.check_out(options.force)
        job.begin(recipe, options.force)
        return _run(job, work, reporter)


def _prepare(
    source_name: str,
    config: QuantConfig | None,
    calibration: CalibrationSpec,
    options: Options,
    reporter: Reporter,
) -> _Work:
    """Open and check everything; nothing is written yet."""
    source = open_source(source_name, revision=options.revision, progress=reporter.message)
    model_config = source.config()
    arch = inspect(model_config)
    weights = Weights(source, arch)
    chosen = fit_group_size(config, arch, reporter)
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if limit and calibration.row_length > limit:
        raise CalibrationError(
            f"rows of {calibration.row_length} tokens do not fit the model's {limit} positions",
            f"Use --row-length {limit} or less",
        )
    device = machine.resolve_device(options.device)
    tokenizer = source.tokenizer()
    dialogue = Dialogue.detect(tokenizer)
    vocab_size = arch.shapes[arch.embedding][0]
    rows = load_rows(calibration, tokenizer, dialogue, vocab_size)
    dtype = compute_dtype(options.compute_dtype, weights.dtype, device)
    return _Work(source, arch, weights, chosen, options, rows, tokenizer, dialogue, dtype, device)


def _run(job: Job, work: _Work, reporter: Reporter) -> ResultSummary:
    arch, state = work.arch, job.state
    machine.return_freed_memory()
    plan = memory.plan(
        arch,
        work.config,
        rows=work.rows.tokens.shape[0],
        row_length=work.rows.tokens.shape[1],
        dtype=work.dtype,
        device=work.device,
        base=machine.host_memory_used(),
        host_budget=work.options.memory or machine.host_memory_available() + machine.host_memory_used(),
        device_budget=machine.card_memory_free(work.device) if work.device.type == "cuda" else 0,
        fixed_rows=state.run.get("rows_at_a_time"),
        read_overhead=work.source.read_overhead,
    )
    rooms = _disk_plans(work, plan)
    room = rooms[state.finished_layers]
    disk.check(job, room.needed)
    if job.resumed:
        torch.set_num_threads(state.run["threads"])
    else:
        job.start({"rows_at_a_time": plan.rows_at_a_time, "threads": torch.get_num_threads()})
    reporter.started(
        plan, len(arch.layers), state.finished_layers, describe(work.source, arch, work.config, work.rows)
    )
    reporter.disk(room.needed, free_bytes(job.folder), job.folder.parent)
    with disk.told(job, rooms):
        return _all_layers(job, work, plan, reporter)


def _disk_plans(work: _Work, plan: memory.MemoryPlan) -> dict[int, disk.DiskPlan]:
    """The room that is needed, by the number of layers that are finished."""
    side_bytes = sum(path.stat().st_size for path in work.source.side_files())
    return {
        finished: disk.plan(
            work.arch,
            work.config,
            plan,
            replays=work.config.true_sequential and work.device.type == "cpu",
            side_bytes=side_bytes,
            store_head=work.options.store_head,
            finished=finished,
        )
        for finished in range(len(work.arch.layers) + 1)
    }


def _all_layers(job: Job, work: _Work, plan: memory.MemoryPlan, reporter: Reporter) -> ResultSummary:
    """Every unfinished layer, and the checkpoint of them."""
    arch, state = work.arch, job.state
    started, before = time.monotonic(), state.seconds
    model = build_model(work.source.config(), work.dtype, buffers=True)
    use_row_attention(model)  # a CPU's attends by our own kernels where they take it
    work.weights.fill(model, "", arch.outside_before_layers(), work.dtype, work.device)
    move_buffers(model, work.device)
    calls = _Calls(
        catch_calls(model, arch, work.rows.tokens[: plan.rows_at_a_time].to(work.device)),
        catch_calls(model, arch, work.rows.tokens[: plan.rows_a_step].to(work.device)),
    )
    streams = _streams(job, work, model, plan)
    empty(model)
    _, layers = decoder_layers(model, work.source.config())
    totals = Seconds()
    for index in range(state.finished_layers, len(arch.layers)):
        result = _convert_layer(job, work, layers[index], index, calls, streams, plan, reporter)
        totals += result.seconds
        state.seconds = before + time.monotonic() - started
        job.commit()
        job.hidden(index).unlink(missing_ok=True)
        job.unquantized(index).unlink(missing_ok=True)
        reporter.layer(index, result)
        del result  # its packed tensors are on disk, and the plan does not count them for the next layer
    summary = put_together(
        job, work.source, work.weights, work.config, work.rows, work.options, work.dialogue, work.tokenizer
    )
    job.publish()
    total = before + time.monotonic() - started
    summary = summary.with_run(asdict(totals), total, machine.host_memory_peak())
    reporter.finished(asdict(summary))
    return summary


def _streams(job: Job, work: _Work, model: torch.nn.Module, plan: memory.MemoryPlan) -> _Streams:
    """The hidden states that enter the first unfinished layer."""
    tokens = work.rows.tokens
    shape = (tokens.shape[0], tokens.shape[1], work.arch.shapes[work.arch.embedding][1])
    finished = job.state.finished_layers

    def chunks() -> Iterator[torch.Tensor]:
        for part in tokens.split(plan.rows_at_a_time):
            yield embed(model, part.to(work.device)).cpu()

    def stream(path: Path) -> HiddenStates:
        if finished:
            return HiddenStates.reopen(path, shape, work.dtype, keep=plan.keep_hidden)
        return HiddenStates.create(path, shape, work.dtype, chunks(), keep=plan.keep_hidden)

    unquantized = stream(job.unquantized(finished)) if work.config.follows_unquantized else None
    return _Streams(stream(job.hidden(finished)), unquantized)


def _convert_layer(
    job: Job,
    work: _Work,
    layer: torch.nn.Module,
    index: int,
    calls: _Calls,
    streams: _Streams,
    plan: memory.MemoryPlan,
    reporter: Reporter,
) -> LayerResult:
    """Read, quantize, stage and advance one decoder layer; it counts as finished once job.json says so."""
    spec, call = work.arch.layers[index], calls.usual[index]
    clock = time.perf_counter()
    work.weights.fill_layer(layer, spec, work.dtype, work.device)
    if index + 1 < len(work.arch.layers):
        work.weights.read_ahead(work.arch.layers[index + 1])
    read_seconds = time.perf_counter() - clock
    clock = time.perf_counter()
    targets = None
    if streams.unquantized is not None:
        reporter.phase(index, "unquantized outputs")
        targets, streams.unquantized = record(
            layer,
            spec,
            call,
            streams.unquantized,
            folder=job.folder,
            next_states=job.unquantized(index + 1),
            rows=plan.rows_at_a_time,
            device=work.device,
            linears=work.config.corrects,
            trial=(calls.step[index], plan.rows_a_step),
        )
    record_seconds = time.perf_counter() - clock
    # A card computes an output again sooner than a file is read.
    replay = Replay(job.folder, work.rows.tokens.shape[1]) if work.device.type == "cpu" else None
    if replay is not None:
        replay.clear()
    result = quantize_layer(
        layer,
        spec,
        call,
        streams.converted,
        work.config,
        rows=plan.rows_at_a_time,
        device=work.device,
        targets=targets,
        replay=replay,
        tune_rows=plan.rows_a_step,
        tune_call=calls.step[index],
        stored_dtype=lambda name: work.weights.plan(f"{spec.name}.{name}").dtype,
        on_phase=lambda text: reporter.phase(index, text),
        on_linear=lambda report: reporter.linear(index, report),
    )
    for report in result.reports:
        for warning in report.warnings(work.config.damp_percent):
            reporter.message(f"{spec.name}.{report.name}: {warning}")
    clock = time.perf_counter()
    _stage(job, work, spec.name, index, result)
    written = time.perf_counter()
    streams.converted = _advance(
        job, work, layer, index, call, streams.converted, replay, plan.rows_at_a_time
    )
    result.seconds.read += read_seconds
    result.seconds.write += written - clock
    result.seconds.forward += time.perf_counter() - written + record_seconds
    empty(layer)
    job.state.finished_layers = index + 1
    job.state.reports.append(list(result.reports))
    return result


def _advance(
    job: Job,
    work: _Work,
    layer: torch.nn.Module,
    index: int,
    call: LayerCall,
    states: HiddenStates,
    replay: Replay | None,
    rows: int,
) -> HiddenStates:
    """The hidden states that enter the next layer."""
    start = 0

    def run(chunk: torch.Tensor) -> torch.Tensor:
        nonlocal start
        hidden = chunk.to(work.device)
        output = call.run(layer, hidden) if replay is None else replay.run(layer, call, start, hidden)
        start += chunk.shape[0]
        return output.cpu()

    states = states.advance(job.hidden(index + 1), rows, run, where=f"after {work.arch.layers[index].name}")
    if replay is not None:
        replay.clear()
    return states


def _stage(job: Job, work: _Work, name: str, index: int, result: LayerResult) -> None:
    """Write the layer's packed linears and its other tensors to a file of its own."""
    arch = work.arch
    spec = arch.layers[index]
    quantized = {f"{linear.name}.weight" for linear in spec.linears}
    plans, rest = [], []
    for tensor_name, tensor in result.tensors.items():
        plans.append(TensorPlan(f"{name}.{tensor_name}", tensor.dtype, tuple(tensor.shape)))
    for tensor_name in arch.inside(spec):
        if tensor_name not in quantized and tensor_name not in result.tensors:
            plans.append(work.weights.plan(f"{name}.{tensor_name}"))
            rest.append(f"{name}.{tensor_name}")
    plans.sort(key=lambda plan: plan.name)

    def read(full: str) -> torch.Tensor:
        if full in rest:
            return work.weights.read_narrowed(full)
        return result.tensors[full[len(name) + 1 :]].cpu()

    write_tensors(job.staged(index), plans, read)
    work.source.release()
