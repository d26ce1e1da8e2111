"""The report of `full_size`, made from its record alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

from lowmem.benchmarks.common.records import SubjectLatency
from lowmem.benchmarks.experiments.common import RESULTS, spread, table
from lowmem.benchmarks.experiments.full_size.record import (
    FEW_LAYERS,
    PHASES,
    Conversion,
    FullSize,
    LayerTime,
    Run,
)

REPORT = RESULTS / "full_size.md"
LAYERS = 40
GIB, GB = 2**30, 10**9
COMMAND = "python -m lowmem.benchmarks.experiments.full_size"
TITLES = {
    "make": "write the 16-bit checkpoint, 40 layers",
    "convert-4": "convert it to 4 bits",
    "make-few": f"write its first {FEW_LAYERS} layers",
    "convert-8": "convert these to 8 bits",
    "verify": "verify the 4-bit checkpoint",
    "plan": "plan",
    "run": "load and answer",
    "latency": "time prefill and decode",
    "quality": "quality against the unquantized model",
}
LIMITS = """\
This shows that every step works at the real size on a machine that cannot hold the model, what it takes
there, and that memory and disk are what the plan promised. The weights are made up, so the divergences and
errors below say nothing about a trained model (docs/measurements.md has those). No GPU was available:
nothing here is a GPU's figure. `lowmem doctor` runs the same checks on a GPU: every kernel against the
reference, a CUDA graph's decode step against the eager one, and the memory that is really free."""


def markdown(record: FullSize) -> str:
    """The whole report."""
    machine = record.machine
    names = ", ".join(f"{name} {version}" for name, version in record.versions)
    heads = (
        "step", "time, s", "CPU, s", "peak memory, GiB", "of it anonymous, GiB", "disk, GB", "load before",
    )  # fmt: skip
    steps = (row for step in TITLES for row in _runs(_with_workers(record, step)))
    parts = [
        "# StarChat Alpha's size on a small machine",
        f"{machine.cpu}, {machine.cores} cores ({', '.join(machine.flags)}), "
        f"{machine.memory_bytes / GIB:.1f} GiB of memory, no GPU. {names}.",
        f"`{COMMAND} --work DIR` made the figures, `{COMMAND} --show` prints this report from "
        "results/full_size.json.",
        LIMITS,
        "## Steps",
        table(heads, steps),
        "Peak memory is resident memory, mapped files included. Disk is the most by which the work folder "
        "grew; — was not watched. Load before: the machine's load average when the step began; other "
        "programs sometimes used its two cores.",
        "```sh\n" + "\n".join(dict.fromkeys(run.command for run in record.runs)) + "\n```",
        "## Conversion",
        *_conversion(record),
        "## Verify",
        _verify(record),
        "## Run",
        *_run(record),
        "## Quality",
        *_quality(record),
    ]
    return "\n\n".join(parts)


def _verify(record: FullSize) -> str:
    found, run = record.verified, record.of("verify")[-1]
    return (
        f"{found.files} files, {found.tensors} tensors, {found.linears} packed linears, "
        f"{found.nbytes / GB:.2f} GB: {'sound' if found.ok else 'DAMAGED'}, in {run.wall_seconds:.0f} s and "
        f"{run.peak_bytes / GIB:.2f} GiB."
    )


def _with_workers(record: FullSize, step: str) -> tuple[Run, ...]:
    """The runs of a step; `bench latency` loads the model in another process, whose memory counts."""
    if step != "latency":
        return record.of(step)
    most = record.latency.subjects[0].peak_host_bytes
    return tuple(
        replace(run, peak_bytes=max(run.peak_bytes, most), peak_anonymous_bytes=0) for run in record.of(step)
    )


def _runs(runs: Sequence[Run]) -> Iterator[tuple[str, ...]]:
    for number, run in enumerate(runs, 1):
        title = TITLES[run.step]
        if len(runs) > 1:
            ended = "killed" if run.exit_code < 0 else "interrupted" if run.exit_code else "to the end"
            title += f" (run {number} of {len(runs)}, {ended})"
        yield (
            title,
            f"{run.wall_seconds:,.0f}",
            f"{run.cpu_seconds:,.0f}",
            f"{run.peak_bytes / GIB:.2f}",
            f"{run.peak_anonymous_bytes / GIB:.2f}" if run.peak_anonymous_bytes else "—",
            f"{run.disk_bytes / GB:.2f}" if run.disk_bytes else "—",
            f"{run.load_average_before:.1f}" if run.load_average_before >= 0 else "—",
        )


