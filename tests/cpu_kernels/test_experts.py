"""A whole expert layer equals the float64 one, for any format, arithmetic, routing and threads."""

# T tokens, k choices a token, E experts, D hidden, I expert width

from __future__ import annotations

import subprocess
import sys
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels import experts as experts_module
from cpu_kernels.calls import Chain, Link
from cpu_kernels.elementwise import route, route_link
from cpu_kernels.experts import (
    NO_EXPERT,
    PackedExperts,
    check_experts,
    expert_bytes,
    experts_links,
    run_experts,
)
from cpu_kernels.formats import WeightFormat
from cpu_kernels.linear import linear, linear_link
from cpu_kernels.microkernels import Compute
from cpu_kernels.scratch import Scratch
from tests.cpu_kernels.exact_products import (
    KINDS,
    Experts,
    assert_within,
    case_name,
    cases,
    expert_layer,
    experts_of,
    matrix_of,
    random_experts,
    stored,
)

every_kind = pytest.mark.parametrize("case", cases(KINDS), ids=case_name)
Case = tuple[WeightFormat, Compute]


class Layer:
    """Random experts, tokens and choices; `ids` may be replaced."""

    def __init__(
        self,
        case: Case,
        *,
        num_tokens: int = 5,
        num_experts: int = 4,
        top_k: int = 2,
        hidden: int = 37,
        width: int = 21,
        x_format: str = "float32",
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        format, self.compute = case
        self.experts: Experts = random_experts(rng, num_experts, hidden, width, format)
        x = rng.standard_normal((num_tokens, hidden)).astype(np.float32)
        self.x: NDArray[Any] = stored(x, x_format)
        self.ids = np.stack(
            [rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)]
            or [np.empty(top_k, np.int64)]
        )[:num_tokens]
        self.weights = rng.uniform(-1, 1, (num_tokens, top_k)).astype(np.float32)

    def run(self, num_threads: int = 1) -> NDArray[np.float32]:
        """The layer's output in an array that was full of NaN."""
        out = np.full(self.x.shape, np.nan, np.float32)
        run_experts(
            self.x,
            self.experts.packed,
            self.ids,
            self.weights,
            compute=self.compute,
            num_threads=num_threads,
            scratch=Scratch(),
            out=out,
        )
        return out

    def links(
        self, out: NDArray[np.float32], num_threads: int = 2, scratch: Scratch | None = None
    ) -> tuple[Link, ...]:
        """What writes the layer's output into an array."""
        return experts_links(
            self.x,
            self.experts.packed,
            self.ids,
            self.weights,
            compute=self.compute,
            num_threads=num_threads,
            scratch=scratch or Scratch(),
            out=out,
        )

    def assert_right(self, num_threads: int = 1) -> None:
        expected = expert_layer(self.x, self.experts, self.ids, self.weights, self.compute)
        assert_within(self.run(num_threads), expected)


@given(
    case=st.sampled_from(cases(KINDS)),
    num_tokens=st.integers(0, 60),
    num_experts=st.integers(1, 9),
    top_k=st.integers(1, 9),
    hidden=st.integers(1, 90),
    width=st.one_of(st.integers(1, 50), st.integers(120, 140)),
    x_format=st.sampled_from(["float32", "bfloat16"]),
    num_threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=120, deadline=None)
def test_a_layer_is_within_the_rounding_of_its_arithmetic(
    case: Case,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    width: int,
    x_format: str,
    num_threads: int,
    seed: int,
) -> None:
    """Experts without tokens, k = E, no tokens, one expert, one row, one column."""
    layer = Layer(
        case,
        num_tokens=num_tokens,
        num_experts=num_experts,
        top_k=min(top_k, num_experts),
        hidden=hidden,
        width=width,
        x_format=x_format,
        seed=seed,
    )

    layer.assert_right(num_threads)


@every_kind
@pytest.mark.parametrize("num_tokens", [1, 60, 130])
def test_all_tokens_may_choose_one_expert(case: Case, num_tokens: int) -> None:
    """The last one, whose blocks are then all there are."""
    layer = Layer(case, num_tokens=num_tokens, top_k=1)
    layer.ids[:] = 3

    layer.assert_right(num_threads=2)


