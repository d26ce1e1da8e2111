"""The report of `lowmem.benchmarks.experiments.full_size.command`, of its record alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median

from lowmem.benchmarks.common.processes import ROOT
from lowmem.benchmarks.common.records import SubjectLatency
from lowmem.benchmarks.experiments.full_size.record import (
    FEW_LAYERS,
    PHASES,
    Conversion,
    FullSize,
    LayerTime,
    Run,
)

REPORT = ROOT / "benchmarks" / "results" / "full_size.md"
LAYERS = 40
GIB, GB = 2**30, 10**9
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
What this shows: that every step works at the real size on a machine that could never hold the model, what it
takes there, and that memory and disk are what was promised. What it cannot show: the weights are made up, so
the divergences and errors below are of no trained model (those are measured on one: README, "Quality"), and
no GPU was at hand, so nothing here is a card's figure. `lowmem doctor` runs, on a card of yours, the same
checks that are run here on the CPU: every kernel against the reference, a CUDA graph's decode step against
the eager one, and the memory that is really free."""


def markdown(record: FullSize) -> str:
    """The whole report."""
    machine = record.machine
    names = ", ".join(f"{name} {version}" for name, version in record.versions)
    parts = [
        "# StarChat Alpha's size on a small machine",
        f"{machine.cpu}, {machine.cores} cores ({', '.join(machine.flags)}), "
        f"{machine.memory_bytes / GIB:.1f} GiB of memory, no GPU. {names}.",
        "`python -m lowmem.benchmarks.experiments.full_size.command --work DIR` made the figures, "
        "`python -m lowmem.benchmarks.experiments.full_size.command --show` prints this from results/full_size.json.",
        LIMITS,
        "## Steps",
        _table(
            (
                "step",
                "time, s",
                "CPU, s",
                "peak memory, GiB",
                "of it not in files, GiB",
                "disk, GB",
                "load before",
            ),
            (row for step in TITLES for row in _runs(_with_workers(record, step))),
        ),
        "Peak memory is what was resident, mapped files included. Disk is the most by which the work folder "
        "grew; — is what was not watched. Load before: the machine's load average when the step began; its "
        "two cores were not always free for it.",
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
    return "\n\n".join(parts) + "\n"


def _verify(record: FullSize) -> str:
    found, run = record.verified, record.of("verify")[-1]
    return (
        f"{found.files} files, {found.tensors} tensors, {found.linears} packed linears, "
        f"{found.nbytes / GB:.2f} GB: {'sound' if found.ok else 'DAMAGED'}, in {run.wall_seconds:.0f} s and "
        f"{run.peak_bytes / GIB:.2f} GiB."
    )


def _with_workers(record: FullSize, step: str) -> tuple[Run, ...]:
    """The runs of a step; what is timed is loaded by a process of its own, whose memory counts."""
    if step != "latency":
        return record.of(step)
    most = record.latency.subjects[0].peak_host_bytes
    return tuple(
        replace(run, peak_bytes=max(run.peak_bytes, most), peak_anonymous_bytes=0) for run in record.of(step)
    )


def _runs(runs: Sequence[Run]) -> Iterable[tuple[str, ...]]:
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


def _conversion(record: FullSize) -> Iterable[str]:
    four, eight = record.four, record.eight
    peak = max(run.peak_bytes for run in record.of("convert-4"))
    yield (
        f"To 4 bits, 8192 calibration tokens, {len(four.layers)} layers: {four.source_bytes / GB:.2f} GB "
        f"become {four.output_bytes / GB:.2f} GB. Promised before it began: at most "
        f"{four.predicted_bytes / GIB:.2f} GiB; measured: {peak / GIB:.2f} GiB. "
        f"A layer took {_spread(four.layers)}, "
        f"{sum(layer.seconds for layer in four.layers) / 3600:.2f} h in all."
    )
    yield _table(("layers", "seconds a layer, median", *PHASES, "output error"), _tens(four.layers))
    yield f"What the {len(four.layers)} layers took grows by the layer and by nothing else: {_linear(four)}."
    peak = max(run.peak_bytes for run in record.of("convert-8"))
    mean = sum(layer.seconds for layer in eight.layers) / len(eight.layers)
    yield (
        f"To 8 bits, the first {len(eight.layers)} layers: a layer took {_spread(eight.layers)}; "
        f"{mean * LAYERS / 3600:.2f} h for {LAYERS} at that pace. Promised {eight.predicted_bytes / GIB:.2f} "
        f"GiB, measured {peak / GIB:.2f} GiB; {eight.output_bytes / GB:.2f} GB were written."
    )
    yield _table(("layers", "seconds a layer, median", *PHASES, "output error"), _tens(eight.layers))


def _tens(layers: Sequence[LayerTime]) -> Iterable[tuple[str, ...]]:
    for first in range(0, len(layers), 10):
        part = layers[first : first + 10]
        yield (
            f"{part[0].layer}–{part[-1].layer}",
            f"{median(layer.seconds for layer in part):.0f}",
            *(f"{median(getattr(layer, phase) for layer in part):.1f}" for phase in PHASES),
            f"{median(layer.error for layer in part):.2e}",
        )


def _linear(conversion: Conversion) -> str:
    """The time of the second half of the layers over that of the first, by medians."""
    half = len(conversion.layers) // 2
    first, second = (
        median(layer.seconds for layer in part)
        for part in (conversion.layers[:half], conversion.layers[half:])
    )
    return f"the median layer of the second half took {second / first:.2f} of one of the first"


def _spread(layers: Sequence[LayerTime]) -> str:
    seconds = sorted(layer.seconds for layer in layers)
    return f"{median(seconds):.0f} s ({seconds[0]:.0f} to {seconds[-1]:.0f})"


def _run(record: FullSize) -> Iterable[str]:
    answer, (run, *_) = record.answer, record.of("run")[::-1]
    subject = record.latency.subjects[0]
    rate = record.latency.roofline.read_bytes_per_second
    yield (
        f"`lowmem run`, {answer.label} by {answer.kernel}, context {answer.context}: loaded in "
        f"{answer.load_seconds:.1f} s, first token of {answer.prompt_tokens} after "
        f"{answer.ttft_seconds:.2f} s, then {answer.tokens_per_second:.2f} tokens/s over "
        f"{answer.new_tokens}, each followed by putting weights into the order that is read fastest, for as "
        f"long again. Planned {answer.predicted_bytes / GIB:.2f} GiB, measured "
        f"{run.peak_bytes / GIB:.2f} GiB ({(run.peak_bytes / answer.predicted_bytes - 1) * 100:+.1f} %)."
    )
    yield (
        f"`lowmem bench latency`, {record.latency.rounds} rounds, memory read at "
        f"{rate.median / GB:.1f} GB/s ({rate.low / GB:.1f} to {rate.high / GB:.1f}) meanwhile, the "
        "weights in that order. A prompt's roofline is torch's product in bfloat16, which products of bytes "
        "may pass:"
    )
    yield _table(("", "tokens/s", "lowest to highest", "share of the roofline"), _latency(subject))


def _latency(subject: SubjectLatency) -> Iterable[tuple[str, ...]]:
    for prefill in subject.prefill:
        found = prefill.tokens_per_second
        yield (
            f"prefill of {prefill.prompt_tokens}",
            f"{found.median:.1f}",
            f"{found.low:.1f} to {found.high:.1f}",
            f"{prefill.share:.0%}",
        )
    for decode in subject.decode:
        fastest, slowest = 1 / decode.tpot.low, 1 / decode.tpot.high
        yield (
            f"decode after {decode.context_tokens}",
            f"{1 / decode.tpot.median:.2f}",
            f"{slowest:.2f} to {fastest:.2f}",
            f"{decode.share:.0%}",
        )


def _quality(record: FullSize) -> Iterable[str]:
    quality = record.quality
    runs = record.of("quality")
    yield (
        f"`lowmem bench quality`, the reference in {quality.reference_dtype}, one decoder layer in memory at "
        f"a time: {quality.reference_seconds:.0f} s and {quality.reference_peak_bytes / GIB:.2f} GiB for the "
        f"unquantized model, {quality.reference_cache_bytes / 2**20:.0f} MiB kept of it; the whole command "
        f"{sum(run.wall_seconds for run in runs):,.0f} s and "
        f"{max(run.peak_bytes for run in runs) / GIB:.2f} GiB. Of made-up weights, which say nothing of "
        "StarChat Alpha:"
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
        "form",
        "text",
        "tokens",
        "KL divergence",
        "same top token",
        "perplexity (reference's)",
        "time, s",
    )
    yield _table(heads, rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
