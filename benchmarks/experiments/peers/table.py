"""results/peers.json as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator

from lowmem.benchmarks.experiments.peers.forms import FormResult, PeersRecord, RuntimeSpeed, SpeedTable


def render(record: PeersRecord) -> str:
    """All tables, and what they were measured with."""
    lines: list[str] = []
    if record.forms:
        lines += [*_quality(record), ""]
    for table in record.speed:
        lines += [*_speed(table), ""]
    return "\n".join([*lines, *_origin(record)])


def _quality(record: PeersRecord) -> Iterator[str]:
    names = [text.text for text in next((f.texts for f in record.forms if f.texts), ())]
    kld = " | ".join(f"KL divergence: {name} | same top-1" for name in names)
    yield f"| | bits a weight | {kld} | perplexity | conversion | peak memory |"
    yield "|---" * (5 + 2 * len(names)) + "|"
    measured = sorted((f for f in record.forms if f.texts), key=lambda f: -f.subject.bits_per_weight)
    for form in measured:
        cells = [f"{text.kld.mean:.6f} | {text.same_top1:.2%}" for text in form.texts]
        cells.append(f"{form.texts[0].ppl:.3f}")
        yield (
            f"| {form.subject.label} | {form.subject.bits_per_weight:.2f} | {' | '.join(cells)} "
            f"| {_conversion(form)} |"
        )
    for form in record.forms:
        if form.failure:
            yield f"| {form.subject.label} | failed: {_cell(form.failure)} |"


def _conversion(form: FormResult) -> str:
    if form.conversion is None:
        return "on the fly | " if form.peer == "bitsandbytes" else " | "
    return f"{form.conversion.wall_seconds:.0f} s | {form.conversion.peak_anonymous_bytes / 2**20:,.0f} MiB"


def _speed(table: SpeedTable) -> Iterator[str]:
    yield (
        f"{table.model}: {table.prompt_tokens} tokens of prefill, {table.new_tokens} of decode, "
        f"{table.threads} threads; median of {table.rounds} rounds taken in turns (lowest to highest)"
    )
    yield ""
    yield "| | prefill, tokens/s | decode, ms/token | kernel |"
    yield "|---|---|---|---|"
    for runtime in table.runtimes:
        yield f"| {runtime.label} | {_times(runtime)} | {_cell(runtime.kernel)} |"


def _times(runtime: RuntimeSpeed) -> str:
    if runtime.prefill is None or runtime.decode is None:
        return f"failed: {_cell(runtime.failure)} | "
    prefill, decode = runtime.prefill, runtime.decode
    low, high = 1000 * decode.low, 1000 * decode.high
    return (
        f"{prefill.median:.0f} ({prefill.low:.0f} to {prefill.high:.0f}) "
        f"| {1000 * decode.median:.2f} ({low:.2f} to {high:.2f})"
    )


def _origin(record: PeersRecord) -> Iterator[str]:
    origin = record.origin
    # A peer in this interpreter is in both.
    found = dict(origin.versions) | dict(record.peer_versions)
    versions = ", ".join(f"{name} {number}" for name, number in found.items())
    yield (
        f"`{origin.command}`, {origin.date[:10]}, {origin.machine.cpu}, {origin.machine.cores} cores; "
        f"{versions}."
    )
    if record.forms:
        tokens = next((f.texts[0].tokens for f in record.forms if f.texts), 0)
        yield (
            f"{tokens:,} tokens of each text. Calibration: {record.calibration}. Bits a weight count all "
            "that is stored of the decoder layers' linears; whatever else a model has stays as it was, in "
            'llama.cpp\'s files too. "importance" weighs its errors by the mean square of each input on '
            "the calibration rows. Peak memory is what no file backs."
        )
    recipes = {f.peer: json.loads(f.recipe) for f in record.forms if f.peer in ("AutoRound", "GPTQModel")}
    for peer, recipe in recipes.items():
        shared = {k: v for k, v in recipe.items() if k not in ("bits", "group_size")}
        yield f"{peer}: " + ", ".join(f"{name} {value}" for name, value in shared.items()) + "."
    yield from (f"{line}." for line in record.left_out)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
