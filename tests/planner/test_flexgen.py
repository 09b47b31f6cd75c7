"""FlexGen's cost model: its published figures, and its programme in its authors' variables."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import highspy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.flexgen import (
    T4,
    Block,
    FlexGenMachine,
    OptShape,
    Policy,
    Shares,
    decode_lanes_s,
    free_bytes,
    prefill_lanes_s,
)
from planner.flexgen_search import best_shares, search_policy
from planner.model_profile import read_model_profile

PROFILES = Path(__file__).parents[2] / "profiles" / "models"
GIB = 1 << 30
OPT_30B = OptShape(num_layers=48, hidden_size=7168, ffn_size=28672, num_heads=56)
TINY = OptShape(num_layers=3, hidden_size=64, ffn_size=256, num_heads=4)


def block(gpu_batch_size: int, num_gpu_batches: int, machine: FlexGenMachine = T4) -> Block:
    """OPT-30B with prompts of 512 tokens and 32 generated ones."""
    return Block(
        model=OPT_30B,
        machine=machine,
        prompt_len=512,
        output_len=32,
        gpu_batch_size=gpu_batch_size,
        num_gpu_batches=num_gpu_batches,
    )


def found(of: Block) -> Policy:
    policy = best_shares(of)
    assert policy is not None
    return policy


def assert_fits(policy: Policy) -> None:
    """No share is negative or above 1, and no memory is overdrawn by more than rounding."""
    shares, machine = policy.shares, policy.block.machine
    for each in (
        (shares.gpu_weights, shares.cpu_weights, shares.disk_weights),
        (shares.gpu_cache, shares.cpu_cache, shares.disk_cache),
        (shares.gpu_hidden, shares.cpu_hidden),
    ):
        assert all(-1e-8 <= share <= 1 + 1e-8 for share in each)
        assert sum(each) == pytest.approx(1)
    largest = max(machine.gpu_bytes, machine.cpu_bytes, machine.disk_bytes)
    assert min(free_bytes(policy.block, shares)) >= -1e-8 * largest


def authors_cost_s(of: Block) -> float | None:
    """The least seconds by HiGHS, with FlexGen's nine shares and a variable for every term."""
    m, shape = of.machine, of.model
    s, n, layers, h1, h2, heads = (
        *(of.prompt_len, of.output_len, shape.num_layers),
        *(shape.hidden_size, shape.ffn_size, shape.num_heads),
    )
    gbs, bls = of.gpu_batch_size, of.num_seqs
    wi = (8 * h1**2 + 4 * h1 * h2) * of.weight_bits / 16
    lp = highspy.Highs()
    lp.setOptionValue("output_flag", False)
    wg, wc, wn, cg, cc, cn, hg, hc, pre, gen = (lp.addVariable(lb=0.0) for _ in range(10))
    lp.addConstr(wg + wc + wn == 1)
    lp.addConstr(cg + cc + cn == 1)
    lp.addConstr(hg + hc == 1)

    ctog = (wi * (wc + wn) + 2 * s * h1 * bls * hc) * (1 / m.h2d_bytes_per_s)
    dtoc = wi * wn * (1 / m.disk_read_bytes_per_s)
    gtoc = 4 * (s + 1) * h1 * bls * (cc + cn) * (1 / m.d2h_cache_bytes_per_s)
    gtoc += 2 * s * h1 * bls * hc * (1 / m.d2h_hidden_bytes_per_s)
    ctod = 4 * (s + 1) * h1 * bls * cn * (1 / m.disk_cache_write_bytes_per_s)
    linear = bls * (8 * s * h1**2 + 4 * s * h1 * h2) / m.prefill_linear_flop_per_s
    lp.addConstr(pre >= ctog + dtoc)
    lp.addConstr(pre >= gtoc + ctod)
    lp.addConstr(pre >= linear + 4 * bls * s**2 * h1 / m.prefill_attention_flop_per_s)

    ctog = (wi * (wc + wn) + 2 * h1 * bls * hc) * (1 / m.h2d_bytes_per_s)
    dtoc = 4 * bls * (s + n / 2) * h1 * cn * (1 / m.disk_read_bytes_per_s)
    dtoc += wi * wn * (1 / (0.95 * m.disk_read_bytes_per_s))
    context_flops = 4 * bls * (s + n / 2) * h1
    comp = context_flops / m.decode_attention_flop_per_s * cg
    comp += context_flops / m.cpu_attention_rate(gbs, h1) * (cc + cn)
    lp.addConstr(gen >= ctog + 2 * h1 * bls * hc * (1 / m.d2h_hidden_bytes_per_s))
    lp.addConstr(gen >= ctog + dtoc)
    lp.addConstr(gen >= ctog + 4 * bls * h1 * cn * (1 / m.disk_decode_write_bytes_per_s))
    lp.addConstr(gen >= ctog + comp + bls * (8 * h1**2 + 4 * h1 * h2) / m.decode_linear_flop_per_s)

    def at_most(used: highspy.highs.highs_linear_expression, num_bytes: float) -> None:
        """In units near the memory, a power of two so that what cancels does so exactly."""
        usable = m.usable_share * num_bytes
        unit = 0.5 ** round(math.log2(usable))
        lp.addConstr(used * unit <= usable * unit)

    prefill_work = gbs * (8 + 2 + 2 + 4 + 2) * s * h1 + gbs * (2 * heads * s**2 + 2 * s * h2)
    home = wi * layers * wg + 4 * (s + n) * h1 * bls * layers * cg
    at_most(
        home
        + 2 * s * h1 * bls * hg
        + 2 * wi * (1 - wg)
        + 2 * s * h1 * gbs * (1 - hg)
        + prefill_work,
        m.gpu_bytes,
    )
    attention = 2 * h1 + 2 * (s + n) * h1 + 2 * heads * (s + n) + 2 * (s + n) * h1 + 2 * h1
    at_most(
        home
        + 2 * h1 * bls * hg
        + 2 * wi * (1 - wg)
        + 2 * h1 * gbs * (1 - hg)
        + 4 * gbs * (s + n) * h1 * cg
        + gbs * attention * cg
        + gbs * (14 * h1 + 2 * h2),
        m.gpu_bytes,
    )
    at_most(
        wi * layers * wc
        + 2 * s * h1 * bls * hc
        + 4 * s * h1 * bls * layers * cc
        + wi * (1 - wg)
        + 2 * s * h1 * gbs * (1 - hg),
        m.cpu_bytes,
    )
    at_most(
        wi * layers * wc
        + 2 * h1 * bls * hc
        + 4 * (s + n) * h1 * bls * layers * cc
        + wi * wn
        + 8 * (s + n) * h1 * gbs * cn
        + (2 * heads * (s + n) * gbs + 2 * h1 * gbs),
        m.cpu_bytes,
    )
    at_most(wi * layers * wn + 4 * (s + n) * h1 * bls * layers * cn, m.disk_bytes)
    lp.minimize(layers * pre + layers * (n - 1) * gen)
    if lp.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    return float(lp.getObjectiveValue())


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """Small models on machines of all proportions; some fit nowhere."""
    hidden = draw(st.sampled_from([32, 64, 200]))
    model = OptShape(
        num_layers=draw(st.integers(1, 6)), hidden_size=hidden, ffn_size=4 * hidden, num_heads=4
    )
    weights = model.layer_flop_per_token * model.num_layers
    rate = st.floats(1e6, 1e9)
    machine = FlexGenMachine(
        gpu_bytes=weights * draw(st.floats(0.5, 8.0)),
        cpu_bytes=weights * draw(st.floats(0.5, 20.0)),
        disk_bytes=weights * draw(st.floats(0.01, 20.0)),
        h2d_bytes_per_s=draw(rate),
        d2h_cache_bytes_per_s=draw(rate),
        d2h_hidden_bytes_per_s=draw(rate),
        disk_read_bytes_per_s=draw(rate),
        disk_cache_write_bytes_per_s=draw(rate),
        disk_decode_write_bytes_per_s=draw(rate),
        prefill_linear_flop_per_s=1e3 * draw(rate),
        prefill_attention_flop_per_s=1e3 * draw(rate),
        decode_linear_flop_per_s=1e2 * draw(rate),
        decode_attention_flop_per_s=draw(rate),
        cpu_attention_flop_per_s=draw(rate),
        small_batch_loss=0.0328,
        small_width_loss=0.0621,
        small_both_gain=0.0168,
    )
    return Block(
        model=model,
        machine=machine,
        prompt_len=draw(st.integers(1, 64)),
        output_len=draw(st.integers(2, 32)),
        gpu_batch_size=draw(st.integers(1, 8)),
        num_gpu_batches=draw(st.integers(1, 4)),
        weight_bits=draw(st.sampled_from([4, 16])),
    )


