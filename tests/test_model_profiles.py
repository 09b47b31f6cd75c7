"""Shipped model shapes against what their makers publish."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from hetero.model_lookup import find_model, model_names, read_model_spec
from planner.model_spec import ModelSpec, Module

MODELS = sorted((Path(__file__).parents[1] / "profiles" / "models").glob("*.json"))

EMBEDDING: tuple[Module, ...] = ("embedding",)
EMBEDDING_AND_HEAD: tuple[Module, ...] = ("embedding", "head")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Billions of parameters in the digits that are published, and what they leave out.

    `kv_bytes`: what a token adds to the bfloat16 caches of all layers. `expert_m`: millions of
    parameters of one expert. None: not published, or not a mixture of experts.
    """

    total: str | None
    kv_bytes: int
    active: str | None = None
    expert_m: float | None = None
    active_leaves_out: tuple[Module, ...] = ()


# Quoted from memory: DeepSeek-V4-Flash's 284 and 13, Nemotron's 31.6 (its name says 30).
# kv_bytes: layers with a cache * elements * 2 bytes. DeepSeek-V4-Flash, by its compress_ratios:
# 21 layers * (512 + 128) / 4 + 20 * 512 / 128 elements; Nemotron: 6 layers * 2 * 2 heads * 128.
PUBLISHED = {
    "deepseek-moe-16b": Published(total="16.4", kv_bytes=229376, active="2.8", expert_m=8.651),
    "deepseek-v2": Published(total="236", kv_bytes=69120, active="21", expert_m=23.593),
    "deepseek-v2-lite": Published(
        total="15.7", kv_bytes=31104, active="2.4", expert_m=8.651, active_leaves_out=EMBEDDING
    ),
    "deepseek-v3": Published(total="671", kv_bytes=70272, active="37", expert_m=44.04),
    "deepseek-v4-flash": Published(
        total="284", kv_bytes=6880, active="13", expert_m=25.166, active_leaves_out=EMBEDDING
    ),
    "gemma-4-26b-a4b": Published(total="26", kv_bytes=245760, active="4", expert_m=5.947),
    "glm-4.5": Published(
        total="355",
        kv_bytes=376832,
        active="32",
        expert_m=23.593,
        active_leaves_out=EMBEDDING_AND_HEAD,
    ),
    "glm-4.5-air": Published(
        total="106",
        kv_bytes=188416,
        active="12",
        expert_m=17.302,
        active_leaves_out=EMBEDDING_AND_HEAD,
    ),
    "glm-5": Published(total="744", kv_bytes=89856, active="40", expert_m=37.749),
    "gpt-oss-120b": Published(
        total="116.8", kv_bytes=73728, active="5.1", expert_m=24.883, active_leaves_out=EMBEDDING
    ),
    "gpt-oss-20b": Published(
        total="20.9", kv_bytes=49152, active="3.6", expert_m=24.883, active_leaves_out=EMBEDDING
    ),
    "granite-3.0-3b-a800m": Published(
        total="3.3", kv_bytes=65536, active="0.8", expert_m=2.359, active_leaves_out=EMBEDDING
    ),
    "jamba-1.5-mini": Published(total="52", kv_bytes=16384, active="12", expert_m=176.161),
    "kimi-k2": Published(total="1026", kv_bytes=70272, active="32", expert_m=44.04),
    "llama-2-13b": Published(total="13.0", kv_bytes=819200),
    "llama-2-70b": Published(total="69.0", kv_bytes=327680),
    "llama-2-7b": Published(total="6.74", kv_bytes=524288),
    "llama-3.1-405b": Published(total="405", kv_bytes=516096),
    "llama-3.1-70b": Published(total="70.6", kv_bytes=327680),
    "llama-3.1-8b": Published(total="8.03", kv_bytes=131072),
    "llama-3.2-1b": Published(total="1.24", kv_bytes=32768),
    "llama-4-maverick": Published(total="400", kv_bytes=196608, active="17", expert_m=125.829),
    "llama-4-scout": Published(total="109", kv_bytes=196608, active="17", expert_m=125.829),
    "mimo-v2-flash": Published(total="309", kv_bytes=122880, active="15", expert_m=25.166),
    "minimax-m2": Published(
        total="230",
        kv_bytes=253952,
        active="10",
        expert_m=14.156,
        active_leaves_out=EMBEDDING_AND_HEAD,
    ),
    "minimax-m3": Published(total=None, kv_bytes=122880, active=None, expert_m=56.623),
    "mistral-7b": Published(total="7.25", kv_bytes=131072),
    "mixtral-8x22b": Published(total="141", kv_bytes=229376, active="39", expert_m=301.99),
    "mixtral-8x7b": Published(total="46.7", kv_bytes=131072, active="12.9", expert_m=176.161),
    "nemotron-3-nano-30b-a3b": Published(total="31.6", kv_bytes=6144, active="3.5", expert_m=9.978),
    "olmoe-1b-7b": Published(total="6.9", kv_bytes=131072, active="1.3", expert_m=6.291),
    "opt-13b": Published(total="13", kv_bytes=819200),
    "opt-175b": Published(total="175", kv_bytes=4718592),
    "opt-30b": Published(total="30", kv_bytes=1376256),
    "opt-6.7b": Published(total="6.7", kv_bytes=524288),
    "opt-66b": Published(total="66", kv_bytes=2359296),
    "phi-3.5-moe": Published(total="41.9", kv_bytes=131072, active="6.6", expert_m=78.643),
    "qwen1.5-moe-a2.7b": Published(total="14.3", kv_bytes=196608, active="2.7", expert_m=8.651),
    "qwen2-57b-a14b": Published(total="57.4", kv_bytes=57344, active="14.2", expert_m=27.525),
    "qwen2.5-7b": Published(total="7.61", kv_bytes=57344),
    "qwen3-0.6b": Published(total="0.6", kv_bytes=114688),
    "qwen3-235b-a22b": Published(total="235", kv_bytes=192512, active="22", expert_m=18.874),
    "qwen3-30b-a3b": Published(total="30.5", kv_bytes=98304, active="3.3", expert_m=4.719),
    "qwen3-32b": Published(total="32.8", kv_bytes=262144),
    "qwen3-8b": Published(total="8.2", kv_bytes=147456),
    "qwen3-coder-480b-a35b": Published(total="480", kv_bytes=253952, active="35", expert_m=47.186),
    "qwen3-next-80b-a3b": Published(
        total="80", kv_bytes=24576, active="3", expert_m=3.146, active_leaves_out=EMBEDDING_AND_HEAD
    ),
    "qwen3.5-122b-a10b": Published(total="122", kv_bytes=24576, active="10", expert_m=9.437),
    "qwen3.5-27b": Published(total="27", kv_bytes=65536),
    "qwen3.5-35b-a3b": Published(total="35", kv_bytes=20480, active="3", expert_m=3.146),
    "qwen3.5-397b-a17b": Published(total="397", kv_bytes=30720, active="17", expert_m=12.583),
    "snowflake-arctic": Published(total="480", kv_bytes=143360, active="17", expert_m=104.595),
    "step-3.7-flash": Published(total=None, kv_bytes=184320, active=None, expert_m=15.729),
    "tinyllama-1.1b": Published(total="1.1", kv_bytes=22528),
}
# Rounder than 1.2 %: Gemma 4 counts what its other layers' heads have.
TOTAL_TOLERANCE = {"gemma-4-26b-a4b": 0.035}


