"""Stream or compute: the closed form by its worked numbers, the general rule by its definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.break_even import (
    ExpertLayer,
    break_even_rows,
    break_even_tokens,
    cpu_ridge_rows,
    smallest_streamed_step,
)
from planner.popularity import Popularity

rates = st.floats(1e6, 1e14)
bits = st.floats(1.5, 32.0)


def expert_layer(
    num_experts: int = 8, num_chosen: int = 2, *, bits_per_weight: float = 16.0
) -> ExpertLayer:
    """Experts of 10^6 weights that even choices hit; a CPU bound by its FLOPs, a GPU by nothing."""
    even = Popularity.even(num_experts, num_chosen)
    return ExpertLayer(
        expert_bytes=1e6 * bits_per_weight / 8,
        flop_per_row=2e6,
        num_chosen=num_chosen,
        distinct_experts=lambda num_tokens: even.distinct_experts(0, num_tokens),
        link_bytes_per_s=1e9,
        gpu_flop_per_s=1e15,
        cpu_bytes_per_s=1e15,
        cpu_flop_per_s=1e10,
    )


@pytest.mark.parametrize(
    ("cpu_flop_per_s", "rows", "tokens"),
    [(0.2e12, 2.25, 36), (1e12, 11.25, 180), (10e12, 112.5, 1800)],
)
def test_the_worked_numbers_of_the_closed_form(
    cpu_flop_per_s: float, rows: float, tokens: float
) -> None:
    """4.5 bits over 25 GB/s, one expert in 16 chosen: 2.3, 11 and 113 rows."""
    assert break_even_rows(4.5, cpu_flop_per_s, 25e9) == rows
    assert break_even_tokens(4.5, cpu_flop_per_s, 25e9, 128, 8) == tokens
    assert break_even_tokens(4.5, cpu_flop_per_s, 25e9, 16, 1) == tokens


@given(bits, rates, rates, st.floats(1.0, 1e12))
def test_at_break_even_a_copy_takes_as_long_as_the_product(
    bits_per_weight: float, cpu_flop_per_s: float, link_bytes_per_s: float, num_weights: float
) -> None:
    """Whatever the expert's size: bytes over the link against 2 FLOPs a weight and row."""
    rows = break_even_rows(bits_per_weight, cpu_flop_per_s, link_bytes_per_s)
    copy_s = num_weights * bits_per_weight / 8 / link_bytes_per_s
    assert 2 * num_weights * rows / cpu_flop_per_s == pytest.approx(copy_s)


@given(bits, rates, rates, st.floats(1.0, 10.0))
def test_a_faster_link_lowers_the_threshold_and_a_faster_cpu_raises_it(
    bits_per_weight: float, cpu_flop_per_s: float, link_bytes_per_s: float, factor: float
) -> None:
    rows = break_even_rows(bits_per_weight, cpu_flop_per_s, link_bytes_per_s)
    assert break_even_rows(bits_per_weight, cpu_flop_per_s, link_bytes_per_s * factor) <= rows
    assert break_even_rows(bits_per_weight, cpu_flop_per_s * factor, link_bytes_per_s) >= rows


@given(bits, rates, rates, rates)
def test_the_closed_form_holds_where_the_cpu_reads_faster_than_the_link(
    bits_per_weight: float, cpu_flop_per_s: float, cpu_bytes_per_s: float, link_bytes_per_s: float
) -> None:
    """Its break-even is above the CPU's ridge exactly there."""
    ridge = cpu_ridge_rows(bits_per_weight, cpu_flop_per_s, cpu_bytes_per_s)
    rows = break_even_rows(bits_per_weight, cpu_flop_per_s, link_bytes_per_s)
    assert (ridge <= rows) == (cpu_bytes_per_s >= link_bytes_per_s) or ridge == rows