def test_the_shape_is_that_of_the_shipped_model() -> None:
    """OPT-30B: 1,233,125,376 bytes a layer, 55.125 GiB in all."""
    spec = read_model_profile(json.loads((PROFILES / "opt-30b.json").read_text())).spec()
    assert (
        OptShape(
            num_layers=spec.num_layers,
            hidden_size=spec.hidden_size,
            ffn_size=spec.layers[0].intermediate_size,
            num_heads=spec.num_heads,
        )
        == OPT_30B
    )
    layer_bytes = block(1, 1).layer_weight_bytes
    assert layer_bytes == 1_233_125_376
    assert layer_bytes * 48 / GIB == 55.125
    # 4 h^2 + 2 h f weights; the spec's also have biases and norms
    matrices = spec.matrices("attention", 0) + spec.matrices("dense", 0)
    assert layer_bytes == 2 * sum(count * rows * columns for count, rows, columns in matrices)


def test_the_published_policy_of_opt_30b_on_a_t4() -> None:
    """Block 144 (3 x 48): 8.70% of the weights on the GPU, cache and activations on the CPU."""
    policy = found(block(48, 3))
    assert round(policy.shares.gpu_weights, 4) == 0.0870
    assert policy.shares.disk_weights == 0
    assert (policy.shares.cpu_cache, policy.shares.cpu_hidden) == (1, 1)
    assert round(policy.prefill_s, 2) == 210.67
    assert round(policy.decode_s, 2) == 450.07
    assert round(policy.tokens_per_s, 3) == 6.974
    # measured, as FlexGen's README has it
    assert policy.tokens_per_s == pytest.approx(7.32, rel=0.05)