def read_spec(name: str) -> ModelSpec:
    return read_model_spec(find_model(name))


def test_every_shipped_model_has_published_numbers() -> None:
    """A new profile comes with numbers to check it against."""
    assert set(model_names()) == set(PUBLISHED)


@pytest.mark.parametrize("name", [name for name, known in PUBLISHED.items() if known.total])
def test_model_profile_has_the_published_number_of_parameters(name: str) -> None:
    """In total, within 1.2 %."""
    spec, published = read_spec(name), float(PUBLISHED[name].total or 0)
    billions = spec.total_weight_bytes() / spec.dtype_bytes / 1e9
    assert billions == pytest.approx(published, rel=TOTAL_TOLERANCE.get(name, 0.012))


@pytest.mark.parametrize("name", [name for name, known in PUBLISHED.items() if known.active])
def test_model_profile_has_the_published_number_of_active_parameters(name: str) -> None:
    """Those that one token uses, within 3 % or half of the last digit that is published."""
    spec, known = read_spec(name), PUBLISHED[name]
    assert known.active is not None
    outer: list[Module] = ["head"] if spec.is_tied else ["embedding", "head"]
    # of a tied matrix that is left out only the norm of the head stays
    left_out = len(known.active_leaves_out) * spec.vocab_size * spec.hidden_size
    active = sum(spec.num_params(module) for module in outer) - left_out
    for index, layer in enumerate(spec.layers):
        active += sum(spec.num_params(each, index) for each in layer.modules if each != "experts")
        active += layer.num_experts_per_token * (spec.expert_params(index) if layer.is_moe else 0)
    published, digits = float(known.active), len(known.active.partition(".")[2])
    assert active / 1e9 == pytest.approx(published, abs=max(0.03 * published, 0.5 / 10**digits))


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_profile_has_the_known_cache_size(name: str) -> None:
    """Bytes of cache for a token, all layers."""
    spec = read_spec(name)
    assert sum(map(spec.kv_bytes_per_token, range(spec.num_layers))) == PUBLISHED[name].kv_bytes


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_profile_has_the_known_expert_size(name: str) -> None:
    """Millions of parameters of an expert, to a thousand; the bytes are two each."""
    spec, known = read_spec(name), PUBLISHED[name].expert_m
    sizes = {spec.expert_params(i) for i, layer in enumerate(spec.layers) if layer.is_moe}
    assert [round(size / 1e6, 3) for size in sizes] == ([] if known is None else [known])
    assert {spec.expert_bytes(i) for i, layer in enumerate(spec.layers) if layer.is_moe} == {
        2 * size for size in sizes
    }


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_profile_says_its_name_and_source(path: Path) -> None:
    """The file is called what the command line calls the model."""
    config = json.loads(path.read_text())
    assert config["name"] == path.stem == read_spec(path.stem).name
    assert "/" in config["source"]


