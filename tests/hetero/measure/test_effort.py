"""Which calls are measured: not too many, none that memory cannot hold, a model's own exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cpu_kernels.experts import expert_bytes
from hetero.measure.effort import FULL, QUICK, Effort, ProductCase
from hetero.model.products import weight_format
from hetero.model_lookup import find_model, model_names, read_model_spec
from planner.model_spec import LayerSpec, WeightKind
from tests.hetero.measure.tiny_effort import TINY, two_layers

MEMORY_BYTES = 512 << 20


def num_repeated(effort: Effort) -> int:
    """Calls that are repeated for a budget with one number of threads of a CPU."""
    small = len(effort.widths) * len(effort.rows)
    return (
        len(effort.products("numba", effort.kinds))
        + len(effort.products("torch", effort.kinds))
        + len(effort.experts(effort.kinds, MEMORY_BYTES))
        + 2 * len(effort.torch_experts("float32", effort.torch_tokens, MEMORY_BYTES))
        + len(effort.decode_cases(MEMORY_BYTES))
        + len(effort.prefill_cases(MEMORY_BYTES))
        + 3 * small
        + 2 * len(effort.rows)
    )


@pytest.mark.parametrize(
    ("effort", "max_calls", "max_s"), [(QUICK, 150, 2.0), (FULL, 700, 40.0)], ids=["quick", "full"]
)
def test_an_effort_does_not_explode(effort: Effort, max_calls: int, max_s: float) -> None:
    """Its calls, and the least seconds that repeating them takes."""
    found = num_repeated(effort)
    assert found <= max_calls
    assert found * effort.budget_s <= max_s


@pytest.mark.parametrize("effort", [QUICK, FULL], ids=["quick", "full"])
def test_no_product_has_more_flops_than_stated(effort: Effort) -> None:
    """2 FLOPs a weight and a token; experts have three matrices and twice the limit."""

    def flops(case: ProductCase) -> int:
        return 2 * case.num_tokens * case.shape[0] * case.shape[1]

    products = effort.products("numba", effort.kinds) + effort.products("torch", effort.kinds)
    assert max(flops(case) for case in products) <= effort.max_flops
    experts = effort.experts(effort.kinds, MEMORY_BYTES)
    assert max(3 * (case.num_experts or 0) * flops(case) for case in experts) <= (
        2 * effort.max_flops
    )


@pytest.mark.parametrize("effort", [QUICK, FULL], ids=["quick", "full"])
def test_every_format_has_products_and_experts_of_one_token(effort: Effort) -> None:
    """Decode is made of these."""
    kinds: set[WeightKind] = {"bfloat16", "float32", "int8", "int4"}
    for cases in (
        effort.products("numba", effort.kinds),
        effort.experts(effort.kinds, MEMORY_BYTES),
    ):
        assert {case.kind for case in cases if case.num_tokens == 1} == kinds


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "int8", "int4"])
@pytest.mark.parametrize(
    ("experts", "dense"),
    [
        ((4096, 14336), (4096, 14336)),  # Mixtral 8x7B
        ((7168, 2048), (7168, 18432)),  # DeepSeek-V3
        ((6144, 1024), (16384, 53248)),  # Llama 3.1 405B
    ],
)
def test_experts_fit_the_memory(
    kind: WeightKind, experts: tuple[int, int], dense: tuple[int, int]
) -> None:
    """Fewer of them, or a part of one; each gets as many tokens still."""
    assert kind != "float16"
    effort = replace(
        TINY, expert_shapes=(experts,), dense_shapes=(dense,), kinds=(kind,), max_flops=1e15
    )
    found = effort.experts(effort.kinds, MEMORY_BYTES)
    assert {case.num_tokens for case in found} == {1, 4}
    stored = weight_format(kind)
    for case in found:
        assert case.num_experts in (1, 2, 4, 8, 16)
        num_bytes = case.num_experts * expert_bytes(stored, *case.shape)
        assert num_bytes <= MEMORY_BYTES
        # nothing is cut that need not be: twice as many, or twice as wide, would not fit
        is_whole = (case.num_experts, case.shape) in ((16, experts), (1, dense))
        assert is_whole or 2.1 * num_bytes > MEMORY_BYTES


def test_attention_fits_the_memory() -> None:
    """8192 tokens of 8 KV heads of 128 in bfloat16 are 2 * 8192 * 8 * 128 * 2 bytes: 32 MiB."""
    limit = 32 << 20
    decode, prefill = FULL.decode_cases(limit), FULL.prefill_cases(limit)
    assert decode and max(case.kv_bytes for case in decode) == limit
    assert prefill and max(case.kv_bytes for case in prefill) <= limit
    assert FULL.decode_cases(0) == FULL.prefill_cases(0) == []


def test_decode_cases_name_the_context_with_the_new_token() -> None:
    """A context of 128 is 127 past tokens and the new one."""
    found = {case.context + case.num_tokens for case in QUICK.decode_cases(MEMORY_BYTES)}
    assert found == set(QUICK.contexts)


def test_a_model_is_measured_with_its_own_shapes_in_all_formats_that_it_can_run_in() -> None:
    """Its own, and the two that it can be quantised to."""
    effort = QUICK.for_model(two_layers(), 1 << 30)
    assert set(effort.kinds) == {"bfloat16", "int8", "int4"}
    # qkv (4 + 2 * 2) * 32 = 256, o 4 * 32, router, head
    assert effort.shapes == effort.torch_shapes == ((256, 128), (128, 128), (8, 128), (320, 128))
    assert effort.expert_shapes == ((128, 128),)
    assert effort.dense_shapes == ((128, 256),)
    assert (effort.heads, effort.kv_dtypes) == (((4, 2, 32),), ("bfloat16",))
    assert (effort.widths, effort.vocabularies) == ((128,), (320,))
    assert effort.tokens == QUICK.tokens


def test_a_float16_model_is_measured_as_a_cpu_runs_it() -> None:
    effort = QUICK.for_model(two_layers("float16"), 1 << 30)
    assert set(effort.kinds) == {"float32", "int8", "int4"}
    assert effort.kv_dtypes == ("float32",)


def test_layers_of_one_shape_are_measured_once() -> None:
    spec = two_layers()
    more = (*spec.layers, *spec.layers, LayerSpec(intermediate_size=384))
    effort = QUICK.for_model(replace(spec, layers=more), 1 << 30)
    assert effort.dense_shapes == ((128, 256), (128, 384))
    assert len(set(effort.shapes)) == len(effort.shapes)


@pytest.mark.parametrize("name", model_names())
def test_every_model_that_ships_has_calls_that_fit(name: str) -> None:
    """The least memory that a model is measured in: 64 MiB, a third of it for a cache."""
    memory_bytes = 64 << 20
    effort = QUICK.for_model(read_model_spec(find_model(name)), memory_bytes // 16)
    products = effort.products("numba", effort.kinds)
    assert {case.num_tokens for case in products} == set(QUICK.tokens)
    assert max(4 * case.shape[0] * case.shape[1] for case in products) <= memory_bytes
    for case in effort.experts(effort.kinds, memory_bytes):
        assert case.num_experts is not None and min(case.shape) > 0
        assert case.kind != "float16"
        size = expert_bytes(weight_format(case.kind), *case.shape)
        assert case.num_experts * size <= memory_bytes
    attention = effort.decode_cases(memory_bytes // 3) + effort.prefill_cases(memory_bytes // 3)
    assert {case.num_tokens == 1 for case in attention} == {True, False}
    assert max(case.kv_bytes for case in attention) <= memory_bytes // 3