@pytest.mark.parametrize(("num_seqs", "tokens_per_s"), [(64, 5.624), (32, 4.318), (8, 1.828)])
def test_the_published_rates_of_smaller_blocks(num_seqs: int, tokens_per_s: float) -> None:
    """One GPU batch each."""
    assert round(found(block(num_seqs, 1)).tokens_per_s, 3) == tokens_per_s


def test_the_published_prefill_is_bound_by_products_and_decode_by_cpu_attention() -> None:
    """A layer by hand: 144 * 512 tokens at 21.24 TFLOP/s; 528 tokens of context at 12.1 GFLOP/s."""
    of = block(48, 3)
    policy = found(of)
    weights = 1_233_125_376
    prefill_s = 144 * 512 * weights / 21.24e12 + 4 * 144 * 512**2 * 7168 / 9.97e12
    assert prefill_lanes_s(of, policy.shares)[2] == pytest.approx(prefill_s)
    assert max(prefill_lanes_s(of, policy.shares)) == pytest.approx(prefill_s)

    # log2(64 / 48) = 0.415 halvings lose 3.28% each
    cpu_rate = T4.cpu_attention_rate(48, 7168)
    assert cpu_rate == pytest.approx(12.3e9 * (1 - 0.0328 * 0.41504), rel=1e-6)
    streamed = (1 - policy.shares.gpu_weights) * weights + 2 * 7168 * 144
    decode_s = streamed / (12.89 * GIB) + 144 * weights / 4.3e12
    decode_s += 4 * 144 * 528 * 7168 / cpu_rate
    assert max(decode_lanes_s(of, policy.shares)) == pytest.approx(decode_s)


