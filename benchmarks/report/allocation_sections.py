"""The report's sections on versions that were made for a size: the bits of each linear, and why."""

from __future__ import annotations

import re
from collections.abc import Callable

from lowmem.benchmarks.common.records import Allocated, AllocatedLinear, QualityRecord, SubjectQuality
from lowmem.benchmarks.report.allocation_plot import Maps, heat_maps
from lowmem.benchmarks.report.document import Column, Section, Table
from lowmem.benchmarks.report.numbers import NOTHING, significant, times, with_error
from lowmem.benchmarks.report.quality_sections import pooled
from lowmem.benchmarks.report.svg import Plot, draw

_LAYER = re.compile(r"(?:.*?\.)?(\d{1,6})\.(.+)", re.ASCII)
_MOST = (24, 256)
"""Kinds of linear and decoder layers that a plot shows; tables show all."""

Linears = dict[tuple[str, int], AllocatedLinear]
"""By (name inside its layer, decoder layer)."""


def allocation_sections(record: QualityRecord) -> list[Section]:
    """Create a section for each version whose bits were chosen for a size."""
    found = [s for s in record.subjects if s.allocated is not None and by_place(s.allocated)]
    return [allocation_section(s, f"allocation-{i}") for i, s in enumerate(found, 1)]


def by_place(allocated: Allocated) -> Linears:
    """The linears by kind and layer, in the order of the record; those outside of layers are left out."""
    found = {}
    for linear in allocated.linears:
        if match := _LAYER.fullmatch(linear.name):
            found[match[2], int(match[1])] = linear
    return found


def allocation_section(subject: SubjectQuality, key: str) -> Section:
    """Create the section on one version. key: its id in the page."""
    allocated = subject.allocated
    assert allocated is not None
    linears = by_place(allocated)
    kinds = tuple(dict.fromkeys(kind for kind, _ in linears))
    layers = tuple(sorted({layer for _, layer in linears}))
    title = f"Bits by layer: {subject.subject.label}"
    text = (
        f"lowmem convert {allocated.made_for} chose how each linear is stored, so that the size is met with "
        "the least predicted KL divergence. A linear's sensitivity is what it alone would add to the KL "
        "divergence at 4 bits.",
        _predicted(subject, allocated),
    )

    def table(caption: str, cell: Callable[[AllocatedLinear], str]) -> Table:
        rows = tuple(
            (
                str(layer),
                *(cell(linears[kind, layer]) if (kind, layer) in linears else NOTHING for kind in kinds),
            )
            for layer in layers
        )
        return Table(caption, (Column("Layer", number=False), *map(Column, kinds)), rows, folded=True)

    label = subject.subject.label
    tables = (
        table(f"Bits and group size of each linear: {label}", _stored),
        table(f"Sensitivity of each linear: {label}", lambda one: significant(one.sensitivity)),
    )
    plot = None
    if len(kinds) <= _MOST[0] and len(layers) <= _MOST[1]:
        maps = Maps(
            kinds,
            layers,
            {place: one.bits for place, one in linears.items()},
            {place: one.sensitivity for place, one in linears.items()},
        )
        plot = _plot(maps, key, title)
    return Section(key, title, text, tables, plot)


def _predicted(subject: SubjectQuality, allocated: Allocated) -> str:
    """The predicted KL divergence beside the measured one."""
    predicted = significant(allocated.predicted_kld)
    sentence = f"Predicted KL divergence, on the calibration rows: {predicted} nats a token."
    if (measured := pooled(subject.texts)) is None:
        return sentence
    ratio = times(measured.kld, allocated.predicted_kld)
    share = f", {ratio} the prediction" if ratio != NOTHING else ""
    return (
        f"{sentence} Measured, on the texts of this report: "
        f"{with_error(measured.kld, measured.kld_error)}{share}."
    )


def _stored(linear: AllocatedLinear) -> str:
    group = "one group" if linear.group_size == -1 else f"g{linear.group_size}"
    return f"{linear.bits}, {group}" + ("" if linear.sym else ", asymmetric")


def _plot(maps: Maps, key: str, title: str) -> Plot:
    bits, found = maps.bits.values(), maps.sensitivities
    least, most = min(found, key=lambda place: found[place]), max(found, key=lambda place: found[place])

    def named(place: tuple[str, int]) -> str:
        return f"{significant(found[place])} ({place[0]} of layer {place[1]})"

    return draw(
        key,
        title,
        f"Two heat maps of {len(maps.kinds)} kinds of linear by {len(maps.layers)} decoder layers. The first "
        f"shows bits, from {min(bits):g} to {max(bits):g}. The second shows sensitivity on a logarithmic "
        f"scale, from {named(least)} to {named(most)} nats. The tables below have the same figures.",
        lambda figure: heat_maps(figure, maps),
    )