@given(
    case=st.sampled_from(cases(KINDS)),
    num_tokens=st.integers(1, 40),
    top_k=st.integers(1, 5),
    share=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    part_bytes=st.sampled_from([1 << 28, 40_000]),
    num_threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=80, deadline=None)
def test_choices_of_no_expert_add_nothing(
    case: Case,
    num_tokens: int,
    top_k: int,
    share: float,
    part_bytes: int,
    num_threads: int,
    seed: int,
) -> None:
    """Any share of them, all included; their weights are not read."""
    layer = Layer(case, num_tokens=num_tokens, num_experts=6, top_k=top_k, width=140, seed=seed)
    is_none = np.random.default_rng(seed).random(layer.ids.shape) < share
    layer.ids[is_none], layer.weights[is_none] = NO_EXPERT, np.nan

    with mock.patch.object(experts_module, "_PART_BYTES", part_bytes):
        layer.assert_right(num_threads)


@every_kind
@pytest.mark.parametrize("num_tokens", [1, 2, 30])
@pytest.mark.parametrize("part_bytes", [1 << 28, 40_000])
def test_tokens_that_choose_no_expert_get_zeros(
    monkeypatch: pytest.MonkeyPatch, case: Case, num_tokens: int, part_bytes: int
) -> None:
    """All tokens; then the last one does choose, which changes no other."""
    monkeypatch.setattr(experts_module, "_PART_BYTES", part_bytes)
    layer = Layer(case, num_tokens=num_tokens, width=300)
    layer.x[:-1] = layer.x[:-1] * np.float32(np.nan)
    chosen = layer.ids[-1].copy()
    layer.ids[:] = NO_EXPERT

    np.testing.assert_array_equal(layer.run(num_threads=2), np.zeros(layer.x.shape))

    layer.ids[-1] = [NO_EXPERT, chosen[1]]
    np.testing.assert_array_equal(layer.run(num_threads=2)[:-1], 0.0)
    layer.x, layer.ids, layer.weights = layer.x[-1:], layer.ids[-1:], layer.weights[-1:]
    layer.assert_right()


@every_kind
def test_a_token_may_choose_every_expert_and_one_twice(case: Case) -> None:
    """k = E; and an expert chosen twice counts with both weights."""
    Layer(case, num_experts=4, top_k=4).assert_right()
    layer = Layer(case, num_experts=4, top_k=3)
    layer.ids[0] = [2, 1, 2]

    layer.assert_right()


@pytest.mark.parametrize("case", [cases(KINDS)[0], cases(KINDS)[-1]], ids=case_name)
@pytest.mark.parametrize("num_tokens", [600, 601, 1000])
def test_long_prompts_are_done_in_parts(
    monkeypatch: pytest.MonkeyPatch, case: Case, num_tokens: int
) -> None:
    """Each within the bound on scratch, all about as long, the last one perhaps shorter."""
    monkeypatch.setattr(experts_module, "_PART_BYTES", 200_000)
    layer = Layer(case, num_tokens=num_tokens, num_experts=5, top_k=3, hidden=9, width=5)
    scratch = Scratch()

    parts = layer.links(np.empty(layer.x.shape, np.float32), scratch=scratch)[1::2]

    sizes = [part.call.num_tokens for part in parts]
    assert len(sizes) > 1 and sum(sizes) == num_tokens
    assert sizes[0] - sizes[-1] < len(sizes)
    # 24 tokens * 128 rows * 8 bytes for each of two threads; cache lines; and a quarter more
    assert scratch.num_bytes <= 1.25 * (200_000 + 2 * 24 * 128 * 8 + 1000)
    layer.assert_right(num_threads=2)


