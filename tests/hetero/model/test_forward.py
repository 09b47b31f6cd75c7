"""Whole models strung together from the functions, against the logits of transformers."""

# L rows that need logits, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hetero.model.attention import AttentionKernel, attention_layer, attention_step
from hetero.model.batch import BatchTensors
from hetero.model.head import embed, head
from hetero.model.mlp import dense_layer
from hetero.model.moe import combine, dispatch, experts, route
from hetero.model.rotary import rotary_frequencies, rotary_rows
from planner.model_spec import ModelSpec, Module
from tests.hetero.model.packed import packed
from tests.hetero.model.paged import BLOCK_SIZE, Pages, make_batch, model_pages, shuffled_tables
from tests.tiny_models import TINY_MODELS, save_tiny_model, tiny_spec

NUM_BLOCKS = 40


ModelWeights = dict[tuple[Module, int | None], dict[str, Tensor]]


def pack_model(spec: ModelSpec, tensors: dict[str, Tensor]) -> ModelWeights:
    """Every module's views."""
    keys: list[tuple[Module, int | None]] = [("embedding", None), ("head", None)]
    for index, layer in enumerate(spec.layers):
        keys += [(module, index) for module in layer.modules]
    return {(module, layer): packed(spec, tensors, module, layer) for module, layer in keys}


def forward(
    spec: ModelSpec,
    weights: ModelWeights,
    kv: Sequence[Pages],
    batch: BatchTensors,
    kernel: AttentionKernel,
) -> Tensor:
    """Float32 logits_LV of one step."""
    x = embed(batch.token_ids_T, weights["embedding", None])
    frequencies_F = rotary_frequencies(spec.rope, spec.head_dim, x.device)
    cos_TK, sin_TK = rotary_rows(batch.positions_T, frequencies_F, x.dtype)
    step = attention_step(
        batch,
        dtype=x.dtype,
        block_size=BLOCK_SIZE,
        windows={layer.window for layer in spec.layers},
        kernel=kernel,
    )
    for index, layer in enumerate(spec.layers):
        x = attention_layer(
            x,
            weights["attention", index],
            kv[index],
            cos_TK,
            sin_TK,
            step,
            spec,
            window=layer.window,
            num_threads=2,
        )
        if layer.is_moe:
            routing = route(
                x,
                weights["router", index],
                norm_eps=spec.norm_eps,
                top_k=layer.num_experts_per_token,
                norm_topk_prob=spec.norm_topk_prob,
            )
            sent = dispatch(routing, layer.num_experts)
            x = combine(x, experts(sent, weights["experts", index], method="loop"))
        else:
            x = dense_layer(x, weights["dense", index], spec.norm_eps)
    return head(x[batch.logit_rows_L], weights["head", None], spec.norm_eps)


def prompts(lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 101, (n,), generator=generator).tolist() for n in lengths]


def all_logits(
    spec: ModelSpec, tensors: dict[str, Tensor], tokens: list[list[int]], kernel: AttentionKernel
) -> Tensor:
    """Logits (S, 4, V): after a prefill in two chunks, and after each of three decode steps."""
    weights = pack_model(spec, tensors)
    kv = model_pages(spec, NUM_BLOCKS, next(iter(tensors.values())).dtype)
    tables = shuffled_tables(len(tokens), 6, num_blocks=NUM_BLOCKS, seed=1)
    ends = [len(sequence) - 3 for sequence in tokens]
    halves = [end // 2 for end in ends]
    first = [sequence[:half] for sequence, half in zip(tokens, halves, strict=True)]
    forward(spec, weights, kv, make_batch("prefill", first, [0] * len(tokens), tables), kernel)
    rest = [sequence[half:end] for sequence, half, end in zip(tokens, halves, ends, strict=True)]
    found = [forward(spec, weights, kv, make_batch("prefill", rest, halves, tables), kernel)]
    for step in range(3):
        past = [end + step for end in ends]
        new = [[sequence[at]] for sequence, at in zip(tokens, past, strict=True)]
        found.append(forward(spec, weights, kv, make_batch("decode", new, past, tables), kernel))
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("kernel", ["numba", "torch"])
def test_logits_equal_transformers(name: str, kernel: AttentionKernel, tmp_path: Path) -> None:
    """Chunked prefill and decode of a ragged batch, weights read from the saved file."""
    model = save_tiny_model(name, tmp_path)
    tokens = prompts((7, 21, 12))
    expected = [model(torch.tensor([sequence])).logits[0, -4:] for sequence in tokens]
    actual = all_logits(tiny_spec(model), load_file(tmp_path / "model.safetensors"), tokens, kernel)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_bfloat16_logits_stay_near_float32(name: str, tmp_path: Path) -> None:
    """Rounding moves our logits as little as it moves those of transformers, within a factor."""
    model = save_tiny_model(name, tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    tokens = prompts((9, 14))
    theirs = torch.stack([model(torch.tensor([row])).logits[0, -4:] for row in tokens])
    spec = tiny_spec(model)
    exact = all_logits(
        spec, {key: value.float() for key, value in tensors.items()}, tokens, "torch"
    )
    ours = all_logits(spec, tensors, tokens, "numba")
    our_error = (ours - exact).square().mean().sqrt()
    assert our_error <= 1.5 * (theirs.float() - exact).square().mean().sqrt()
