"""Number formats of weights and KV caches: bfloat16 as its 16 bits, and int8 groups with a scale.

numpy has no bfloat16, so an array of it is the uint16 array of its bits. float32 and float16 are
numpy's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

INT8_GROUP_SIZES = (32, 64, 128)
_INT8_MAX = 127

# R rows, K columns (the summed dimension of a product), N = K / group_size groups in a row


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Groups:
    """A matrix in int8, with one float32 scale for every `group_size` neighbours of a row.

    Parameters
    ----------
    values
        (R, K) int8 in -127..127; -128 is not used.
    scales
        (R, N) float32, so that weight = value * scale of its group.
    """

    values: NDArray[np.int8]
    scales: NDArray[np.float32]

    @property
    def group_size(self) -> int:
        """Neighbours along a row that share a scale."""
        return int(self.values.shape[1] // self.scales.shape[1])


def to_bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to bfloat16, to nearest and ties to even.

    Infinities stay, NaN stays NaN, float32 values above the largest bfloat16 become infinity, and
    denormals round like every other value.

    Parameters
    ----------
    values
        float32 of any shape.

    Returns
    -------
    NDArray[np.uint16]
        The bits, in the same shape.

    Examples
    --------
    >>> [hex(bits) for bits in to_bfloat16_bits(np.array([1.0, -2.0], np.float32))]
    ['0x3f80', '0xc000']
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # half of the last kept bit, less one if that bit is 0: a tie then goes to the even neighbour
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    # the sum above may carry a NaN into infinity or past the sign; keep its top bits, make it quiet
    quiet_nan = (bits >> 16) | 0x40
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, quiet_nan, rounded).astype(np.uint16).reshape(np.shape(values))


def from_bfloat16_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen bfloat16 bits to float32, exactly.

    Parameters
    ----------
    bits
        uint16 of any shape.

    Returns
    -------
    NDArray[np.float32]
        The values, in the same shape.

    Examples
    --------
    >>> from_bfloat16_bits(np.array([0x3F80, 0xC000], np.uint16))
    array([ 1., -2.], dtype=float32)
    """
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def pack_int8(weight: NDArray[np.float32], group_size: int) -> Int8Groups:
    """Round a matrix to int8 with one scale a group.

    The scale of a group is max|w| / 127, so |w - unpacked w| <= scale / 2, up to the float32
    rounding of the division and the product (3 units in the last place of max|w|).

    Parameters
    ----------
    weight
        (R, K) float32, finite.
    group_size
        32, 64 or 128 columns that share a scale; divides K.

    Returns
    -------
    Int8Groups
        values (R, K) and scales (R, K / group_size).

    Raises
    ------
    ValueError
        If the group size is none of the three, does not divide K, or a weight is not finite.

    Examples
    --------
    >>> packed = pack_int8(np.linspace(-1, 1, 64, dtype=np.float32)[None], group_size=32)
    >>> packed.values.shape, packed.scales.shape, int(packed.values[0, 0])
    ((1, 64), (1, 2), -127)
    """
    num_rows, num_columns = weight.shape
    if group_size not in INT8_GROUP_SIZES:
        raise ValueError(f"the group size is {group_size} but must be one of {INT8_GROUP_SIZES}")
    if num_columns % group_size:
        raise ValueError(f"{num_columns} columns do not divide into groups of {group_size}")
    groups = np.asarray(weight, np.float32).reshape(num_rows, -1, group_size)
    largest = np.abs(groups).max(axis=2)
    if not np.isfinite(largest).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(weight))} weights are not finite")
    scales = (largest / np.float32(_INT8_MAX)).astype(np.float32)
    # a group of zeros has scale 0; so has one below 127 denormal steps, which is then lost whole
    divisors = np.where(scales > 0, scales, np.float32(1))[:, :, None]
    values = np.clip(np.rint(groups / divisors), -_INT8_MAX, _INT8_MAX).astype(np.int8)
    return Int8Groups(values=values.reshape(num_rows, num_columns), scales=scales)


def unpack_int8(packed: Int8Groups) -> NDArray[np.float32]:
    """Return the matrix that int8 groups stand for.

    Parameters
    ----------
    packed
        values (R, K) int8 and scales (R, N) float32.

    Returns
    -------
    NDArray[np.float32]
        (R, K) value * scale of its group.

    Examples
    --------
    >>> scales = np.array([[0.5]], np.float32)
    >>> unpack_int8(Int8Groups(values=np.full((1, 32), 3, np.int8), scales=scales))[0, 0]
    np.float32(1.5)
    """
    num_rows, num_groups = packed.scales.shape
    groups = packed.values.reshape(num_rows, num_groups, -1).astype(np.float32)
    return (groups * packed.scales[:, :, None]).reshape(packed.values.shape)
