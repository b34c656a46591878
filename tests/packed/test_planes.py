"""Bit planes against bits that are counted one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qconvert.packed.planes import packed, plane_bytes, unpacked


def naive(codes: list[int], bits: int) -> list[list[int]]:
    planes = [[0] * ((len(codes) + 7) // 8) for _ in range(bits)]
    for place, code in enumerate(codes):
        for plane in range(bits):
            if code // 2**plane % 2:
                planes[plane][place // 8] += 2 ** (place % 8)
    return planes


codes_of_some_bits = st.integers(1, 16).flatmap(
    lambda bits: st.tuples(st.lists(st.integers(0, 2**bits - 1), max_size=130), st.just(bits))
)


@given(codes_of_some_bits)
def test_planes_are_those_of_the_naive_count(case):
    codes, bits = case
    planes = packed(np.array(codes, np.int32), bits)
    assert planes.dtype == np.uint8
    assert planes.shape == (bits, plane_bytes(len(codes)))
    assert planes.tolist() == naive(codes, bits)
    assert unpacked(planes, len(codes)).tolist() == codes


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (7, 1), (8, 1), (9, 2), (63, 8), (64, 8), (65, 9)])
def test_bytes_of_a_plane(count, expected):
    assert plane_bytes(count) == expected
