"""Mixture of experts against transformers: routing, dispatch, both ways to run the experts."""

# T tokens, D hidden, E experts, k experts a token

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hetero.model import moe
from hetero.model.moe import (
    Dispatch,
    ExpertMethod,
    Routing,
    combine,
    dispatch,
    expert_method,
    experts,
    route,
)
from planner.model_spec import ModelSpec
from tests.hetero.model.packed import checkpoint_tensors, packed
from tests.tiny_models import TINY_MOE_MODELS, tiny_model, tiny_spec

METHODS: tuple[ExpertMethod, ...] = ("loop", "grouped")


def tokens(num_tokens: int, width: int = 60, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def routed(spec: ModelSpec, weights: dict[str, Tensor], x_TD: Tensor) -> Routing:
    return route(
        x_TD,
        weights,
        norm_eps=spec.norm_eps,
        top_k=spec.layers[1].num_experts_per_token,
        norm_topk_prob=spec.norm_topk_prob,
    )


def scores(ids_Tk: Tensor, weights_Tk: Tensor, num_experts: int) -> Tensor:
    """Weight of every expert for every token: top-k of equal values may come in any order."""
    empty = torch.zeros(len(ids_Tk), num_experts)
    return empty.scatter(1, ids_Tk, weights_Tk.float())


@pytest.mark.parametrize("name", TINY_MOE_MODELS)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_route_equals_transformers(name: str, dtype: torch.dtype, tol: float) -> None:
    """Same experts and weights, normalised over the chosen ones or not."""
    model = tiny_model(name, dtype=dtype)
    spec = tiny_spec(model)
    layer = model.model.layers[1]
    x_TD = tokens(23, dtype=dtype)
    actual = routed(spec, packed(spec, checkpoint_tensors(model, spec), "router", 1), x_TD)
    normed_TD = layer.post_attention_layernorm(x_TD)
    _, weights_Tk, ids_Tk = layer.mlp.gate(normed_TD)
    torch.testing.assert_close(actual.normed_TD, normed_TD, rtol=0, atol=0)
    torch.testing.assert_close(
        scores(actual.expert_ids_Tk, actual.expert_weights_Tk, 5),
        scores(ids_Tk, weights_Tk, 5),
        rtol=tol,
        atol=tol,
    )


@pytest.mark.parametrize("name", TINY_MOE_MODELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 33])
def test_experts_equal_transformers(name: str, method: ExpertMethod, num_tokens: int) -> None:
    """The whole block: routed, dispatched, run, added to the residual."""
    model = tiny_model(name)
    spec = tiny_spec(model)
    tensors = checkpoint_tensors(model, spec)
    x_TD = tokens(num_tokens)
    routing = routed(spec, packed(spec, tensors, "router", 1), x_TD)
    y_TD = experts(dispatch(routing, 5), packed(spec, tensors, "experts", 1), method=method)
    layer = model.model.layers[1]
    expected = x_TD + layer.mlp(layer.post_attention_layernorm(x_TD)[None])[0]
    torch.testing.assert_close(combine(x_TD, y_TD), expected, rtol=1e-5, atol=1e-5)


def random_case(num_tokens: int, dtype: torch.dtype) -> tuple[Routing, dict[str, Tensor]]:
    """48 wide, 7 experts of 32 of which 2 are never chosen, top 3."""
    generator = torch.Generator().manual_seed(num_tokens)
    chosen = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(num_tokens)])
    routing = Routing(
        normed_TD=tokens(num_tokens, 48, dtype),
        expert_ids_Tk=chosen + (chosen > 2),
        expert_weights_Tk=torch.rand(num_tokens, 3, generator=generator).to(dtype),
    )
    weights = {
        "gate_up": (torch.randn(7, 64, 48, generator=generator) * 0.2).to(dtype),
        "down": (torch.randn(7, 48, 32, generator=generator) * 0.2).to(dtype),
    }
    return routing, weights


def exact(routing: Routing, weights: dict[str, Tensor]) -> Tensor:
    """The definition, in float64."""
    rows: list[Any] = []
    for x, ids, shares in zip(
        routing.normed_TD.double(),
        routing.expert_ids_Tk.tolist(),
        routing.expert_weights_Tk.tolist(),
        strict=True,
    ):
        y = torch.zeros_like(x)
        for expert, share in zip(ids, shares, strict=True):
            gate, up = (weights["gate_up"][expert].double() @ x).chunk(2)
            y += share * (weights["down"][expert].double() @ (torch.nn.functional.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_tokens", [1, 5, 40])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_experts_are_the_definition(
    method: ExpertMethod, num_tokens: int, dtype: torch.dtype, tol: float
) -> None:
    """Both methods agree with float64, experts without tokens included."""
    routing, weights = random_case(num_tokens, dtype)
    actual = experts(dispatch(routing, 7), weights, method=method)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), exact(routing, weights), rtol=tol, atol=tol)


