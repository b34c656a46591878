"""Integer codes <-> bit planes: plane j holds bit j of every code, 8 codes a byte, the first in the lowest bit."""

import numpy as np
import numpy.typing as npt


def plane_bytes(count: int) -> int:
    """Return the bytes of one plane of that many codes."""
    return -(-count // 8)


def packed(codes: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.uint8]:
    """Return the planes, shape (bits, ceil(n / 8)), of codes of shape (n,). The last byte is filled up with 0."""
    return np.stack([np.packbits((codes >> plane & 1).astype(np.uint8), bitorder="little") for plane in range(bits)])


def unpacked(planes: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.int32]:
    """Return the first ``count`` codes, shape (count,), of planes of shape (bits, ceil(count / 8))."""
    codes = np.zeros(count, np.int32)
    for plane, packed_bits in enumerate(planes):
        codes |= np.unpackbits(packed_bits, count=count, bitorder="little").astype(np.int32) << plane
    return codes
