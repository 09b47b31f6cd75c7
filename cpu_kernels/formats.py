"""Number formats of weights: bfloat16 as its 16 bits, and matrices packed for the kernels.

numpy has no bfloat16, so an array of it is the uint16 array of its bits. float32 and float16 are
numpy's own.

A packed matrix (R rows, K columns; a product sums over columns) is one blob of bytes: panels, then
scales, then zero points, each part padded to 64 bytes. A panel is 16 rows; missing rows are zeros.
It is a sequence of 64-byte steps, whose 32-bit lane l belongs to row l:

- float32: 1 column a step
- bfloat16: 2 columns a step
- int8: 4 columns a step, bytes of q + 128 with q in -127..127; weight = scale * q
- int4: 8 columns a step; byte b of step s has column 8 s + b in its low half and 8 s + 4 + b in its
  high half; weight = scale * (code - 8) with codes 1..15, or scale * (code - zero) with codes 0..15

Columns beyond the last are filled up with the code of weight 0. Scales are bfloat16 bits and zero
points bytes, both (panels, groups, 16). `pack` and `unpack` here are the definition, in the obvious
numpy; `packing.py` does the same fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

WeightKind = Literal["float32", "bfloat16", "int8", "int4"]
WEIGHT_KINDS: tuple[WeightKind, ...] = get_args(WeightKind)
GROUP_SIZES = (32, 64, 128)
PANEL_ROWS = 16
STEP_BYTES = 64
# Weights from here on cannot be quantised: (max - min) rounded up must stay a float32.
TOO_LARGE = 2.0**126

_COLUMNS_PER_STEP: dict[WeightKind, int] = {"float32": 1, "bfloat16": 2, "int8": 4, "int4": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """How the weights of a packed matrix are stored.

    Parameters
    ----------
    kind
        float32, bfloat16, int8 or int4.
    group_size
        Neighbours along a row that share a scale: 32, 64 or 128 for int8 and int4, else None. A
        row's last group may be shorter.
    has_zero_point
        Whether the groups have a zero point beside the scale; int4 only.

    Raises
    ------
    ValueError
        If the three do not go together.

    Examples
    --------
    >>> int4 = WeightFormat(kind="int4", group_size=128, has_zero_point=True)
    >>> int4.num_groups(4096), int4.panel_bytes(4096)  # 16 * 4096 / 2 bytes
    (32, 32768)
    >>> int4.packed_bytes(16, 4096)  # and 32 * 16 * (2 + 1) bytes
    34304
    """

    kind: WeightKind
    group_size: int | None = None
    has_zero_point: bool = False

    def __post_init__(self) -> None:
        if self.kind not in WEIGHT_KINDS:
            raise ValueError(f"the kind is {self.kind!r} but must be one of {WEIGHT_KINDS}")
        if self.is_quantised and self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"the group size is {self.group_size} but must be one of {GROUP_SIZES}"
            )
        if not self.is_quantised and self.group_size is not None:
            raise ValueError(f"{self.kind} has no groups but the group size is {self.group_size}")
        if self.has_zero_point and self.kind != "int4":
            raise ValueError(f"{self.kind} has no zero point; only int4 does")

    @property
    def is_quantised(self) -> bool:
        """Do groups of weights share a scale?"""
        return self.kind in ("int8", "int4")

    @property
    def columns_per_step(self) -> int:
        """Columns in one 64-byte step of a panel."""
        return _COLUMNS_PER_STEP[self.kind]

    @property
    def zero_code(self) -> int:
        """The code of weight 0 in a group without zero point; 0 if the format has no codes."""
        return {"int8": 128, "int4": 8}.get(self.kind, 0)

    @property
    def scale_steps(self) -> int:
        """Steps of one scale to the largest magnitude, or over the range if there is a zero point.

        0 if the format has no scales.
        """
        return 15 if self.has_zero_point else {"int8": 127, "int4": 7}.get(self.kind, 0)

    def panel_bytes(self, columns: int) -> int:
        """Return the bytes of one panel of 16 rows, without scales."""
        return STEP_BYTES * _ceil_div(columns, self.columns_per_step)

    def num_groups(self, columns: int) -> int:
        """Return the groups in a row, 0 if the format has none."""
        return 0 if self.group_size is None else _ceil_div(columns, self.group_size)

    def scales_at(self, rows: int, columns: int) -> int:
        """Return the byte of the blob at which scales begin, the end of the panels."""
        return num_panels(rows) * self.panel_bytes(columns)

    def zeros_at(self, rows: int, columns: int) -> int:
        """Return the byte of the blob at which zero points begin, the end of the scales."""
        scale_bytes = num_panels(rows) * self.num_groups(columns) * PANEL_ROWS * 2
        return self.scales_at(rows, columns) + _whole_steps(scale_bytes)

    def packed_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of the blob of a matrix."""
        zero_bytes = num_panels(rows) * self.num_groups(columns) * PANEL_ROWS
        end = self.zeros_at(rows, columns)
        return end + _whole_steps(zero_bytes) if self.has_zero_point else end


