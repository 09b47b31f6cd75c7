"""Mixture of experts: route tokens, sort them by expert, run the experts, add what they give."""

# T tokens, k experts a token, N = T * k rows, D hidden, I expert width, E experts

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hetero.model.mlp import gated
from hetero.model.norm import rms_norm
from hetero.model.quantised import QuantisedWeights, multiply_by_expert, product_method

ExpertMethod = Literal["loop", "grouped"]


def expert_method(
    device: torch.device, dtype: torch.dtype, widths: Collection[int]
) -> ExpertMethod:
    """One kernel for all experts where the device has it, or a product for each.

    CUDA has that kernel for bfloat16 rows of a multiple of 16 bytes, from Ampere on.
    """
    is_fit = device.type == "cuda" and dtype == torch.bfloat16
    if not is_fit or any(width % 8 for width in widths) or not hasattr(F, "grouped_mm"):
        return "loop"
    return "grouped" if torch.cuda.get_device_capability(device) >= (8, 0) else "loop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Which experts every token chose and how much each counts; `normed_TD` is what they read."""

    normed_TD: Tensor
    expert_ids_Tk: Tensor  # int64
    expert_weights_Tk: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Tokens sorted by expert, in token order within an expert; made without asking the device.

    Rows of choices that are of no expert here come last; `is_chosen_N1` is None where there can be
    none.
    """

    x_ND: Tensor
    ends_E: Tensor  # int32: expert e has rows ends[e - 1] to ends[e]
    rows_Tk: Tensor  # int64: the row of each token's choice
    expert_weights_Tk: Tensor
    is_chosen_N1: Tensor | None


def route(
    x_TD: Tensor,
    weights: Mapping[str, Tensor],
    *,
    norm_eps: float,
    top_k: int,
    norm_topk_prob: bool,
) -> Routing:
    """The `top_k` most probable experts of each token of the normed x."""
    normed_TD = rms_norm(x_TD, weights["norm"], norm_eps)
    logits_TE = F.linear(normed_TD, weights["gate"])
    probs_TE = logits_TE.softmax(dim=-1, dtype=torch.float32)
    probs_Tk, ids_Tk = probs_TE.topk(top_k, dim=-1)
    if norm_topk_prob:
        probs_Tk /= probs_Tk.sum(dim=-1, keepdim=True)
    return Routing(
        normed_TD=normed_TD,
        expert_ids_Tk=ids_Tk,
        expert_weights_Tk=probs_Tk.to(x_TD.dtype),
    )


def dispatch(routing: Routing, num_experts: int, local_E: Tensor | None = None) -> Dispatch:
    """Sort the tokens by expert.

    Parameters
    ----------
    routing
        What the tokens chose.
    num_experts
        Experts that are here.
    local_E
        Number here of each of the layer's experts, `num_experts` for those that are not: choices of
        these add nothing. None where all are here, under their own numbers.
    """
    ids_Tk = routing.expert_ids_Tk
    if local_E is not None:
        ids_Tk = local_E[ids_Tk]
    sorted_N, order_N = ids_Tk.flatten().sort(stable=True)
    experts_E = torch.arange(num_experts, device=ids_Tk.device)
    # Counting with searchsorted: bincount and tolist would make the host wait for a GPU.
    ends_E = torch.searchsorted(sorted_N, experts_E, right=True, out_int32=True)
    rows_N = torch.empty_like(order_N)
    rows_N[order_N] = torch.arange(len(order_N), device=ids_Tk.device)
    return Dispatch(
        x_ND=routing.normed_TD.index_select(0, order_N // ids_Tk.shape[1]),
        ends_E=ends_E,
        rows_Tk=rows_N.view_as(ids_Tk),
        expert_weights_Tk=routing.expert_weights_Tk,
        is_chosen_N1=None if local_E is None else (sorted_N < num_experts)[:, None],
    )


def experts(
    sorted_tokens: Dispatch, weights: Mapping[str, Tensor], *, method: ExpertMethod
) -> Tensor:
    """y_TD: what the chosen experts give, weighted and added in the order of choice."""
    ends_E = sorted_tokens.ends_E

    def products(x_NI: Tensor, role: str) -> Tensor:
        if isinstance(weights, QuantisedWeights):
            on_device = product_method(x_NI.device)
            return multiply_by_expert(x_NI, weights.panels[role], ends_E, on_device)
        return (_loop if method == "loop" else _grouped)(x_NI, weights[role], ends_E)

    y_ND = products(gated(products(sorted_tokens.x_ND, "gate_up")), "down")
    if sorted_tokens.is_chosen_N1 is not None:
        # No product has written the other rows: what memory held there may be NaN.
        y_ND = torch.where(sorted_tokens.is_chosen_N1, y_ND, 0.0)
    # Gathers, scales and adds in one pass, in float32 inside: a tenth of the time of the same in
    # three ops, and no atomics, so the same bits every time.
    return F.embedding_bag(
        sorted_tokens.rows_Tk,
        y_ND,
        mode="sum",
        per_sample_weights=sorted_tokens.expert_weights_Tk.to(y_ND.dtype),
    )


def put_expert(
    held: Mapping[str, Tensor], slot: int, given: Mapping[str, Tensor], place: int
) -> None:
    """Overwrite one of the experts held by another, in rows or in panels."""
    if isinstance(held, QuantisedWeights):
        assert isinstance(given, QuantisedWeights)
        for role, panels in held.panels.items():
            panels.blobs_EB[slot].copy_(given.panels[role].blobs_EB[place])
        return
    for role, rows in held.items():
        rows[slot].copy_(given[role][place])


def combine(x_TD: Tensor, y_TD: Tensor) -> Tensor:
    """Add what the experts gave to the residual."""
    return x_TD + y_TD


def _loop(x_NI: Tensor, matrices_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows by its matrix, one product an expert that has rows."""
    out_NO = x_NI.new_empty(len(x_NI), matrices_EOI.shape[1])
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            matrix_IO = matrices_EOI[expert].t()
            torch.mm(x_NI[start:end], matrix_IO, out=out_NO[start:end])
            start = end
    return out_NO


def _grouped(x_NI: Tensor, matrices_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows by its matrix, in one kernel that reads the ends on the device."""
    out_NO: Tensor = F.grouped_mm(x_NI, matrices_EOI.transpose(1, 2), offs=ends_E)
    return out_NO
