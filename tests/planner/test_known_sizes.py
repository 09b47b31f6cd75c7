"""Sizes that papers quote, of the shipped profiles: what a wrong factor of two would change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.model_profile import read_model_profile
from planner.model_spec import ModelSpec
from planner.popularity import Popularity

PROFILES = Path(__file__).parents[2] / "profiles" / "models"
GIB = 1 << 30
MIB = 1 << 20


def opt_66b() -> ModelSpec:
    return read_model_profile(json.loads((PROFILES / "opt-66b.json").read_text())).spec("float16")


def mixtral() -> ModelSpec:
    config = json.loads((PROFILES / "mixtral-8x7b.json").read_text())
    return ModelSpec.from_config(config, name="mixtral-8x7b", dtype="float16")


def test_a_token_of_opt_66b_adds_two_and_a_quarter_mebibytes() -> None:
    """2 (K and V) * 64 layers * 9216 * 2 bytes; 131,072 tokens are 288 GiB."""
    spec = opt_66b()
    token_bytes = sum(spec.kv_bytes_per_token(layer) for layer in range(spec.num_layers))
    assert token_bytes == 2 * 64 * 9216 * 2 == 2.25 * MIB
    assert 131_072 * token_bytes == 288 * GIB


def test_an_expert_of_mixtral_has_as_many_bytes_as_flops_of_a_token() -> None:
    """3 matrices of 4096 x 14336 in fp16: 2 bytes and 2 FLOPs a weight."""
    spec = mixtral()
    assert spec.expert_bytes(0) == 352_321_536
    # the chosen experts of a token are two
    assert spec.flops("experts", 1, 0) == 2 * 352_321_536
    assert spec.layers[0].num_experts_per_token == 2


def test_the_ridge_and_the_copy_of_a_mixtral_expert() -> None:
    """One FLOP a byte and token: 156 tokens at 312 TFLOP/s and 2 TB/s; 14.1 ms at 25 GB/s."""
    spec = mixtral()
    flop_per_byte = spec.flops("experts", 1, 0) / 2 / spec.expert_bytes(0)
    assert 312e12 / 2e12 / flop_per_byte == 156
    assert spec.expert_bytes(0) / 25e9 == pytest.approx(14.1e-3, rel=1e-3)


@pytest.mark.parametrize(("num_tokens", "distinct"), [(1, 2.0), (4, 5.47), (16, 7.92)])
def test_the_experts_of_mixtral_that_even_tokens_hit(num_tokens: int, distinct: float) -> None:
    """8 (1 - (3/4)^n)."""
    assert round(Popularity.even(8, 2).distinct_experts(0, num_tokens), 2) == distinct