def num_panels(rows: int) -> int:
    """Return the panels of a matrix of so many rows.

    Examples
    --------
    >>> num_panels(33)
    3
    """
    return _ceil_div(rows, PANEL_ROWS)


def _ceil_div(size: int, divisor: int) -> int:
    return -(-size // divisor)


def _whole_steps(num_bytes: int) -> int:
    return _ceil_div(num_bytes, STEP_BYTES) * STEP_BYTES


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


def pack(weight: NDArray[np.float32], format: WeightFormat) -> NDArray[np.uint8]:
    """Pack a matrix: the definition of the layout, and the reference for `packing.pack_into`.

    The scale of a group is the smallest bfloat16 s for which a code reaches every weight: s times
    127 (int8) or 7 (int4) is at least max|w|, or, with a zero point, s times 15 is at least the
    range of the weights and 0.

    Parameters
    ----------
    weight
        (R, K) float32; finite and below 2**126 if the format is int8 or int4.
    format
        How to store it.

    Returns
    -------
    NDArray[np.uint8]
        The blob, `format.packed_bytes(R, K)` long.

    Raises
    ------
    ValueError
        If the matrix is empty, or a weight cannot be quantised.

    Examples
    --------
    >>> weight = np.arange(-3, 5, dtype=np.float32).reshape(2, 4)
    >>> blob = pack(weight, WeightFormat(kind="bfloat16"))
    >>> len(blob), unpack(blob, WeightFormat(kind="bfloat16"), 2, 4)[1]
    (128, array([1., 2., 3., 4.], dtype=float32))
    """
    rows, columns = weight.shape
    check_sizes(rows, columns)
    width = _padded_columns(format, columns)
    padded = np.zeros((num_panels(rows) * PANEL_ROWS, width), np.float32)
    padded[:rows, :columns] = weight
    blob = np.zeros(format.packed_bytes(rows, columns), np.uint8)
    scales_at, zeros_at = format.scales_at(rows, columns), format.zeros_at(rows, columns)
    if not format.is_quantised:
        _pack_panels(padded if format.kind == "float32" else to_bfloat16_bits(padded), blob, format)
        return blob
    groups = _groups(padded, format)
    scale_bits, zeros = _scales_and_zeros(groups, format)
    scales = from_bfloat16_bits(scale_bits)[:, :, None]
    quotients = groups / np.where(scales > 0, scales, np.float32(1))
    # only a zero point needs the minimum; see error_bound
    codes = np.minimum(np.rint(quotients) + zeros[:, :, None], 15 if format.kind == "int4" else 255)
    codes = codes.reshape(len(padded), -1)[:, :width].astype(np.uint8)
    if format.kind == "int4":
        halves = codes.reshape(len(padded), -1, 2, 4)
        codes = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(padded), -1)
    _pack_panels(codes, blob[:scales_at], format)
    _write(_by_panel(scale_bits), blob[scales_at:])
    if format.has_zero_point:
        _write(_by_panel(zeros.astype(np.uint8)), blob[zeros_at:])
    return blob


