"""Records of measurements: JSON round trip, and one-line errors for damaged files."""

from __future__ import annotations

import dataclasses
import json
import types
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lowmem.benchmarks.common.record_file import FILES, from_json, read_record, to_json, write_record
from lowmem.benchmarks.common.records import HumanEvalRecord, LatencyRecord, QualityRecord

from lowmem.errors import SourceError

KINDS = (QualityRecord, HumanEvalRecord, LatencyRecord)


def values_of(kind) -> st.SearchStrategy:
    """Any value of a record's field type."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = {f.name: values_of(hints[f.name]) for f in dataclasses.fields(kind) if f.name != "format"}
        return st.builds(kind, **fields)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return st.lists(values_of(arguments[0]), max_size=2).map(tuple)
        return st.tuples(*map(values_of, arguments))
    if origin in (typing.Union, types.UnionType):
        return st.none() | values_of(arguments[0])
    return {
        str: st.text(max_size=5),
        int: st.integers(0, 1 << 40),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_json_round_trip(kind, data):
    record = data.draw(values_of(kind))
    assert from_json(kind, json.loads(json.dumps(to_json(record)))) == record


def small_record() -> HumanEvalRecord:
    return from_json(HumanEvalRecord, {"origin": _ORIGIN, "subjects": [], "format": 1})


_ORIGIN = {
    "command": "lowmem bench humaneval m",
    "date": "2026-01-01T00:00:00+00:00",
    "machine": {
        "cpu": "c",
        "flags": ["avx2"],
        "cores": 2,
        "memory_bytes": 3,
        "device": "cpu",
        "device_memory_bytes": 0,
    },
    "versions": [["lowmem", "1"]],
    "source": "m",
    "source_digest": "d",
    "load_average": 0,
}


def test_a_folder_without_records_has_none(tmp_path):
    assert [read_record(kind, tmp_path) for kind in KINDS] == [None, None, None]
    write_record(small_record(), tmp_path)
    assert read_record(HumanEvalRecord, tmp_path) == small_record()
    assert [file.name for file in tmp_path.iterdir()] == ["humaneval.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data | {"subjects": 3},
        lambda data: data | {"format": 2},
        lambda data: data | {"more": 1},
        lambda data: {k: v for k, v in data.items() if k != "origin"},
        lambda data: data | {"origin": _ORIGIN | {"load_average": "high"}},
        lambda data: data | {"origin": _ORIGIN | {"versions": [["lowmem"]]}},
        lambda data: [data],
    ],
)
def test_a_damaged_record_is_refused_in_one_line(tmp_path, damage):
    file = tmp_path / FILES[HumanEvalRecord]
    file.write_text(json.dumps(damage(to_json(small_record()))))
    with pytest.raises(SourceError, match=r"humaneval\.json cannot be read"):
        read_record(HumanEvalRecord, tmp_path)


def test_a_truncated_record_is_refused_in_one_line(tmp_path):
    (tmp_path / FILES[HumanEvalRecord]).write_text('{"origin": {')
    with pytest.raises(SourceError, match="cannot be read"):
        read_record(HumanEvalRecord, tmp_path)