def test_a_part_may_be_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never none, however little scratch there may be."""
    monkeypatch.setattr(experts_module, "_PART_BYTES", 1)
    layer = Layer(cases(KINDS)[0], num_tokens=3)

    assert len(layer.links(np.empty(layer.x.shape, np.float32))) == 2 * 3
    layer.assert_right()


@every_kind
def test_wide_layers_are_right(case: Case) -> None:
    """Several items of rows, the last one of a few, several groups of h."""
    Layer(case, num_tokens=3, num_experts=2, top_k=1, hidden=300, width=530).assert_right(2)


@every_kind
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
@pytest.mark.parametrize("part_bytes", [1 << 28, 40_000])
def test_any_number_of_threads_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, case: Case, num_tokens: int, part_bytes: int
) -> None:
    """One thread, two and three; in one part and in several."""
    monkeypatch.setattr(experts_module, "_PART_BYTES", part_bytes)
    layer = Layer(case, num_tokens=num_tokens, hidden=70, width=300)

    one = layer.run()

    for num_threads in (2, 3):
        np.testing.assert_array_equal(layer.run(num_threads), one)


@every_kind
def test_a_token_that_is_not_finite_spoils_no_other(case: Case) -> None:
    """NaN, infinity, and a weight of NaN: their tokens are NaN, the others what they were."""
    layer = Layer(case, num_tokens=9, num_experts=3, hidden=70)
    before = layer.run()
    layer.x[2, 69], layer.x[4, 0], layer.x[6, 33] = np.nan, np.inf, -np.inf
    layer.weights[8, 1] = np.nan

    after = layer.run()

    assert np.isnan(after[[2, 4, 6, 8]]).all()
    np.testing.assert_array_equal(after[[0, 1, 3, 5, 7]], before[[0, 1, 3, 5, 7]])


@every_kind
def test_weights_of_zero_give_zero(case: Case) -> None:
    """And negative ones count as they are."""
    layer = Layer(case)
    layer.weights[:] = 0

    np.testing.assert_array_equal(layer.run(), np.zeros(layer.x.shape))


_GATES = [-3e38, -1e6, -1000, -129, -100, -89, -88, -87, -20, 0, 20, 87, 89, 129, 1000, 1e6]


@pytest.mark.parametrize("format", KINDS[:2], ids=lambda format: format.kind)
def test_the_activation_is_right_far_from_zero(format: WeightFormat) -> None:
    """silu(-100) is 0 in float32, and silu(1000) is 1000."""
    gate = matrix_of(np.array([[1, 0]], np.float32), format)
    up = matrix_of(np.array([[0, 1]], np.float32), format)
    down = matrix_of(np.ones((2, 1), np.float32), format)
    layer = Layer((format, "float"), num_tokens=len(_GATES), num_experts=1, top_k=1)
    layer.experts = experts_of([(gate, up, down)])
    layer.x = np.array([[gate, 1] for gate in _GATES], np.float32)
    layer.weights[:] = 1

    layer.assert_right()


def test_rows_of_x_may_lie_apart() -> None:
    """Columns of a wider array, and one row again and again."""
    layer = Layer(cases(KINDS)[0], num_tokens=6)
    wide = np.full((6, 80), np.nan, np.float32)
    wide[:, 5:42] = layer.x
    expected = layer.run()

    layer.x = wide[:, 5:42]
    np.testing.assert_array_equal(layer.run(), expected)

    layer.x = np.broadcast_to(layer.x[0], layer.x.shape)
    layer.assert_right()


def refused(message: str, case: Case | None = None, **changes: Any) -> None:
    """A layer that would be right but for `changes` is refused."""
    layer = Layer(case or cases(KINDS)[0])
    given: dict[str, Any] = {
        "x": layer.x,
        "experts": layer.experts.packed,
        "ids": layer.ids,
        "weights": layer.weights,
        "compute": layer.compute,
        "num_threads": 1,
        "scratch": Scratch(),
        "out": np.empty(layer.x.shape, np.float32),
    }
    with pytest.raises(ValueError, match=message):
        run_experts(**{**given, **changes})


def test_arguments_that_do_not_fit_are_named() -> None:
    """Types, shapes and layouts of all arrays, the arithmetic, the number of threads."""
    floats, ids = np.ones((5, 2), np.float32), np.zeros((5, 2), np.int64)
    refused(r"x is float64 \(5, 37\)", x=np.ones((5, 37)))
    refused(r"x is float32 \(5, 36\).*\(T, 37\)", x=np.ones((5, 36), np.float32))
    refused(r"x is float32 \(37,\)", x=np.ones(37, np.float32))
    refused(r"x has strides \(296, 8\)", x=np.ones((5, 74), np.float32)[:, ::2])
    refused(r"x has strides \(-148, 4\)", x=np.ones((5, 37), np.float32)[::-1])
    refused(r"ids is int32 \(5, 2\)", ids=ids.astype(np.int32))
    refused(r"ids is int64 \(4, 2\).*\(5, 2\)", ids=ids[:4])
    refused(r"ids is int64 \(5, 2\) with strides \(32, 16\)", ids=np.zeros((5, 4), int)[:, ::2])
    refused(r"weights is float64", weights=np.ones((5, 2)))
    refused(r"weights is float32 \(5, 1\).*\(5, 2\)", weights=floats[:, :1].copy())
    refused(r"weights is float32 \(5, 2\) with strides \(4, 20\)", weights=floats.T.copy().T)
    refused(r"out is uint16 \(5, 37\).*float32", out=np.empty((5, 37), np.uint16))
    refused(r"out is float32 \(4, 37\).*\(5, 37\)", out=np.empty((4, 37), np.float32))
    refused(r"out is float32 \(5, 37\) with strides", out=np.empty((5, 40), np.float32)[:, :37])
    refused("compute is 'int8' but float32 weights", compute="int8")
    refused("compute is 'bfloat16' but int8 weights", cases(KINDS[2:])[0], compute="bfloat16")
    refused("num_threads is 0", num_threads=0)


@pytest.mark.parametrize("number", [-2, 4, 2**62])
def test_an_expert_that_does_not_exist_is_refused(number: int) -> None:
    """The first token's or the last one's."""
    for token in (0, 4):
        ids = np.zeros((5, 2), np.int64)
        ids[token, 1] = number
        refused(rf"ids are .*{number}.* but must be 0 to 3", ids=ids)


def test_tokens_that_choose_nothing_are_refused() -> None:
    """A layer without choices is a mistake of the caller."""
    refused("ids", ids=np.empty((5, 0), np.int64), weights=np.empty((5, 0), np.float32))


def test_an_output_that_is_read_only_is_refused() -> None:
    """And not written."""
    out = np.zeros((5, 37), np.float32)
    out.flags.writeable = False
    refused("read-only", out=out)


def test_a_blob_of_another_size_is_refused() -> None:
    """Before a kernel could read past its end."""
    format = WeightFormat(kind="bfloat16")
    size = expert_bytes(format, 32, 16)
    whole: dict[str, Any] = {"weight_format": format, "num_experts": 2, "hidden": 32, "width": 16}
    with pytest.raises(ValueError, match=rf"uint8 \({size},\).*\({2 * size},\): 2 experts"):
        PackedExperts(blob=np.zeros(size, np.uint8), **whole)
    with pytest.raises(ValueError, match="contiguous"):
        PackedExperts(blob=np.zeros(4 * size, np.uint8)[::2], **whole)
    with pytest.raises(ValueError, match="int8"):
        PackedExperts(blob=np.zeros(2 * size, np.int8), **whole)


def test_links_run_again_read_their_arrays_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same twice; then other tokens, choices and weights in the same arrays, in parts too."""
    layer = Layer(cases(KINDS)[0], num_tokens=40, num_experts=6)
    for part_bytes in (1 << 28, 30_000):
        monkeypatch.setattr(experts_module, "_PART_BYTES", part_bytes)
        out = np.full(layer.x.shape, np.nan, np.float32)
        links = layer.links(out)
        assert (len(links) > 2) is (part_bytes == 30_000)
        chain = Chain(links, num_threads=2)
        for _ in range(2):
            chain.run()
            np.testing.assert_array_equal(out, layer.run())
            out[:] = np.nan
        layer.x[:] = layer.x[::-1].copy()
        layer.ids[:] = (layer.ids + 1) % 6
        layer.ids[:30] = [5, 0]
        layer.weights[:] = layer.weights[::-1].copy()

        chain.run()

        check_experts(links)
        np.testing.assert_array_equal(out, layer.run())


