"""Pickle shards read symbolically: the tensors that torch would load, and no code is run."""

from __future__ import annotations

import io
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem.checkpoint.headers import bin as bin_header
from lowmem.checkpoint.headers.bin import BinTensor, read_bin_header
from lowmem.checkpoint.headers.tensor_pickle import MAX_OPCODES
from lowmem.errors import SourceError
from tests.helpers import tiny_model

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
    torch.complex64,
]


def loaded(path: Path) -> dict[str, Any]:
    """The oracle: what torch itself reads, by name."""
    tensors = torch.load(path, mmap=True, weights_only=True)
    return {n: (tuple(t.shape), t.stride(), t.dtype, t.storage_offset()) for n, t in tensors.items()}


def described(tensors: dict[str, BinTensor]) -> dict[str, Any]:
    return {n: (t.shape, t.stride, getattr(torch, t.dtype), t.offset) for n, t in tensors.items()}


def saved(path: Path, value: object, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def rezip(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """Rewrite the shard with another pickle and correct checksums."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return path


def refused(path: Path, match: str) -> SourceError:
    with pytest.raises(SourceError, match=match) as caught:
        read_bin_header(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return caught.value


# ---- what torch.save writes


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_dtype_reads_as_torch_reads_it(tmp_path, dtype):
    values = torch.arange(24).reshape(2, 3, 4).to(dtype)
    path = saved(tmp_path / "x.bin", {"a": values, "b": values[0, 0, 0].clone(), "c": values[:0].clone()})
    found = read_bin_header(path)
    assert described(found) == loaded(path)
    assert {n: t.nbytes for n, t in found.items()} == {
        "a": values.nbytes,
        "b": values.element_size(),
        "c": 0,
    }


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_views_parameters_and_shared_storages(tmp_path, protocol, kind):
    base = torch.arange(60.0).reshape(6, 10)
    tensors = kind(
        whole=base,
        transposed=base.T,
        part=base[2:4, 1:9:2],
        again=base,
        parameter=torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        frozen=torch.nn.Parameter(torch.ones(2, 2), requires_grad=False),
        scalar=torch.tensor(1.5),
        empty=torch.zeros(0, 7),
    )
    path = saved(tmp_path / "x.bin", tensors, pickle_protocol=protocol)
    found = read_bin_header(path)
    assert described(found) == loaded(path)
    assert found["whole"].key == found["part"].key != found["scalar"].key
    assert found["part"].nbytes == 2 * 4 * 4 and found["part"].storage_nbytes == 240


def test_a_state_dict_with_its_metadata(tmp_path):
    """`model.state_dict()` itself carries versions of its modules as an attribute."""
    path = saved(tmp_path / "x.bin", tiny_model("gpt_bigcode_mqa").half().state_dict())
    found = read_bin_header(path)
    assert len(found) > 20
    assert described(found) == loaded(path)


def test_a_shard_of_many_tensors_past_four_gigabytes(tmp_path):
    """Offsets of zip64, and memo numbers and sizes that need more than a byte or two."""
    path = tmp_path / "x.bin"
    tensors = {f"layer.{i}.weight": torch.empty(300, 70_000) for i in range(60)}
    with torch.serialization.skip_data():
        torch.save(tensors, path)
    assert path.stat().st_size > 2**32
    assert described(read_bin_header(path)) == loaded(path)


def test_what_torch_cannot_load_safely_is_refused(tmp_path):
    """torch's restricted unpickler reads protocols up to 3, so the header reader refuses others as well."""
    path = saved(tmp_path / "x.bin", {"x": torch.zeros(3)}, pickle_protocol=4)
    assert torch_reads(path) is None
    refused(path, "cannot be read without running its code")


# ---- what it must not write


class Evil:
    """Unpickled without restriction, this creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_nothing_of_a_pickle_is_run(tmp_path):
    path, target = tmp_path / "x.bin", tmp_path / "was-run"
    saved(path, {"x": torch.zeros(3), "evil": Evil(target)})
    torch.load(path, weights_only=False)
    assert target.exists()  # the attack is real
    target.unlink()
    assert "safetensors" in refused(path, "cannot be read without running its code").hint
    path.write_bytes(pickle.dumps(Evil(target)))
    refused(path, "old format")
    assert not target.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.zeros(2)], "holds list, not a dictionary"),
        (torch.zeros(2), "holds Tensor, not a dictionary"),
        ({"x": 3}, "entry 'x' is int, not a tensor"),
        ({"x": {"y": torch.zeros(2)}}, "entry 'x' is dict, not a tensor"),
        ({1: torch.zeros(2)}, "keys are not all names"),
        ({"x" * 5000: torch.zeros(2)}, "keys are not all names"),
        ({"x": torch.zeros(2).to_sparse()}, "cannot be read without running its code"),
        ({"x": torch.zeros(1).expand(2**20, 2**30)}, r"'x' of shape \[1048576, 1073741824\] is not in the"),
        ({"x": torch.zeros(3, dtype=torch.complex64).conj()}, "cannot be read without running its code"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_anything_but_named_plain_tensors(tmp_path, value, message):
    refused(saved(tmp_path / "x.bin", value), message)


SIZE = b"M\x00\x10"  # 4096, as a pickle spells it


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (SIZE, b"J" + struct.pack("<i", 2**30)),  # the storage
        (SIZE + b"\x85", b"J" + struct.pack("<i", 2**30) + b"\x85"),  # the shape
        (SIZE + b"\x85", b"J" + struct.pack("<i", -4096) + b"\x85"),
        (SIZE + b"\x85", b"\x8a\x0a" + b"\x01" * 10 + b"\x85"),  # a whole number of 80 bits
        (SIZE + b"\x85", b"G" + struct.pack(">d", 4096.0) + b"\x85"),
        (SIZE + b"\x85", SIZE + SIZE + b"\x86"),  # two dimensions, one stride
        (b"K\x01\x85", b"K\x02\x85"),  # a stride that leaves the storage
        (b"QK\x00", b"QK\x01"),  # so does an offset
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x007"),  # another storage's name
        (b"ctorch\nFloatStorage", b"ctorch\nFlowtStorage"),
        (b"ctorch\nFloatStorage", b"ctorch\nDoubleStorage"),
        (b"ctorch\nFloatStorage", b"cother\nFloatStorage"),
        (b"ctorch._utils\n_rebuild_tensor_v2", b"ctorch._utils\n_rebuild_tensor_v9"),
        (b"storage", b"storing"),
        (b"q\x00X", b"0X"),  # the dictionary, thrown away
    ],
)
def test_pickles_that_lie(tmp_path, old, new):
    path = saved(tmp_path / "x.bin", {"x": torch.zeros(4096)})
    assert list(read_bin_header(rezip(path, lambda data: data))) == ["x"]

    def change(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new, 1)

    refused(rezip(path, change), "x.bin")


def _names(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


HOSTILE = {
    "nothing": b"",
    "no end": b"\x80\x02}",
    "an empty stack": b"\x80\x02.",
    "no mark": b"\x80\x02}u.",
    "an odd mark": b"\x80\x02}(X\x01\x00\x00\x00xu.",
    "an unknown opcode": b"\x80\x02\xff.",
    "a text longer than the file": b"\x80\x02X\xff\xff\xff\xffabc.",
    "a memo that was never set": b"\x80\x02h\x07.",
    "a far memo": b"\x80\x02}r\xff\xff\xff\xff.",
    "a list as the dictionary": b"\x80\x02]X\x01\x00\x00\x00xK\x01s.",
    "attributes of a name": b"\x80\x02cos\nsystem\n}b.",
    "a call of a text": b"\x80\x02X\x01\x00\x00\x00x)R.",
    "a call with a list": b"\x80\x02ccollections\nOrderedDict\n]R.",
    "a lone surrogate": b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80K\x01s.",
    "os.system": b"\x80\x02cos\nsystem\n" + _names("true") + b"\x85R.",
    "an object": b"\x80\x02cos\nsystem\n)\x81.",
    "an extension": b"\x80\x02\x82\x01.",
    "a number as text": b"\x80\x02I" + b"9" * 10_000 + b"\n.",
    "a name out of texts": b"\x80\x04" + _names("os") + _names("system") + b"\x93.",
    "tuples in tuples": b"\x80\x02)" + b"\x85" * 50_000 + b".",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_end_in_one_line(tmp_path, case):
    path = rezip(saved(tmp_path / "x.bin", {"x": torch.zeros(3)}), lambda data: HOSTILE[case])
    tracemalloc.start()
    try:
        refused(path, "x.bin")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150_000_000


def test_a_pickle_of_too_many_steps(tmp_path):
    steps = b"\x80\x02" + b")" * (MAX_OPCODES + 10) + b"."
    refused(
        rezip(saved(tmp_path / "x.bin", {"x": torch.zeros(3)}), lambda data: steps), "more than 1000000 steps"
    )


def test_a_pickle_or_a_directory_that_is_too_large(tmp_path):
    path = saved(tmp_path / "x.bin", {"x": torch.zeros(3)})
    rezip(path, lambda data: b"\x80\x02" + b")" * bin_header.MAX_PICKLE)
    refused(path, "not a file that torch.save wrote")
    # A directory that would be most of the file: its length is a number in the last 22 bytes.
    saved(path, {"x": torch.zeros(5_000_000)})
    rezip(path, lambda data: data)
    blob = bytearray(path.read_bytes())
    blob[-10:-6] = struct.pack("<I", 15_000_000)
    path.write_bytes(blob)
    tracemalloc.start()
    try:
        refused(path, "its directory is larger than")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_a_storage_that_is_missing(tmp_path):
    path = saved(tmp_path / "x.bin", {"x": torch.zeros(300)})
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist() if not name.endswith("data/0")}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    refused(path, "'x' of shape .* is not in the file")


# ---- damage

SOUND = OrderedDict(
    x=torch.arange(12.0).reshape(3, 4),
    y=torch.ones(5, dtype=torch.float16),
    z=torch.nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16)),
    t=torch.arange(12.0).reshape(3, 4).T[1:3],
    f=torch.ones(3).to(torch.float8_e4m3fn),
)


def sound_bytes(protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    torch.save(SOUND, buffer, pickle_protocol=protocol)
    return buffer.getvalue()


def torch_reads(path: Path) -> dict[str, Any] | None:
    try:
        return loaded(path)
    except Exception:  # as many ways as there are opcodes
        return None


def check_damaged(path: Path, blob: bytes) -> None:
    """A SourceError, or tensors that torch agrees with and that are inside the file."""
    path.write_bytes(blob)
    tracemalloc.start()
    try:
        found = read_bin_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    except SourceError as error:
        assert "x.bin" in str(error) and "\n" not in str(error)
        peak = tracemalloc.get_traced_memory()[1]
        found = None
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000
    if found is None:
        return
    assert all(t.nbytes <= len(blob) for t in found.values())
    theirs = torch_reads(path)
    assert theirs is None or described(found) == theirs


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.data())
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_of_the_file(tmp_path, data):
    blob = bytearray(sound_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(blob) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip":
            blob[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut" and at:
            del blob[at:]
        else:
            blob[at:at] = data.draw(st.binary(min_size=1, max_size=4))
    check_damaged(tmp_path / "x.bin", bytes(blob))


@FUZZ
@given(st.data())
@pytest.mark.filterwarnings("ignore")
def test_damaged_opcodes_under_right_checksums(tmp_path, data):
    """An attacker can write correct checksums, so the pickle machine itself must be safe."""
    path = tmp_path / "x.bin"
    path.write_bytes(sound_bytes(data.draw(st.sampled_from([2, 4]))))

    def change(pickled: bytes) -> bytes:
        changed = bytearray(pickled)
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(changed) - 1))
            kind = data.draw(st.sampled_from(["flip", "opcode", "cut", "insert", "copy"]))
            if kind == "flip":
                changed[at] ^= 1 << data.draw(st.integers(0, 7))
            elif kind == "opcode":
                changed[at] = data.draw(
                    st.sampled_from(list(b"}](tuseaRQbq.h\x85\x86\x87\x89\x88N0c\x93\x94"))
                )
            elif kind == "cut":
                del changed[at : at + data.draw(st.integers(1, 8))]
            elif kind == "insert":
                changed[at:at] = data.draw(st.binary(min_size=1, max_size=6))
            else:
                changed[at:at] = changed[at : at + data.draw(st.integers(1, 40))]
            changed = changed or bytearray(b".")
        return bytes(changed)

    check_damaged(path, rezip(path, change).read_bytes())
