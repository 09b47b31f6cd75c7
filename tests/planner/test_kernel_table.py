"""Seconds of a kernel: interpolation worked by hand, and what holds for any device and samples."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from planner.device import DeviceProfile, Sample
from planner.errors import ProfileError
from planner.kernel_table import KernelEstimate, KernelTable, Source
from planner.kernels import Backend, KernelCall
from planner.model_spec import WeightKind
from planner.priors import prior
from tests.planner.sampled import (
    Axis,
    Sampled,
    axes,
    devices,
    sample_of,
    sampled,
    sped_up,
    sped_up_samples,
    staircases,
)
from tests.planner.tiny import tiny_device

PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)
# Seconds that were worked out in another order.
ROUNDING = 1 + 1e-9
INSIDE_SIGMA = 0.05  # between samples

# 16 bytes a second, products in no time.
CPU = tiny_device("cpu")


def product(
    size: int,
    num_tokens: float = 1,
    *,
    kind: WeightKind = "bfloat16",
    backend: Backend = "numba",
) -> KernelCall:
    """A square matrix, all bytes of which are read: 2 * size * size / 16 seconds in bfloat16."""
    return KernelCall(
        kernel="linear", shape=(size, size), format=kind, num_tokens=num_tokens, backend=backend
    )


def table(
    *samples: Sample, cpu: DeviceProfile = CPU, others: tuple[DeviceProfile, ...] = ()
) -> KernelTable:
    return KernelTable(cpu, samples, "cpu", others)


def check(estimate: KernelEstimate, seconds: float, source: Source) -> None:
    assert estimate.seconds == pytest.approx(seconds, rel=1e-12)
    assert estimate.source == source


def test_between_tokens_the_logarithm_of_utilisation_is_interpolated() -> None:
    """8 * 8 weights take 8 s at best. Half of that at 1 token, an eighth at 4: a quarter at 2."""
    two = table(sample_of(product(8, 1), 16.0), sample_of(product(8, 4), 64.0)).estimate(
        product(8, 2)
    )

    assert two.seconds == pytest.approx(32.0, rel=1e-12)
    assert (two.least_s, two.resource, two.source) == (8.0, "memory", "interpolated")
    assert two.sigma == INSIDE_SIGMA


def test_between_sizes_the_logarithm_of_utilisation_is_interpolated() -> None:
    """Half of 8 s at 64 weights, an eighth of 128 s at 1024: a quarter of 32 s at 256."""
    samples = (sample_of(product(8), 16.0), sample_of(product(32), 1024.0))
    between = table(*samples).estimate(product(16))

    assert between.seconds == pytest.approx(128.0, rel=1e-12)
    assert between.source == "interpolated"


def test_between_tokens_and_sizes_both_are() -> None:
    """2 tokens: a quarter at 64 weights (above), 1/16 at 1024; at 256 an eighth of 32 s."""
    samples = (
        sample_of(product(8, 1), 16.0),
        sample_of(product(8, 4), 64.0),
        sample_of(product(32, 1), 1024.0),
        sample_of(product(32, 4), 4096.0),
    )
    between = table(*samples).estimate(product(16, 2))

    assert between.seconds == pytest.approx(256.0, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "seconds", "num_es"),
    [
        (product(8, 16), 64.0, math.log(4)),  # an eighth of 8 s still
        (product(8, 0.25), 16.0, math.log(4)),
        (product(16, 1), 64.0, math.log(4)),  # half of 32 s still
        (product(4, 1), 4.0, math.log(4)),
        (product(16, 16), 256.0, math.log(4) + math.log(4)),
        (product(4096, 1), 4096 * 4096 * 2 / 16 * 2, math.log(512 * 512)),
    ],
)
def test_outside_the_samples_the_utilisation_of_the_boundary_holds(
    call: KernelCall, seconds: float, num_es: float
) -> None:
    """And each factor of e makes it less certain, up to a point."""
    samples = (sample_of(product(8, 1), 16.0), sample_of(product(8, 4), 64.0))
    outside = table(*samples).estimate(call)

    assert outside.seconds == pytest.approx(seconds, rel=1e-12)
    assert outside.source == "extrapolated"
    assert outside.sigma == pytest.approx(INSIDE_SIGMA + min(0.5, 0.06 * num_es), rel=1e-9)


def test_beyond_its_samples_a_size_goes_on_as_a_smaller_one_does() -> None:
    """16 tokens took 64 weights twice the seconds of 1, so 256 weights will take 128 s for 64.

    As far beyond its samples as the sizes differ.
    """
    samples = (
        sample_of(product(8, 1), 16.0),
        sample_of(product(8, 16), 32.0),
        sample_of(product(16, 1), 64.0),
    )
    outside = table(*samples).estimate(product(16, 16))

    check(outside, 128.0, "extrapolated")
    assert outside.sigma == pytest.approx(INSIDE_SIGMA + 0.06 * math.log(4), rel=1e-9)


def test_beyond_the_samples_more_to_compute_takes_longer_in_proportion() -> None:
    """128 FLOPs a token at 32 a second: 4 s each, 64 at 16 tokens; a half of that is reached."""
    cpu = tiny_device("cpu", flop_per_s=32.0)
    known = table(sample_of(product(8, 16), 128.0), cpu=cpu)

    assert known.estimate(product(8, 64)).seconds == pytest.approx(512.0, rel=1e-12)
    # a token's are 4 s to compute and 8 to read
    assert known.estimate(product(8, 1)).seconds == pytest.approx(16.0, rel=1e-12)


def test_a_call_that_was_measured_takes_what_it_took() -> None:
    """Uncertain by its spread: log(1.3) is 2 * 1.2816 standard deviations."""
    sample = replace(sample_of(product(8), 17.0), spread=0.3)
    steady = sample_of(product(8, 2), 18.0)
    known = table(sample, steady)

    check(known.estimate(product(8)), 17.0, "measured")
    assert known.estimate(product(8)).sigma == pytest.approx(math.log(1.3) / 2.5632, rel=1e-9)
    assert known.estimate(product(8, 2)).sigma == 0.02


def test_fewer_seconds_for_more_tokens_are_noise() -> None:
    """12 s at 4 tokens after 16 at 1: between and beyond them it is 16."""
    known = table(sample_of(product(8, 1), 16.0), sample_of(product(8, 4), 12.0))

    for tokens in (2, 8):
        assert known.estimate(product(8, tokens)).seconds == pytest.approx(16.0, rel=1e-12)


def test_what_takes_as_long_for_4_tokens_as_for_1_takes_so_for_2() -> None:
    """Though 2 tokens are bound by memory as 1 is, and 4 by their products: 8, 8 and 16 s."""
    cpu = tiny_device("cpu", flop_per_s=32.0)
    known = table(sample_of(product(8, 1), 64.0), sample_of(product(8, 4), 64.0), cpu=cpu)

    assert known.estimate(product(8, 2)).seconds == pytest.approx(64.0, rel=1e-12)


def test_fewer_seconds_for_a_larger_matrix_are_noise() -> None:
    """64 weights take 16 s, so 256 take no less than that."""
    known = table(sample_of(product(8), 90.0), sample_of(product(16), 40.0))

    assert known.estimate(product(12)).seconds == pytest.approx(90.0, rel=1e-12)
    assert known.estimate(product(32)).seconds == pytest.approx(90.0 * 4, rel=1e-12)


def test_matrices_of_one_size_count_by_their_geometric_mean() -> None:
    """16 s lying, 64 s standing: 32 s at half the rows of both, 256 weights twice."""
    lying, standing = (dataclasses.replace(product(8), shape=shape) for shape in ((4, 16), (16, 4)))
    known = table(sample_of(lying, 16.0), sample_of(standing, 64.0))

    assert known.estimate(product(8)).seconds == pytest.approx(32.0, rel=1e-12)


def test_experts_are_interpolated_each_and_counted() -> None:
    """Two experts of 3 * 64 weights took 96 s, 48 at best: half; so do five of them."""
    two = KernelCall(kernel="experts", shape=(2, 8, 8), format="bfloat16")
    five = dataclasses.replace(two, shape=(5, 8, 8))

    assert table(sample_of(two, 96.0)).estimate(five).seconds == pytest.approx(240.0, rel=1e-12)


def test_the_cache_that_attention_reads_is_a_size() -> None:
    """16 bytes a token: 10 and 1000 of context at an eighth and a half: a quarter at 100."""
    short, middle, long = (
        KernelCall(kernel="decode_attention", shape=(2, 1, 4), format="bfloat16", context=context)
        for context in (10, 100, 1000)
    )
    known = table(sample_of(short, 80.0), sample_of(long, 2000.0))

    assert known.estimate(middle).seconds == pytest.approx(400.0, rel=1e-12)


def test_attention_of_prompts_is_a_matter_of_its_flops() -> None:
    """4 * 8 * pairs at 32 a second: 10 pairs take 10 s, 36 take 36; half of it is reached."""
    cpu = tiny_device("cpu", flop_per_s=32.0)
    four, eight = (
        KernelCall(kernel="prefill_attention", shape=(2, 1, 4), format="float32", num_tokens=tokens)
        for tokens in (4, 8)
    )
    known = table(sample_of(four, 20.0), cpu=cpu)

    assert known.estimate(eight).seconds == pytest.approx(72.0, rel=1e-12)


@pytest.mark.parametrize(
    ("other", "seconds"),
    [
        ({"num_threads": 4}, 4.0),  # 128 bytes at 64 a second are 2 s at best
        ({"format": "float32"}, 32.0),  # 256 at 16 are 16
    ],
)
def test_samples_of_other_threads_or_formats_stand_in(
    other: dict[str, object], seconds: float
) -> None:
    """By what they reach of their own ceilings, half of 8 s; less certain than its own would be."""
    four = tiny_device("cpu", num_threads=4, read_bytes_per_s=64.0)
    sample = replace(sample_of(product(8), seconds), **other)
    assumed = table(sample, others=(CPU, four)).estimate(product(8))

    check(assumed, 16.0, "assumed")
    assert assumed.sigma == pytest.approx(math.hypot(0.05, 0.25))


def test_what_matters_least_stands_in_first() -> None:
    """Other threads before another format, and of threads the nearest."""
    cpus = tuple(tiny_device("cpu", num_threads=threads) for threads in (1, 2, 8))
    one = sample_of(product(8), 16.0)
    two, eight = (replace(one, num_threads=each, seconds=8.0 * each) for each in (2, 8))
    other = replace(one, format="float32", seconds=16.0 * 10)

    assert table(other, eight, two, others=cpus).estimate(product(8)).seconds == pytest.approx(16.0)
    assert table(other, eight, others=cpus).estimate(product(8)).seconds == pytest.approx(64.0)
    assert table(other, others=cpus).estimate(product(8)).seconds == pytest.approx(80.0)


def test_heads_most_alike_stand_in() -> None:
    """Of 32 query heads to 8 of keys and 64 to 1, those of 32 to 4 are nearer the first."""
    calls = [
        KernelCall(kernel="decode_attention", shape=shape, format="bfloat16", context=64)
        for shape in ((32, 8, 128), (64, 1, 128), (32, 4, 128))
    ]
    near, far, wanted = calls
    # 8 * 128 * 2 * 2 * 64 bytes / 16: 16384 s at best
    known = table(sample_of(near, 2 * 16384.0), sample_of(far, 9 * 2048.0))

    check(known.estimate(wanted), 2 * 8192.0, "assumed")


@pytest.mark.parametrize(
    "sample",
    [
        sample_of(product(8), 99.0, backend="torch"),
        sample_of(dataclasses.replace(product(8), kernel="experts", shape=(1, 8, 8)), 99.0),
        sample_of(product(8), 99.0, lane="gpu"),
        replace(sample_of(product(8), 99.0), busy=("h2d",)),
        replace(sample_of(product(8), 99.0), num_threads=4),
    ],
    ids=["backend", "kernel", "lane", "busy", "threads without ceilings"],
)
def test_nothing_else_stands_in(sample: Sample) -> None:
    """8 s at what is assumed of products that read, 0.74."""
    guess = table(sample).estimate(product(8))

    check(guess, 8.0 / 0.74, "prior")
    assert guess.sigma == prior("linear", "memory", "cpu", "bfloat16").sigma


def test_the_resource_that_takes_longest_at_what_is_reached_of_it_counts() -> None:
    """8 s to read and 7 to compute: 8 / 0.74 = 10.8 s, but 7 / 0.55 = 12.7."""
    cpu = tiny_device("cpu", flop_per_s=128 / 7)
    guess = table(cpu=cpu).estimate(product(8))

    check(guess, 7.0 / 0.55, "prior")
    assert (guess.resource, guess.least_s) == ("compute", 8.0)


def test_a_gpu_reads_short_matrices_at_less_than_its_rate() -> None:
    """Half of it at two million bytes."""
    gpu = tiny_device("gpu", read_bytes_per_s=2e6)
    guess = KernelTable(gpu, (), "gpu").estimate(product(1000, backend="torch"))

    assert guess.seconds == pytest.approx(2.0 / 0.69, rel=1e-12)
    two = dataclasses.replace(product(8), kernel="experts", shape=(2, 8, 8))
    one = dataclasses.replace(two, shape=(1, 8, 8))
    assert KernelTable(gpu, (), "gpu").estimate(two).seconds == pytest.approx(
        2 * KernelTable(gpu, (), "gpu").estimate(one).seconds, rel=1e-12
    )


def test_a_format_without_ceilings_is_refused_by_name() -> None:
    with pytest.raises(ProfileError, match="tiny cpu has no rates for float16"):
        table().estimate(product(8, kind="float16"))


@PROPERTY
@given(sampled() | staircases())
def test_a_measured_sample_is_predicted_exactly(known: Sampled) -> None:
    for sample in known.samples:
        estimate = known.table.estimate(sample.call)
        assert (estimate.seconds, estimate.source) == (sample.seconds, "measured")


@PROPERTY
@given(sampled() | staircases(), st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 200))
def test_more_rows_never_take_less(known: Sampled, some: int, more: int, size: int) -> None:
    """Tokens, sequences, bytes of a read; between the samples, beyond them, and on them."""
    few, many = sorted((some, more))
    one = known.table.estimate(known.axis.call(few, size))
    other = known.table.estimate(known.axis.call(many, size))

    assert one.seconds <= other.seconds * ROUNDING


@PROPERTY
@given(sampled() | staircases(), st.data())
def test_rows_of_samples_lie_on_the_curve(known: Sampled, data: st.DataObject) -> None:
    """One row less takes no more than a sample, one row more no less."""
    rows, size = data.draw(st.sampled_from(known.rows)), data.draw(st.sampled_from(known.sizes))
    before, at, after = (
        known.table.estimate(known.axis.call(max(1, rows + step), size)) for step in (-1, 0, 1)
    )

    assert before.seconds <= at.seconds * ROUNDING
    assert at.seconds <= after.seconds * ROUNDING


@PROPERTY
@given(sampled() | staircases(), st.integers(1, 2000), st.integers(1, 200), st.integers(1, 200))
def test_a_larger_size_never_takes_less(known: Sampled, rows: int, some: int, more: int) -> None:
    """Rows of a matrix, width of an expert, context of attention, the vocabulary."""
    small, large = sorted((some, more))
    one = known.table.estimate(known.axis.call(rows, small))
    other = known.table.estimate(known.axis.call(rows, large))

    assert one.seconds <= other.seconds * ROUNDING


@PROPERTY
@given(sampled() | staircases(), st.data())
def test_sizes_of_samples_lie_on_the_curve(known: Sampled, data: st.DataObject) -> None:
    rows, size = data.draw(st.sampled_from(known.rows)), data.draw(st.sampled_from(known.sizes))
    before, at, after = (
        known.table.estimate(known.axis.call(rows, max(1, size + step))) for step in (-1, 0, 1)
    )

    assert before.seconds <= at.seconds * ROUNDING
    assert at.seconds <= after.seconds * ROUNDING


def roofline_s(call: KernelCall, device: DeviceProfile) -> float:
    """The least seconds of a call, from its numbers alone; scales of quantised weights left out."""
    bits: dict[WeightKind, int] = {
        "float32": 32,
        "bfloat16": 16,
        "float16": 16,
        "int8": 8,
        "int4": 4,
    }
    weight_bytes = bits[call.format] / 8
    if call.kernel == "linear":
        num_weights = call.shape[0] * call.shape[1]
    elif call.kernel == "experts":
        num_weights = 3 * call.shape[0] * call.shape[1] * call.shape[2]
    elif call.kernel == "decode_attention":
        _, kv_heads, head_dim = call.shape
        kv_elements = 2 * kv_heads * head_dim * call.context * call.num_seqs
        return kv_elements * weight_bytes / device.read_bytes_per_s
    elif call.kernel == "prefill_attention":
        pairs = sum(call.context + query + 1 for query in range(int(call.num_tokens)))
        return 4 * call.shape[0] * call.shape[2] * pairs / device.flop_per_s[call.format]
    elif call.kernel in ("read", "copy"):
        return call.shape[0] / device.read_bytes_per_s
    else:
        return 0.0
    return max(
        num_weights * weight_bytes / device.read_bytes_per_s,
        2 * num_weights * call.num_tokens / device.flop_per_s[call.format],
    )


@PROPERTY
@given(sampled(), st.integers(1, 2000), st.integers(1, 200), st.booleans())
def test_nothing_is_faster_than_light(
    known: Sampled, rows: int, size: int, is_measured: bool
) -> None:
    """Neither its own nor that of a roofline which knows nothing of samples."""
    call = known.axis.call(rows, size)
    samples = known.samples if is_measured else ()
    estimate = KernelTable(known.device, samples, known.axis.lane).estimate(call)

    assert estimate.seconds * ROUNDING >= estimate.least_s
    assert estimate.seconds * ROUNDING >= roofline_s(call, known.device)


@PROPERTY
@given(sampled(), st.integers(1, 2000), st.integers(1, 200))
def test_a_band_holds_its_median_and_is_wider_outside_the_samples(
    known: Sampled, rows: int, size: int
) -> None:
    estimate = known.table.estimate(known.axis.call(rows, size))
    assert estimate.low_s <= estimate.seconds <= estimate.high_s

    is_inside = known.rows[0] <= rows <= known.rows[-1]
    if known.axis.has_size:
        is_inside = is_inside and known.sizes[0] <= size <= known.sizes[-1]
    if is_inside:
        assert estimate.source in ("measured", "interpolated")
        assert estimate.sigma <= INSIDE_SIGMA
    else:
        assert estimate.source == "extrapolated"
        assert estimate.sigma > INSIDE_SIGMA


@PROPERTY
@given(sampled(), st.data(), st.integers(1, 50))
def test_beyond_the_samples_utilisation_stays(
    known: Sampled, data: st.DataObject, factor: int
) -> None:
    """That of the last sample of a size, for more rows of it."""
    size = data.draw(st.sampled_from(known.sizes))
    at, beyond = (
        known.table.estimate(known.axis.call(rows, size))
        for rows in (known.rows[-1], known.rows[-1] * factor)
    )

    assert at.least_s / at.seconds == pytest.approx(beyond.least_s / beyond.seconds, rel=1e-9)


@PROPERTY
@given(sampled(), st.integers(1, 2000), st.integers(1, 200), st.floats(1.0, 100.0))
def test_a_device_that_is_faster_in_all_is_as_much_faster(
    known: Sampled, rows: int, size: int, factor: float
) -> None:
    """Ceilings and samples alike; what takes its time in Python does not."""
    assume(known.axis.kernel != "step")
    call = known.axis.call(rows, size)
    faster = KernelTable(
        sped_up(known.device, factor), sped_up_samples(known.samples, factor), known.axis.lane
    )

    expected_s = known.table.estimate(call).seconds / factor
    assert faster.estimate(call).seconds == pytest.approx(expected_s, rel=1e-9)


@PROPERTY
@given(devices(), axes, st.integers(1, 2000), st.integers(1, 200), st.floats(1.0, 100.0))
def test_more_bandwidth_never_takes_longer(
    device: DeviceProfile, axis: Axis, rows: int, size: int, factor: float
) -> None:
    """By what is assumed of either: nothing is measured."""
    call = axis.call(rows, size)
    wider = replace(device, read_bytes_per_s=factor * device.read_bytes_per_s)
    before, after = (KernelTable(each, (), axis.lane).estimate(call) for each in (device, wider))

    assert after.seconds <= before.seconds * ROUNDING


@PROPERTY
@given(devices(), axes, st.data())
def test_more_work_never_takes_less_where_nothing_is_measured(
    device: DeviceProfile, axis: Axis, data: st.DataObject
) -> None:
    """Rows and size, whichever resource binds the one and the other; step by step over rows."""
    few, many = sorted(data.draw(st.tuples(st.integers(1, 4000), st.integers(1, 4000))))
    small, large = sorted(data.draw(st.tuples(st.integers(1, 400), st.integers(1, 400))))
    guess = KernelTable(device, (), axis.lane)
    less = guess.estimate(axis.call(few, small))
    more = guess.estimate(axis.call(many, large))

    assert less.source == more.source == "prior"
    assert less.seconds <= more.seconds * ROUNDING
    by_rows = [guess.estimate(axis.call(2**power, small)).seconds for power in range(13)]
    assert all(one <= other * ROUNDING for one, other in pairwise(by_rows))