def test_the_arrays_of_links_may_be_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """All four of them, for whole arrays whatever the parts."""
    before, after = (Layer(cases(KINDS)[0], num_tokens=40, seed=seed) for seed in (1, 2))
    after.experts = before.experts
    for part_bytes in (1 << 28, 30_000):
        monkeypatch.setattr(experts_module, "_PART_BYTES", part_bytes)
        first, second = (np.full(before.x.shape, np.nan, np.float32) for _ in range(2))
        links = before.links(first)
        for sort, work in zip(links[::2], links[1::2], strict=True):
            sort.call.ids = after.ids.ctypes.data
            work.call.x, work.call.weights = after.x.ctypes.data, after.weights.ctypes.data
            work.call.out = second.ctypes.data

        Chain(links, num_threads=2).run()

        np.testing.assert_array_equal(second, after.run())
        assert np.isnan(first).all()


@pytest.mark.parametrize("num_tokens", [1, 30])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_router_and_two_layers_are_one_chain(num_tokens: int, num_threads: int) -> None:
    """What earlier links write is what later ones read, and all share one scratch."""
    case = cases(KINDS)[0]
    one, two = (Layer(case, num_tokens=num_tokens, seed=seed) for seed in (1, 2))
    gate = matrix_of(np.random.default_rng(3).random((4, 37), np.float32), case[0]).packed
    scratch = Scratch()
    logits = np.empty((num_tokens, 4), np.float32)
    linear(one.x, gate, compute="float", num_threads=1, scratch=scratch, out=logits)
    route(logits, 2, True, one.ids, one.weights)
    two.x = one.run()
    expected = two.run()
    first, second = (np.full(one.x.shape, np.nan, np.float32) for _ in range(2))
    one.ids[:], one.weights[:], logits[:] = 99, np.nan, np.nan
    two.x = first

    chain = Chain(
        [
            linear_link(
                one.x, gate, compute="float", num_threads=num_threads, scratch=scratch, out=logits
            ),
            route_link(logits, 2, True, one.ids, one.weights),
            *one.links(first, num_threads, scratch),
            *two.links(second, num_threads, scratch),
        ],
        num_threads=num_threads,
    )
    chain.run()

    check_experts(chain.links)
    np.testing.assert_array_equal(second, expected)


