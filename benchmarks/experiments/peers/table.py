"""results/peers.json as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator

from lowmem.benchmarks.experiments.common import cell, made_with, table
from lowmem.benchmarks.experiments.peers.record import PeersRecord, VersionResult


def render(record: PeersRecord) -> str:
    """The table, and what it was measured with."""
    return "\n\n".join([_quality(record), "\n".join(_notes(record))])


def _quality(record: PeersRecord) -> str:
    texts = next((v.texts for v in record.versions if v.texts), ())
    heads = ["", "bits a weight"]
    for text in texts:
        heads += [f"KL divergence: {text.text}", "same top-1"]
    heads += ["perplexity", "conversion", "peak memory"]
    rows = []
    for version in sorted(record.versions, key=lambda v: -v.subject.bits_per_weight):
        cells = [version.subject.label]
        if version.failure:
            cells.append(f"failed: {version.failure}")
        else:
            cells.append(f"{version.subject.bits_per_weight:.2f}")
            for text in version.texts:
                cells += [f"{text.kld.mean:.6f}", f"{text.same_top1:.2%}"]
            cells += [f"{version.texts[0].ppl:.3f}", *_conversion(version)]
        rows.append([*cells, *[""] * (len(heads) - len(cells))])
    return table(heads, rows)


def _conversion(version: VersionResult) -> tuple[str, str]:
    used = version.conversion
    if used is None:
        return "on the fly" if version.peer == "bitsandbytes" else "", ""
    return f"{used.wall_seconds:.0f} s", f"{used.peak_anonymous_bytes / 2**20:,.0f} MiB"


def _notes(record: PeersRecord) -> Iterator[str]:
    yield made_with(record.origin, record.peer_versions)
    tokens = next((v.texts[0].tokens for v in record.versions if v.texts), 0)
    yield (
        f"{tokens:,} tokens of each text. Calibration: {record.calibration}. Bits a weight count all "
        "stored bits of the decoder layers' linears; the rest of the model is unchanged, in llama.cpp's "
        'files too. "importance" weights llama.cpp\'s errors by the mean square of each input on the '
        "calibration rows. Peak memory is anonymous memory."
    )
    recipes = {v.peer: json.loads(v.recipe) for v in record.versions if v.peer in ("AutoRound", "GPTQModel")}
    for peer, recipe in recipes.items():
        shared = {k: v for k, v in recipe.items() if k not in ("bits", "group_size")}
        yield f"{peer}: " + ", ".join(f"{name} {value}" for name, value in shared.items()) + "."
    yield from (f"{cell(line)}." for line in record.left_out)