def test_cpu_attention_is_slower_for_small_batches_and_widths_but_never_by_more_than_ten() -> None:
    """In halvings below 64 and 4096: 1 + 0.0168 a b - 0.0328 a - 0.0621 b."""
    assert T4.cpu_attention_rate(64, 4096) == T4.cpu_attention_rate(128, 8192) == 12.3e9
    assert T4.cpu_attention_rate(16, 1024) == pytest.approx(
        12.3e9 * (1 + 0.0168 * 4 - 0.0328 * 2 - 0.0621 * 2)
    )
    steep = replace(T4, small_batch_loss=1.0)
    assert steep.cpu_attention_rate(1, 8192) == pytest.approx(1.23e9)


def test_the_lanes_of_a_decode_step_by_hand() -> None:
    """Half of everything off the GPU, half of that on the disk; a rate of one thing a second.

    1 layer of 8 + 16 bytes of weights at hidden 1, FFN 4; 2 sequences, prompts of 2, 4 tokens made.
    """
    rates = {name: 1.0 for name in T4.__dataclass_fields__ if name.endswith("_per_s")}
    machine = replace(T4, **rates)
    model = OptShape(num_layers=1, hidden_size=1, ffn_size=4, num_heads=1)
    of = Block(
        model=model,
        machine=machine,
        prompt_len=2,
        output_len=4,
        gpu_batch_size=2,
        num_gpu_batches=1,
    )
    shares = Shares(
        gpu_weights=0.5, disk_weights=0.25, gpu_cache=0.5, disk_cache=0.25, gpu_hidden=0.5
    )
    in_s = 24 / 2 + 4 / 2
    # 4 tokens of context on the mean, 8 bytes each; weights at 0.95 of the rate
    read_s = 4 * 8 / 4 + 24 / 4 / 0.95
    # 24 FLOPs a sequence, and 4 * 4 of attention, half of them on the slower CPU
    cpu_rate = 1 + 0.0168 * 5 * 12 - 0.0328 * 5 - 0.0621 * 12
    products_s = 2 * 24 + 2 * 16 / 2 + 2 * 16 / 2 / cpu_rate
    assert decode_lanes_s(of, shares) == pytest.approx(
        (in_s + 4 / 2, in_s + read_s, in_s + 8 / 4, in_s + products_s)
    )
    # in prefill 2 tokens of 4 bytes, caches of 3 tokens of 8
    assert prefill_lanes_s(of, shares) == pytest.approx(
        (12 + 8 / 2 + 24 / 4, 24 / 2 + 8 / 2 + 24 / 4, 2 * 2 * 24 + 4 * 2 * 2**2)
    )


def test_a_given_policy_is_priced_without_a_search() -> None:
    """FlexGen's example of OPT-30B, 20% of the weights on the GPU: it needs more than 0.8 of it."""
    shares = Shares(
        gpu_weights=0.2, disk_weights=0.0, gpu_cache=0.0, disk_cache=0.0, gpu_hidden=0.0
    )
    given_policy = Policy(block=block(48, 3), shares=shares)
    assert given_policy.tokens_per_s > found(block(48, 3)).tokens_per_s
    assert min(free_bytes(given_policy.block, shares)) < 0
    relaxed = block(48, 3, replace(T4, usable_share=1.2))
    assert min(free_bytes(relaxed, shares)) > 0


@settings(max_examples=200, deadline=None)
@given(blocks())
def test_the_shares_are_an_exact_solvers_and_fit(of: Block) -> None:
    """In FlexGen's own variables, written down again here."""
    policy, expected_s = best_shares(of), authors_cost_s(of)
    if policy is None or expected_s is None:
        assert policy is None and expected_s is None
        return
    assert policy.prefill_s + policy.decode_s == pytest.approx(expected_s, rel=1e-5)
    assert_fits(policy)


@pytest.mark.parametrize("batch", [(48, 3), (64, 1), (32, 5), (4, 2), (1, 8), (48, 9)])
def test_opt_30b_on_a_t4_against_an_exact_solver(batch: tuple[int, int]) -> None:
    """The published machine, also where the disk is needed."""
    of = block(*batch)
    policy = found(of)
    assert policy.prefill_s + policy.decode_s == pytest.approx(authors_cost_s(of), rel=1e-6)
    assert_fits(policy)