def _conversion(record: FullSize) -> Iterator[str]:
    four, eight = record.four, record.eight
    peak = max(run.peak_bytes for run in record.of("convert-4"))
    yield (
        f"To 4 bits, 8192 calibration tokens, {len(four.layers)} layers: {four.source_bytes / GB:.2f} GB "
        f"become {four.output_bytes / GB:.2f} GB. The plan promised at most "
        f"{four.predicted_bytes / GIB:.2f} GiB; measured: {peak / GIB:.2f} GiB. A layer took "
        f"{_seconds(four)}, all layers {sum(layer.seconds for layer in four.layers) / 3600:.2f} h."
    )
    yield _tens(four)
    half = len(four.layers) // 2
    first, second = (median(x.seconds for x in part) for part in (four.layers[:half], four.layers[half:]))
    yield (
        f"Time is linear in layers: the median layer of the second half took {second / first:.2f} times as "
        "long as that of the first."
    )
    peak = max(run.peak_bytes for run in record.of("convert-8"))
    mean = sum(layer.seconds for layer in eight.layers) / len(eight.layers)
    yield (
        f"To 8 bits, the first {len(eight.layers)} layers: a layer took {_seconds(eight)}; "
        f"{mean * LAYERS / 3600:.2f} h for {LAYERS} at that rate. Promised {eight.predicted_bytes / GIB:.2f} "
        f"GiB, measured {peak / GIB:.2f} GiB; {eight.output_bytes / GB:.2f} GB were written."
    )
    yield _tens(eight)


def _seconds(conversion: Conversion) -> str:
    return spread([layer.seconds for layer in conversion.layers], "{:.0f}") + " s"


def _tens(conversion: Conversion) -> str:
    """Medians of ten layers at a time."""

    def row(part: Sequence[LayerTime]) -> tuple[str, ...]:
        return (
            f"{part[0].layer}–{part[-1].layer}",
            f"{median(layer.seconds for layer in part):.0f}",
            *(f"{median(getattr(layer, phase) for layer in part):.1f}" for phase in PHASES),
            f"{median(layer.error for layer in part):.2e}",
        )

    layers = conversion.layers
    tens = (row(layers[first : first + 10]) for first in range(0, len(layers), 10))
    return table(("layers", "seconds a layer, median", *PHASES, "output error"), tens)


def _run(record: FullSize) -> Iterator[str]:
    answer, run = record.answer, record.of("run")[-1]
    subject = record.latency.subjects[0]
    rate = record.latency.roofline.read_bytes_per_second
    yield (
        f"`lowmem run`, {answer.label} by {answer.kernel}, context {answer.context}: loaded in "
        f"{answer.load_seconds:.1f} s, first token of {answer.prompt_tokens} after "
        f"{answer.ttft_seconds:.2f} s, then {answer.tokens_per_second:.2f} tokens/s over "
        f"{answer.new_tokens}, each followed by repacking weights for as long again. Planned "
        f"{answer.predicted_bytes / GIB:.2f} GiB, measured {run.peak_bytes / GIB:.2f} GiB "
        f"({(run.peak_bytes / answer.predicted_bytes - 1) * 100:+.1f} %)."
    )
    yield (
        f"`lowmem bench latency`, {record.latency.rounds} rounds, weights repacked, memory bandwidth "
        f"{rate.median / GB:.1f} GB/s ({rate.low / GB:.1f} to {rate.high / GB:.1f}). A prompt's roofline is "
        "torch's matrix product in bfloat16; products of bytes may exceed it:"
    )
    yield table(("", "tokens/s", "lowest to highest", "share of the roofline"), _latency(subject))


def _latency(subject: SubjectLatency) -> Iterator[tuple[str, ...]]:
    for prefill in subject.prefill:
        found = prefill.tokens_per_second
        extremes = f"{found.low:.1f} to {found.high:.1f}"
        yield f"prefill of {prefill.prompt_tokens}", f"{found.median:.1f}", extremes, f"{prefill.share:.0%}"
    for decode in subject.decode:
        rate, extremes = 1 / decode.tpot.median, f"{1 / decode.tpot.high:.2f} to {1 / decode.tpot.low:.2f}"
        yield f"decode after {decode.context_tokens}", f"{rate:.2f}", extremes, f"{decode.share:.0%}"


def _quality(record: FullSize) -> Iterator[str]:
    quality, runs = record.quality, record.of("quality")
    yield (
        f"`lowmem bench quality`, the reference in {quality.reference_dtype}, one decoder layer in memory at "
        f"a time: {quality.reference_seconds:.0f} s and {quality.reference_peak_bytes / GIB:.2f} GiB for the "
        f"unquantized model, {quality.reference_cache_bytes / 2**20:.0f} MiB of cached states; the whole "
        f"command {sum(run.wall_seconds for run in runs):,.0f} s and "
        f"{max(run.peak_bytes for run in runs) / GIB:.2f} GiB. The weights are made up; the figures say "
        "nothing about StarChat Alpha:"
    )
    rows = (
        (
            subject.subject.label,
            text.text,
            f"{text.tokens:,}",
            f"{text.kld.mean:.4f} ± {text.kld.standard_error:.4f}",
            f"{text.same_top1:.1%}",
            f"{text.ppl:,.1f} ({text.reference_ppl:,.1f})",
            f"{subject.seconds:,.0f}",
        )
        for subject in quality.subjects
        for text in subject.texts
    )
    heads = (
        "version", "text", "tokens", "KL divergence", "same top token", "perplexity (reference's)",
        "time, s",
    )  # fmt: skip
    yield table(heads, rows)
