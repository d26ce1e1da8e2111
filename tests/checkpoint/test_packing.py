"""Packing: exact for every width. (The same words as GPTQModel's own packer: test_interop_gptqmodel.py.)"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.checkpoint import packing
from lowmem.checkpoint.formats import LAYOUTS, LinearFormat
from lowmem.checkpoint.packing import (
    all_middle,
    pack_rows,
    pack_zeros,
    stored_shapes,
    unpack_rows,
    unpack_zeros,
)
from lowmem.config import BITS

PLANAR_WIDTHS = (7, 6, 5, 3)
"""Widths of which `gptq_p` has other words than a stream of bits."""
CASES = [(bits, layout) for layout, found in LAYOUTS.items() for bits in found.bits]
"""Every width in every layout that stores it."""


def stream_words(column: list[int], bits: int) -> list[int]:
    """The layout once more, as one big integer: value i is at bit i * bits."""
    stream = sum(value << (index * bits) for index, value in enumerate(column))
    words = [(stream >> (32 * index)) & 0xFFFFFFFF for index in range(len(column) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def plane_words(column: list[int], bits: int) -> list[int]:
    """The planar layout once more: for 32 values each plane is a stream of its bits."""
    words = []
    for start in range(0, len(column), 32):
        low = 0
        for width in (4, 2, 1):
            if bits - low >= width:
                plane = [(value >> low) & ((1 << width) - 1) for value in column[start : start + 32]]
                words += stream_words(plane, width)
                low += width
    return words


@st.composite
def integer_matrices(draw: st.DrawFn) -> tuple[torch.Tensor, int, str]:
    bits, layout = draw(st.sampled_from(CASES))
    rows = draw(st.integers(0, 6)) * LinearFormat(bits, 32).unit
    columns = draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8), bits, layout


@settings(deadline=None, max_examples=100)
@given(integer_matrices(), st.integers(1, 2000))
def test_pack_then_unpack_is_exact_whatever_the_chunk(
    case: tuple[torch.Tensor, int, str], chunk: int
) -> None:
    q, bits, layout = case
    expected = plane_words if layout == "gptq_p" and bits in PLANAR_WIDTHS else stream_words
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_CHUNK_VALUES", chunk)
        words = pack_rows(q, bits, layout)
        assert words.dtype is torch.int32 and words.shape == (q.shape[0] * bits // 32, q.shape[1])
        for column in range(q.shape[1]):
            assert words[:, column].tolist() == expected(q[:, column].tolist(), bits)
        assert torch.equal(unpack_rows(words, bits, layout), q)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(CASES), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_every_word_survives_unpack_and_pack(
    case: tuple[int, str], units: int, columns: int, seed: int
) -> None:
    bits, layout = case
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (units * bits, columns), generator=generator).to(torch.int32)
    assert torch.equal(pack_rows(unpack_rows(words, bits, layout), bits, layout), words)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(CASES), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
def test_zeros_round_trip(case: tuple[int, str], groups: int, units: int, seed: int) -> None:
    bits, layout = case
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.randint(1, 1 << bits, (groups, 32 * units), generator=generator)
    words = pack_zeros(zeros, bits, layout)
    assert words.shape == (groups, units * bits) and words.is_contiguous()
    assert torch.equal(unpack_zeros(words, bits, layout).long(), zeros)
    stored = zeros - 1 if layout == "gptq" else zeros
    assert torch.equal(unpack_rows(words.T, bits, layout).T.long(), stored)
    for name in {name for name in LAYOUTS if (bits, name) in CASES}:
        assert all_middle(pack_zeros(torch.full_like(zeros, 1 << (bits - 1)), bits, layout), bits, name) == (
            LinearFormat(bits, 32, layout=name).planar == LinearFormat(bits, 32, layout=layout).planar
            and LAYOUTS[name].zeros_v2 == LAYOUTS[layout].zeros_v2
        )


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
    least = 0 if bits in (7, 6, 5) else 1
    for bad in (least - 1, 1 << bits):
        with pytest.raises(ValueError, match="zero-points"):
            pack_zeros(torch.full((2, 32), bad), bits)
    for layout in (name for name in LAYOUTS if (bits, name) not in CASES):
        with pytest.raises(ValueError, match=f"{layout} does not store {bits} bits"):
            pack_rows(torch.zeros(32, 4, dtype=torch.uint8), bits, layout)
    with pytest.raises(ValueError, match="whole words"):
        pack_rows(torch.zeros(33, 4, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match="int32 words"):
        unpack_rows(torch.zeros(3, 4, dtype=torch.int64), bits)
    if bits in PLANAR_WIDTHS:
        with pytest.raises(ValueError, match="whole number"):
            unpack_rows(torch.zeros(bits + 1, 4, dtype=torch.int32), bits)


def test_stored_shapes() -> None:
    shapes = stored_shapes(6144, 6400, 4, 128)
    assert shapes.qweight == (768, 6400)
    assert shapes.qzeros == (48, 800)
    assert shapes.scales == (48, 6400)
    assert shapes.g_idx == (6144,)
    assert stored_shapes(576, 1536, 3, 128).groups == 5  # the last group is half full
    assert stored_shapes(576, 1536, 3, -1).groups == 1
    assert stored_shapes(6144, 6400, 5, 128).qweight == (960, 6400)
    whole = [(6144, 6400, 9, 128), (6144, 6400, 4, 0)]
    for bad in [*whole, (6143, 6400, 4, 128), (6144, 6401, 4, 128), (6160, 6400, 6, -1)]:
        with pytest.raises(ValueError):
            stored_shapes(*bad)