def unpack(
    blob: NDArray[np.uint8], format: WeightFormat, rows: int, columns: int
) -> NDArray[np.float32]:
    """Return the matrix that a blob stands for.

    Parameters
    ----------
    blob
        What `pack` returns for the same format and sizes.
    format
        How it is stored.
    rows, columns
        The matrix's sizes.

    Returns
    -------
    NDArray[np.float32]
        (rows, columns), exact: every scale * (code - zero) is a float32.

    Raises
    ------
    ValueError
        If the blob is not as long as the format and sizes say.

    Examples
    --------
    >>> int8 = WeightFormat(kind="int8", group_size=32)
    >>> unpack(pack(np.full((1, 40), -127, np.float32), int8), int8, 1, 40)[0, 39]
    np.float32(-127.0)
    """
    check_blob(blob, format, rows, columns)
    scales_at, zeros_at = format.scales_at(rows, columns), format.zeros_at(rows, columns)
    dtypes: dict[WeightKind, Any] = {"float32": np.float32, "bfloat16": np.uint16}
    elements = blob[:scales_at].view(dtypes.get(format.kind, np.uint8))
    lanes = elements.reshape(num_panels(rows), -1, PANEL_ROWS, 4 // elements.itemsize)
    stored = lanes.transpose(0, 2, 1, 3).reshape(num_panels(rows) * PANEL_ROWS, -1)
    if format.kind == "float32":
        return np.array(stored[:rows, :columns], np.float32)
    if format.kind == "bfloat16":
        return from_bfloat16_bits(stored[:rows, :columns])
    if format.kind == "int4":
        bytes_by_step = stored.reshape(len(stored), -1, 1, 4)
        stored = np.concatenate([bytes_by_step & 15, bytes_by_step >> 4], axis=2)
        stored = stored.reshape(len(lanes) * PANEL_ROWS, -1)
    num_groups = format.num_groups(columns)
    scale_bits = _by_row(blob[scales_at:zeros_at].view(np.uint16), rows, num_groups)
    zeros: Any = np.float32(format.zero_code)
    if format.has_zero_point:
        zeros = _by_row(blob[zeros_at:], rows, num_groups)[:, :, None].astype(np.float32)
    groups = _groups(stored[:rows, :columns].astype(np.float32), format)
    weight = (groups - zeros) * from_bfloat16_bits(scale_bits)[:, :, None]
    return np.ascontiguousarray(weight.reshape(rows, -1)[:, :columns])


def error_bound(weight: NDArray[np.float32], format: WeightFormat) -> NDArray[np.float64]:
    """Return what |weight - unpacked weight| never exceeds, element by element.

    Parameters
    ----------
    weight
        (R, K) float32 that `pack` takes, finite.
    format
        How it is stored.

    Returns
    -------
    NDArray[np.float64]
        (R, K): 0 for float32; for bfloat16 2**-8 of the weight, and infinity where it overflows;
        for int8 and int4 half the group's scale and 2**-18 of it.

    Examples
    --------
    >>> weight = np.full((1, 32), 7, np.float32)  # the scale is 1
    >>> float(error_bound(weight, WeightFormat(kind="int4", group_size=32))[0, 0])
    0.5000038146972656
    """
    # int8 and int4. Division, subtraction and rint are correctly rounded, so they keep order and
    # sign; s is the scale, r = w / s, fl(r) its float32.
    # Unpacking is exact: 8 bits of s times 8 bits of code fit the 24 bits of a float32.
    # Symmetric: max|w| <= L s exactly (L = 127 or 7), so |r| <= L, and L is a float32, so
    # |fl(r)| <= L and |rint(fl(r))| <= L: no code clips. |w - s rint(fl(r))| is at most
    # s (1/2 + |fl(r) - r|), and half a unit in the last place below 128 is 2**-18.
    # Zero point: min = -a s, max = b s, both ranges include 0, z = rint(fl(a)), code =
    # min(rint(fl(r)) + z, 15). Nothing falls below 0: r >= -a, so rint(fl(r)) >= -z. z <= 15: a <=
    # a + b <= 15 (1 + 2**-24) as max - min was rounded once. Where the minimum takes effect, the
    # weight is above s (15 - z), by r - 15 + z <= b - 15 + a + 1/2 + |fl(a) - a| <= 1/2 + 15 *
    # 2**-24 + 2**-21 scales (half a unit in the last place below 16 is 2**-21): less than 1/2 +
    # 2**-18. So rounding the zero point adds no second half of a scale.
    exact = weight.astype(np.float64)
    if format.kind == "float32":
        return np.zeros_like(exact)
    if format.kind == "bfloat16":
        # 8 bits: half of the last is 2**-8 of the first; denormals are multiples of 2**-133
        bound = np.maximum(np.abs(exact) * 2.0**-8, 2.0**-134)
        overflows = np.isinf(from_bfloat16_bits(to_bfloat16_bits(weight)))
        return np.where(overflows, np.inf, bound)
    groups = _groups(weight, format)
    scales = from_bfloat16_bits(_scales_and_zeros(groups, format)[0]).astype(np.float64)
    bounds = scales * (0.5 + 2.0**-18)
    return np.repeat(bounds, groups.shape[2], axis=1)[:, : weight.shape[1]]


def check_sizes(rows: int, columns: int) -> None:
    """Raise ValueError if a matrix is empty."""
    if rows < 1 or columns < 1:
        raise ValueError(f"the matrix is {rows} x {columns} but must have rows and columns")


def check_blob(blob: NDArray[np.uint8], format: WeightFormat, rows: int, columns: int) -> None:
    """Raise ValueError if an array is not a blob of this format and these sizes."""
    check_sizes(rows, columns)
    expected = (format.packed_bytes(rows, columns),)
    if blob.dtype != np.uint8 or blob.shape != expected or not blob.flags.c_contiguous:
        raise ValueError(
            f"the blob is {blob.dtype} {blob.shape} but {rows} x {columns} {format.kind} is "
            f"contiguous uint8 {expected}"
        )


def cannot_quantise(num_weights: int) -> ValueError:
    """Return the error that says how many weights cannot be quantised."""
    return ValueError(
        f"{num_weights} weights are not finite, or 2**126 and more, in a quantised format"
    )


def _padded_columns(format: WeightFormat, columns: int) -> int:
    return _ceil_div(columns, format.columns_per_step) * format.columns_per_step


def _groups(rows: NDArray[np.float32], format: WeightFormat) -> NDArray[np.float32]:
    # (R, groups, group size), the last group filled up with zeros
    assert format.group_size is not None
    num_groups = format.num_groups(rows.shape[1])
    filled = np.zeros((len(rows), num_groups * format.group_size), np.float32)
    filled[:, : rows.shape[1]] = rows
    return filled.reshape(len(rows), num_groups, format.group_size)


def _scales_and_zeros(
    groups: NDArray[np.float32], format: WeightFormat
) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    # (R, groups) each: scales as bfloat16 bits, and the code of weight 0
    num_bad = int(np.count_nonzero(~(np.abs(groups) < TOO_LARGE)))
    if num_bad:
        raise cannot_quantise(num_bad)
    low, high = np.minimum(groups.min(axis=2), 0), np.maximum(groups.max(axis=2), 0)
    steps = np.float32(format.scale_steps)
    # abs: -0.0 would be a scale of its own
    span = np.abs(high - low) if format.has_zero_point else np.abs(groups).max(axis=2)
    quotient_bits = (span / steps).view(np.uint32)
    scale_bits = ((quotient_bits + np.uint32(0xFFFF)) >> 16).astype(np.uint16)
    # the quotient was rounded, perhaps down to a bfloat16 that is too small (or to 0)
    scale_bits += from_bfloat16_bits(scale_bits) * steps < span
    if not format.has_zero_point:
        return scale_bits, np.full(low.shape, format.zero_code, np.float32)
    scales = from_bfloat16_bits(scale_bits)
    return scale_bits, np.rint(-low / np.where(scales > 0, scales, np.float32(1)))


def _pack_panels(rows: NDArray[Any], blob: NDArray[np.uint8], format: WeightFormat) -> None:
    # a lane is 4 bytes of a row, whatever the format
    lanes = rows.view(np.uint32).reshape(-1, PANEL_ROWS, rows.shape[1] * rows.itemsize // 4)
    _write(lanes.transpose(0, 2, 1), blob)


def _by_panel(by_row: NDArray[Any]) -> NDArray[Any]:
    return by_row.reshape(-1, PANEL_ROWS, by_row.shape[1]).transpose(0, 2, 1)


def _by_row(by_panel: NDArray[Any], rows: int, num_groups: int) -> NDArray[Any]:
    # by_panel may end in padding
    size = num_panels(rows) * num_groups * PANEL_ROWS
    panels = by_panel[:size].reshape(-1, num_groups, PANEL_ROWS)
    return panels.transpose(0, 2, 1).reshape(-1, num_groups)[:rows]


def _write(values: NDArray[Any], blob: NDArray[np.uint8]) -> None:
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    blob[: len(flat)] = flat