@settings(max_examples=50, deadline=None)
@given(blocks(), st.floats(1.0, 3.0))
def test_more_memory_or_a_faster_link_is_never_slower(of: Block, factor: float) -> None:
    policy = best_shares(of)
    if policy is None:
        return
    machine = of.machine
    for better in (
        replace(machine, gpu_bytes=machine.gpu_bytes * factor),
        replace(machine, cpu_bytes=machine.cpu_bytes * factor),
        replace(machine, h2d_bytes_per_s=machine.h2d_bytes_per_s * factor),
        replace(machine, cpu_attention_flop_per_s=machine.cpu_attention_flop_per_s * factor),
    ):
        improved = found(replace(of, machine=better))
        assert improved.tokens_per_s >= policy.tokens_per_s * (1 - 1e-6)


@pytest.mark.parametrize("gpu_batch_size", [8, 32, 48])
def test_a_larger_block_is_never_slower_until_memory_binds(gpu_batch_size: int) -> None:
    """OPT-30B on the T4: up to the block whose cache no longer fits the CPU."""
    rates, num_batches = [], 1
    while (policy := found(block(gpu_batch_size, num_batches))).shares.disk_cache == 0:
        rates.append(policy.tokens_per_s)
        num_batches += 1
    assert len(rates) >= 3
    assert rates == sorted(rates)


def test_weights_of_four_bits_are_a_quarter_to_copy() -> None:
    """And FlexGen's model then predicts more tokens a second."""
    small = replace(block(48, 3), weight_bits=4)
    assert small.layer_weight_bytes == 1_233_125_376 / 4
    assert found(small).tokens_per_s > found(block(48, 3)).tokens_per_s


def test_a_block_that_fits_nowhere_has_no_shares() -> None:
    none = replace(T4, gpu_bytes=1 * GIB)
    assert best_shares(block(1, 1, none)) is None
    assert search_policy(OPT_30B, none, 512, 32) is None


def test_the_search_beats_the_published_block() -> None:
    """It tries GPU batches of 1, 2, 3, 4, 8, ...: 32 x 5 is a little faster than 48 x 3."""
    policy = search_policy(OPT_30B, T4, 512, 32)
    assert policy is not None
    assert (policy.block.gpu_batch_size, policy.block.num_gpu_batches) == (32, 5)
    assert round(policy.tokens_per_s, 2) == 7.09
    assert policy.tokens_per_s > found(block(48, 3)).tokens_per_s
    assert_fits(policy)


TIGHT = replace(T4, cpu_bytes=3e6, disk_bytes=1.0, h2d_bytes_per_s=1e8)
# The CPU attends, ten times slower for small batches.
FOR_LARGE_BATCHES = replace(
    TIGHT,
    gpu_bytes=0.31e6,
    cpu_bytes=0.6e6,
    decode_attention_flop_per_s=1e4,
    cpu_attention_flop_per_s=1e6,
    small_batch_loss=0.15,
    small_width_loss=0.0,
    small_both_gain=0.0,
)


@pytest.mark.parametrize(
    ("machine", "size", "count"),
    [
        (replace(TIGHT, gpu_bytes=0.4e6), 1, 1),
        (replace(TIGHT, gpu_bytes=2e6), 1, 3),
        (FOR_LARGE_BATCHES, 3, 5),
    ],
)
def test_the_search_finds_the_best_of_all_blocks_it_may_try(
    machine: FlexGenMachine, size: int, count: int
) -> None:
    """A tiny model: every number of batches, up to 40, of every size that fits."""
    policy = search_policy(TINY, machine, 8, 4)
    assert policy is not None
    assert (policy.block.gpu_batch_size, policy.block.num_gpu_batches) == (size, count)
    for other_size in (1, 2, 3, 4, 8, 16, 32, 64, 128):
        for other_count in range(1, 41):
            tried = best_shares(
                replace(policy.block, gpu_batch_size=other_size, num_gpu_batches=other_count)
            )
            assert tried is None or tried.tokens_per_s <= policy.tokens_per_s * (1 + 1e-9)
