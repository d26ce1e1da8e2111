"""Packing: exact for every width. (The same words as GPTQModel's own packer: test_interop_gptqmodel.py.)"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.checkpoint import packing
from lowmem.checkpoint.packing import pack_rows, pack_zeros, stored_shapes, unpack_rows, unpack_zeros
from lowmem.config import BITS


def stream_words(column: list[int], bits: int) -> list[int]:
    """The layout once more, as one big integer: value i is at bit i * bits."""
    stream = sum(value << (index * bits) for index, value in enumerate(column))
    words = [(stream >> (32 * index)) & 0xFFFFFFFF for index in range(len(column) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@st.composite
def integer_matrices(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    bits = draw(st.sampled_from(BITS))
    rows = draw(st.integers(0, 6)) * (32 if bits == 3 else 32 // bits)
    columns = draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8), bits


@settings(deadline=None, max_examples=100)
@given(integer_matrices(), st.integers(1, 2000))
def test_pack_then_unpack_is_exact_whatever_the_chunk(case: tuple[torch.Tensor, int], chunk: int) -> None:
    q, bits = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_CHUNK_VALUES", chunk)
        words = pack_rows(q, bits)
        assert words.dtype is torch.int32 and words.shape == (q.shape[0] * bits // 32, q.shape[1])
        for column in range(q.shape[1]):
            assert words[:, column].tolist() == stream_words(q[:, column].tolist(), bits)
        assert torch.equal(unpack_rows(words, bits), q)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(BITS), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_every_word_survives_unpack_and_pack(bits: int, units: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (units * 3, columns), generator=generator).to(torch.int32)
    assert torch.equal(pack_rows(unpack_rows(words, bits), bits), words)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(BITS), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
def test_zeros_round_trip(bits: int, groups: int, units: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.randint(1, 1 << bits, (groups, 32 * units), generator=generator)
    words = pack_zeros(zeros, bits)
    assert words.shape == (groups, units * bits) and words.is_contiguous()
    assert torch.equal(unpack_zeros(words, bits).long(), zeros)
    assert torch.equal(unpack_zeros(words, bits, v2=True).long(), zeros - 1)


def test_values_10_and_21_of_three_bits_straddle_words() -> None:
    q = torch.zeros(32, 1, dtype=torch.uint8)
    q[10], q[21] = 0b110, 0b101
    low, middle, high = (word & 0xFFFFFFFF for word in pack_rows(q, 3)[:, 0].tolist())
    assert low == 0b10 << 30
    assert middle == (0b1 << 31) | 0b1
    assert high == 0b10


def test_a_full_v1_field_reads_as_gptqmodel_reads_it() -> None:
    """At 4 bits 15 + 1 carries into the next field; at 3 bits each field wraps by itself."""
    words = torch.tensor([[0x0000003F]], dtype=torch.int32)  # fields 15, 3, 0, 0, …
    assert unpack_zeros(words, 4).tolist() == [[0, 5, 1, 1, 1, 1, 1, 1]]
    words = pack_rows(torch.tensor([7, 3] + [0] * 30, dtype=torch.uint8)[:, None], 3).T.contiguous()
    assert unpack_zeros(words, 3)[0, :3].tolist() == [0, 4, 1]


@pytest.mark.parametrize("bits", BITS)
def test_what_does_not_fit_is_refused(bits: int) -> None:
    q = torch.zeros(32, 4, dtype=torch.int32)
    for bad in (-1, 1 << bits):
        q[3, 1] = bad
        with pytest.raises(ValueError, match="do not fit"):
            pack_rows(q, bits)
    for bad in (0, 1 << bits):
        with pytest.raises(ValueError, match="zero-points"):
            pack_zeros(torch.full((2, 32), bad), bits)
    with pytest.raises(ValueError, match="whole words"):
        pack_rows(torch.zeros(33, 4, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match="int32 words"):
        unpack_rows(torch.zeros(3, 4, dtype=torch.int64), bits)


def test_stored_shapes() -> None:
    shapes = stored_shapes(6144, 6400, 4, 128)
    assert shapes.qweight == (768, 6400)
    assert shapes.qzeros == (48, 800)
    assert shapes.scales == (48, 6400)
    assert shapes.g_idx == (6144,)
    assert stored_shapes(576, 1536, 3, 128).groups == 5  # the last group is half full
    assert stored_shapes(576, 1536, 3, -1).groups == 1
    for bad in ((6144, 6400, 5, 128), (6144, 6400, 4, 0), (6143, 6400, 4, 128), (6144, 6401, 4, 128)):
        with pytest.raises(ValueError):
            stored_shapes(*bad)