def test_with_every_expert_hit_the_rule_is_the_closed_form() -> None:
    """n* is where both take as long: streaming wins from the next token on."""
    layer = replace(expert_layer(), distinct_experts=lambda num_tokens: 8.0)
    # 10 rows a copy, one expert in 4 chosen
    assert break_even_tokens(16, 1e10, 1e9, 8, 2) == 40
    assert layer.stream_s(40) == layer.cpu_s(40) == 8 * 2e6 / 1e9
    assert smallest_streamed_step(layer, 1000) == 41
    assert smallest_streamed_step(layer, 40) is None


def test_unhit_experts_let_streaming_win_earlier() -> None:
    """36 tokens are the closed form, but 32 hit only 14 of 16 experts."""
    layer = expert_layer(16, 1, bits_per_weight=4.5)
    layer = replace(layer, link_bytes_per_s=25e9, cpu_flop_per_s=0.2e12)
    assert break_even_tokens(4.5, 0.2e12, 25e9, 16, 1) == 36
    # 16 (1 - (15/16)^32) = 13.97 copies of 22.5 us, 314 us, against 32 products of 10 us;
    # of 31 tokens 13.84 copies, 311 us
    assert layer.distinct_experts(32) == pytest.approx(13.97, abs=0.005)
    assert smallest_streamed_step(layer, 4096) == 32


def test_a_cpu_that_reads_slower_than_the_link_copies_never_wins() -> None:
    layer = replace(expert_layer(), cpu_bytes_per_s=0.9e9)
    assert smallest_streamed_step(layer, 1000) == 1


def test_a_gpu_slower_than_the_cpu_never_streams() -> None:
    layer = replace(expert_layer(), gpu_flop_per_s=0.9e10)
    assert smallest_streamed_step(layer, 100_000) is None


def test_an_overhead_of_streaming_puts_it_off() -> None:
    """10 ms more are 25 tokens of 0.4 ms."""
    layer = replace(expert_layer(), distinct_experts=lambda num_tokens: 8.0)
    late = replace(layer, stream_overhead_s=0.0101)
    assert smallest_streamed_step(late, 1000) == 41 + 25
    early = replace(layer, cpu_overhead_s=0.0039)
    assert smallest_streamed_step(early, 1000) == 41 - 10


@given(
    st.tuples(st.floats(1e8, 1e11), st.floats(1e9, 1e13), st.floats(1e8, 1e12)),
    st.floats(1e9, 1e12),
    st.tuples(st.floats(0.0, 0.05), st.floats(0.0, 0.05)),
    st.integers(0, 200),
)
def test_the_smallest_streamed_step_is_that_of_a_scan(
    link_gpu_cpu: tuple[float, float, float],
    cpu_flop_per_s: float,
    overheads: tuple[float, float],
    max_tokens: int,
) -> None:
    """Also where streaming wins in a range only, or loses first and last."""
    layer = replace(
        expert_layer(),
        link_bytes_per_s=link_gpu_cpu[0],
        gpu_flop_per_s=link_gpu_cpu[1],
        cpu_bytes_per_s=link_gpu_cpu[2],
        cpu_flop_per_s=cpu_flop_per_s,
        stream_overhead_s=overheads[0],
        cpu_overhead_s=overheads[1],
    )
    sizes = range(1, max_tokens + 1)
    expected = next((size for size in sizes if layer.stream_s(size) < layer.cpu_s(size)), None)
    assert smallest_streamed_step(layer, max_tokens) == expected


@given(st.floats(1e8, 1e11), st.floats(1e9, 1e12), st.floats(1.0, 8.0))
def test_a_faster_link_never_streams_later_and_a_faster_cpu_never_earlier(
    link_bytes_per_s: float, cpu_flop_per_s: float, factor: float
) -> None:
    """None, never within 2000 tokens, is later than all."""
    layer = replace(
        expert_layer(), link_bytes_per_s=link_bytes_per_s, cpu_flop_per_s=cpu_flop_per_s
    )

    def first(changed: ExpertLayer) -> int:
        return smallest_streamed_step(changed, 2000) or 2001

    assert first(replace(layer, link_bytes_per_s=link_bytes_per_s * factor)) <= first(layer)
    assert first(replace(layer, cpu_flop_per_s=cpu_flop_per_s * factor)) >= first(layer)