def restricted(
    routing: Routing, weights: dict[str, Tensor], here: list[int]
) -> tuple[Tensor, dict[str, Tensor], Routing]:
    """Local numbers and weights of some experts, and the routing with no weight for the others."""
    local_E = torch.full((7,), len(here))
    local_E[here] = torch.arange(len(here))
    is_here_Tk = local_E[routing.expert_ids_Tk] < len(here)
    only = replace(routing, expert_weights_Tk=routing.expert_weights_Tk * is_here_Tk)
    return local_E, {role: matrices[here] for role, matrices in weights.items()}, only


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("here", [[4], [6, 0, 3], [5, 2, 1, 0, 4, 3, 6]])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_choices_of_experts_that_are_elsewhere_add_nothing(
    monkeypatch: pytest.MonkeyPatch,
    method: ExpertMethod,
    num_tokens: int,
    here: list[int],
    dtype: torch.dtype,
    tol: float,
) -> None:
    """Some experts in any order; rows that no expert writes hold NaN."""

    def spoil(products: Any) -> Any:
        def spoiled(x_NI: Tensor, matrices_EOI: Tensor, ends_E: Tensor) -> Tensor:
            out_NO: Tensor = products(x_NI, matrices_EOI, ends_E)
            out_NO[int(ends_E[-1]) :] = torch.nan
            return out_NO

        return spoiled

    monkeypatch.setattr(moe, "_loop", spoil(moe._loop))
    monkeypatch.setattr(moe, "_grouped", spoil(moe._grouped))
    routing, weights = random_case(num_tokens, dtype)
    local_E, local_weights, only = restricted(routing, weights, here)

    sent = dispatch(routing, len(here), local_E)
    actual = experts(sent, local_weights, method=method)

    torch.testing.assert_close(actual.double(), exact(only, weights), rtol=tol, atol=tol)


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_the_experts_add_up_to_all(method: ExpertMethod) -> None:
    """Three parts, in any order."""
    routing, weights = random_case(12, torch.float32)
    whole = experts(dispatch(routing, 7), weights, method=method)
    parts = []
    for here in ([6, 3, 1, 0], [5], [2, 4]):
        local_E, local_weights, _ = restricted(routing, weights, here)
        sent = dispatch(routing, len(here), local_E)
        parts.append(experts(sent, local_weights, method=method))

    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 6, 50])
def test_dispatch_sorts_tokens_by_expert(num_tokens: int) -> None:
    """Rows of an expert are its tokens in order, and every choice knows its row."""
    routing, _ = random_case(num_tokens, torch.float32)
    actual: Dispatch = dispatch(routing, 7)
    ids_Tk = routing.expert_ids_Tk
    order = sorted((int(ids_Tk[t, c]), t) for t in range(num_tokens) for c in range(3))
    expected = torch.stack([routing.normed_TD[token] for _, token in order])
    torch.testing.assert_close(actual.x_ND, expected, rtol=0, atol=0)
    counts = [sum(e == expert for e, _ in order) for expert in range(7)]
    assert actual.ends_E.tolist() == torch.tensor(counts).cumsum(0).tolist()
    for token in range(num_tokens):
        for choice, row in enumerate(actual.rows_Tk[token].tolist()):
            assert order[row] == (int(ids_Tk[token, choice]), token)


def test_experts_are_multiplied_in_one_kernel_where_the_device_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA from Ampere on, bfloat16, rows of a multiple of 16 bytes; the CPU never."""
    cuda, capability = torch.device("cuda"), [(8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(F, "grouped_mm", None, raising=False)
    assert expert_method(cuda, torch.bfloat16, (2048, 768)) == "grouped"
    assert expert_method(cuda, torch.bfloat16, (2048, 60)) == "loop"
    assert expert_method(cuda, torch.float16, (2048, 768)) == "loop"
    assert expert_method(torch.device("cpu"), torch.bfloat16, (2048, 768)) == "loop"
    capability[0] = (7, 5)
    assert expert_method(cuda, torch.bfloat16, (2048, 768)) == "loop"
