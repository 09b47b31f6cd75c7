"""Stream or compute: from how many tokens on a copy of the experts beats the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def break_even_rows(
    bits_per_weight: float, cpu_flop_per_s: float, link_bytes_per_s: float
) -> float:
    """Rows of one expert from which on its copy takes less time than the CPU's product.

    An expert of P weights is P * bits / 8 bytes to copy and 2 P FLOPs a row, so that its shape
    cancels out: r* = (bits / 16) * cpu_flop_per_s / link_bytes_per_s. It holds where the CPU is
    bound by FLOPs at r* rows (`cpu_ridge_rows` is below it, that is: the CPU reads weights faster
    than the link copies them) and the GPU's own product is hidden behind the copy.

    Parameters
    ----------
    bits_per_weight : float
        As stored, with scales.
    cpu_flop_per_s : float
        Reached by the CPU at this expert's shape, not its peak.
    link_bytes_per_s : float
        Host to device, at the size of an expert, while the CPU works.

    Examples
    --------
    >>> break_even_rows(4.5, 1e12, 25e9)  # 4.5 / 16 * 40 FLOP a byte
    11.25
    """
    return bits_per_weight / 16.0 * cpu_flop_per_s / link_bytes_per_s


def break_even_tokens(
    bits_per_weight: float,
    cpu_flop_per_s: float,
    link_bytes_per_s: float,
    num_experts: int,
    num_chosen: int,
) -> float:
    """Tokens of a step from which on copying a layer's experts beats the CPU: (E / k) r*.

    `break_even_rows` of every expert, rows spread evenly and every expert hit. Where a step leaves
    experts unhit, fewer are copied and streaming wins a little earlier:
    `smallest_streamed_step` counts them.

    Examples
    --------
    >>> break_even_tokens(4.5, 1e12, 25e9, 128, 8)
    180.0
    """
    rows = break_even_rows(bits_per_weight, cpu_flop_per_s, link_bytes_per_s)
    return num_experts / num_chosen * rows


def cpu_ridge_rows(bits_per_weight: float, cpu_flop_per_s: float, cpu_bytes_per_s: float) -> float:
    """Rows of an expert below which the CPU is bound by reading its weights, not by FLOPs.

    There the CPU beats the link whenever it reads faster than the link copies.

    Examples
    --------
    >>> cpu_ridge_rows(16, 1e12, 100e9)
    10.0
    """
    return break_even_rows(bits_per_weight, cpu_flop_per_s, cpu_bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayer:
    """The experts of a layer that live on the CPU, and the rates that they are run at.

    Attributes
    ----------
    expert_bytes : float
        Of one expert as stored.
    flop_per_row : float
        Of one expert for one of its tokens: two for each weight.
    num_chosen : int
        Experts of a token.
    distinct_experts : callable
        Tokens of a step -> expected number of different experts that they choose; it never falls.
        `Popularity.distinct_experts` of a layer, or a count from a trace.
    link_bytes_per_s, cpu_bytes_per_s : float
        Rates of copying an expert to the GPU, and of the CPU reading its weights.
    gpu_flop_per_s, cpu_flop_per_s : float
        Rates of the products.
    stream_overhead_s, cpu_overhead_s : float
        What a layer waits for besides: synchronisation, and when streaming the first copy, which
        no product hides.

    Examples
    --------
    >>> from planner.popularity import Popularity
    >>> even = Popularity.even(8, 2)
    >>> layer = ExpertLayer(expert_bytes=2e6, flop_per_row=2e6, num_chosen=2,
    ...     distinct_experts=lambda num_tokens: even.distinct_experts(0, num_tokens),
    ...     link_bytes_per_s=1e9, gpu_flop_per_s=1e12, cpu_bytes_per_s=4e9, cpu_flop_per_s=10e9)
    >>> round(layer.stream_s(1), 6), round(layer.cpu_s(1), 6)  # 2 experts of 2 ms, of 0.5 ms
    (0.004, 0.001)
    >>> smallest_streamed_step(layer, 512)  # 8 experts of 2 ms against 40 tokens of 0.4 ms
    40
    """

    expert_bytes: float
    flop_per_row: float
    num_chosen: int
    distinct_experts: Callable[[int], float]
    link_bytes_per_s: float
    gpu_flop_per_s: float
    cpu_bytes_per_s: float
    cpu_flop_per_s: float
    stream_overhead_s: float = 0.0
    cpu_overhead_s: float = 0.0

    def stream_s(self, num_tokens: int) -> float:
        """Seconds with every hit expert copied and run on the GPU, copies and products at once."""
        copy_s = self._hit_bytes(num_tokens) / self.link_bytes_per_s
        product_s = self._flops(num_tokens) / self.gpu_flop_per_s
        return max(copy_s, product_s) + self.stream_overhead_s

    def cpu_s(self, num_tokens: int) -> float:
        """Seconds with every hit expert run on the CPU: bound by its bytes or by its FLOPs."""
        read_s = self._hit_bytes(num_tokens) / self.cpu_bytes_per_s
        product_s = self._flops(num_tokens) / self.cpu_flop_per_s
        return max(read_s, product_s) + self.cpu_overhead_s

    def _hit_bytes(self, num_tokens: int) -> float:
        return self.distinct_experts(num_tokens) * self.expert_bytes

    def _flops(self, num_tokens: int) -> float:
        return num_tokens * self.num_chosen * self.flop_per_row


def smallest_streamed_step(layer: ExpertLayer, max_tokens: int) -> int | None:
    """The fewest tokens of a step, at most `max_tokens`, for which streaming is faster.

    None where it never is. One step size is not enough of an answer where streaming wins only in a
    range (a GPU hardly faster than the CPU, and more overhead): compare `stream_s` and `cpu_s` of
    the step at hand.

    Exact: neither time falls with the tokens, so that between two sizes streaming cannot win if it
    takes as long for the smaller as the CPU for the larger.
    """
    return _first_win(layer, 1, max_tokens) if max_tokens >= 1 else None


def _first_win(layer: ExpertLayer, low: int, high: int) -> int | None:
    if layer.cpu_s(high) <= layer.stream_s(low):
        return None
    if low == high:
        return low
    middle = (low + high) // 2
    found = _first_win(layer, low, middle)
    return found if found is not None else _first_win(layer, middle + 1, high)