def test_a_bad_choice_stops_its_layer_and_no_other() -> None:
    """Its output is not written, the next link runs, and a good choice later is forgiven."""
    bad, good = (Layer(cases(KINDS)[0], seed=seed) for seed in (1, 2))
    first, second = (np.full(bad.x.shape, np.nan, np.float32) for _ in range(2))
    chain = Chain((*bad.links(first), *good.links(second)), num_threads=2)
    chain.run()
    kept = bad.ids[3, 1]
    bad.ids[3, 1] = 4
    first[:] = second[:] = np.nan

    chain.run()

    with pytest.raises(ValueError, match=r"^ids are 0 to 4 but must be 0 to 3, or -1 for no"):
        check_experts(chain.links)
    assert np.isnan(first).all()
    np.testing.assert_array_equal(second, good.run())

    bad.ids[3, 1] = kept
    chain.run()

    check_experts(chain.links)
    np.testing.assert_array_equal(first, bad.run())


_RUN = """
import sys
import numpy as np
from cpu_kernels.experts import PackedExperts, expert_bytes, run_experts
from cpu_kernels.formats import WeightFormat
from cpu_kernels.scratch import Scratch
format = WeightFormat(kind="bfloat16")
experts = PackedExperts(
    blob=np.zeros(2 * expert_bytes(format, 32, 16), np.uint8),
    weight_format=format, num_experts=2, hidden=32, width=16,
)
out = np.full((3, 32), np.nan, np.float32)
ids, weights = np.ones((3, 1), np.int64), np.ones((3, 1), np.float32)
run_experts(np.ones((3, 32), np.float32), experts, ids, weights,
    compute="float", num_threads=2, scratch=Scratch(), out=out)
print((out == 0).all(), "numba" in sys.modules)
"""


def test_compiled_once_numba_is_not_loaded() -> None:
    """A second process takes the object code from the folder."""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", _RUN], capture_output=True, text=True, check=True
        )

    assert done.stdout == "True False\n"
