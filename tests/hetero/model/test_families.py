"""Families: layouts against the files that transformers saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hetero.model.families import ALIGN_ELEMENTS, expected_tensors, module_layout, views
from planner.model_spec import ModelSpec, Module
from tests.hetero.model.packed import checkpoint_tensors, fill, packed
from tests.tiny_models import TINY_MODELS, save_tiny_model, tiny_model, tiny_spec


def modules(spec: ModelSpec) -> list[tuple[Module, int | None]]:
    inner: list[tuple[Module, int | None]] = [
        (module, index) for index, layer in enumerate(spec.layers) for module in layer.modules
    ]
    return [("embedding", None), *inner, ("head", None)]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_expected_tensors_are_those_that_transformers_saves(name: str, tmp_path: Path) -> None:
    """Names and shapes of the file, no more and no fewer."""
    spec = tiny_spec(save_tiny_model(name, tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    assert expected_tensors(spec) == {key: tuple(value.shape) for key, value in saved.items()}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_layout_holds_the_weights_that_the_planner_counts(name: str) -> None:
    """Without its padding, a module has as many elements as ModelSpec says."""
    spec = tiny_spec(tiny_model(name))
    for module, layer in modules(spec):
        layout = module_layout(spec, module, layer)
        assert sum(slot.num_elements for slot in layout.slots) == spec.num_params(module, layer)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_tensors_follow_each_other_with_only_padding_between(name: str) -> None:
    """No overlap, and less than one alignment unit between neighbours and at the end."""
    spec = tiny_spec(tiny_model(name))
    for module, layer in modules(spec):
        layout = module_layout(spec, module, layer)
        starts = [slot.offset for slot in layout.slots] + [layout.num_elements]
        ends = [0] + [slot.offset + slot.num_elements for slot in layout.slots]
        gaps = [start - end for start, end in zip(starts, ends, strict=True)]
        assert all(0 <= gap < ALIGN_ELEMENTS for gap in gaps)
        assert layout.num_elements % ALIGN_ELEMENTS == 0


@pytest.mark.parametrize("name", TINY_MODELS)
def test_roles_start_aligned(name: str) -> None:
    """Every role begins on a multiple of 64 elements, save `down` inside an expert."""
    spec = tiny_spec(tiny_model(name))
    for module, layer in modules(spec):
        for view in module_layout(spec, module, layer).views:
            if (module, view.role) != ("experts", "down"):
                assert view.offset % ALIGN_ELEMENTS == 0


def test_qkv_is_the_rows_of_its_three_projections() -> None:
    """Queries, keys, values joined; the same for their biases."""
    model = tiny_model("qwen2")
    spec = tiny_spec(model)
    attention = model.model.layers[1].self_attn
    weights = packed(spec, checkpoint_tensors(model, spec), "attention", 1)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    torch.testing.assert_close(weights["qkv"], torch.cat([p.weight for p in projections]))
    torch.testing.assert_close(weights["qkv_bias"], torch.cat([p.bias for p in projections]))
    assert set(weights) == {"input_norm", "qkv", "qkv_bias", "o"}


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "olmoe"])
def test_an_expert_is_one_contiguous_range(name: str) -> None:
    """Gate, up and down of expert 3 are one slice, and the views find them in it."""
    model = tiny_model(name)
    spec = tiny_spec(model)
    layout = module_layout(spec, "experts", 1)
    flat = fill(layout, checkpoint_tensors(model, spec))
    size = spec.expert_params(1)
    theirs = model.model.layers[1].mlp.experts
    expected = torch.cat((theirs.gate_up_proj[3].flatten(), theirs.down_proj[3].flatten()))
    torch.testing.assert_close(flat[3 * size : 4 * size], expected)
    weights = views(layout, flat)
    torch.testing.assert_close(weights["gate_up"], theirs.gate_up_proj.data)
    torch.testing.assert_close(weights["down"], theirs.down_proj.data)
    assert all(matrix.is_contiguous() for matrix in (*weights["gate_up"], *weights["down"]))


def test_views_share_the_buffer() -> None:
    """A write to the flat buffer is seen in the view, also where the buffer is part of another."""
    spec = tiny_spec(tiny_model("llama"))
    layout = module_layout(spec, "dense", 0)
    staging = torch.zeros(layout.num_elements + 7)
    flat = staging[7:]
    weights = views(layout, flat)
    flat.copy_(torch.arange(layout.num_elements, dtype=torch.float32))
    for view in layout.views:
        assert weights[view.role].flatten()[0].item() == view.offset


def test_tied_head_takes_the_embedding_matrix() -> None:
    """A tied head stores the embedding again, or leaves the matrix out where it is shared."""
    spec = tiny_spec(tiny_model("qwen3"))
    whole = module_layout(spec, "head")
    assert [slot.name for slot in whole.slots] == ["model.norm.weight", "model.embed_tokens.weight"]
    alone = module_layout(spec, "head", with_matrix=False)
    assert [view.role for view in alone.views] == ["norm"]