def test_layers_that_keep_a_cache_are_those_that_are_published() -> None:
    """Of linear, sliding and state-space models: how many layers of which kind."""
    kept = {
        name: sum(spec.kv_bytes_per_token(index) > 0 for index in range(spec.num_layers))
        for name in ("qwen3-next-80b-a3b", "qwen3.5-397b-a17b", "jamba-1.5-mini")
        for spec in [read_spec(name)]
    }
    assert kept == {"qwen3-next-80b-a3b": 12, "qwen3.5-397b-a17b": 15, "jamba-1.5-mini": 4}
    windowed = {
        name: sum(layer.window is not None for layer in read_spec(name).layers)
        for name in ("gpt-oss-120b", "gemma-4-26b-a4b", "step-3.7-flash", "llama-4-scout")
    }
    assert windowed == {
        "gpt-oss-120b": 18,
        "gemma-4-26b-a4b": 25,
        "step-3.7-flash": 33,
        "llama-4-scout": 36,
    }
    moe = {
        name: sum(layer.is_moe for layer in read_spec(name).layers)
        for name in ("deepseek-v3", "llama-4-maverick", "jamba-1.5-mini", "mimo-v2-flash")
    }
    assert moe == {
        "deepseek-v3": 58,
        "llama-4-maverick": 24,
        "jamba-1.5-mini": 16,
        "mimo-v2-flash": 47,
    }
