"""Shipped data: model shapes against published totals, machine profiles against their own rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.hardware import DeviceProfile, HardwareProfile
from planner.model_spec import DTYPE_BYTES, ModelSpec

PROFILES = Path(__file__).parents[1] / "profiles"
MACHINES = sorted((PROFILES / "machines").glob("*.json"))
MODELS = sorted((PROFILES / "models").glob("*.json"))

# Billions of parameters, as the makers publish them.
PUBLISHED_TOTAL = {
    "llama-3.1-70b": 70.6,
    "llama-3.1-8b": 8.03,
    "mistral-7b": 7.25,
    "mixtral-8x22b": 141.0,
    "mixtral-8x7b": 46.7,
    "olmoe-1b-7b": 6.9,
    "qwen2.5-7b": 7.61,
    "qwen3-235b-a22b": 235.0,
    "qwen3-30b-a3b": 30.5,
    "qwen3-32b": 32.8,
    "qwen3-8b": 8.2,
}
PUBLISHED_ACTIVE = {
    "mixtral-8x22b": 39.0,
    "mixtral-8x7b": 12.9,
    "olmoe-1b-7b": 1.3,
    "qwen3-235b-a22b": 22.0,
    "qwen3-30b-a3b": 3.3,
}
# bfloat16 bytes that a token adds to the cache of all layers: layers * 2 * kv heads * head_dim * 2.
KV_BYTES_PER_TOKEN = {
    "llama-3.1-70b": 327680,
    "llama-3.1-8b": 131072,
    "mixtral-8x22b": 229376,
    "mixtral-8x7b": 131072,
    "olmoe-1b-7b": 131072,
    "qwen3-235b-a22b": 192512,
    "qwen3-30b-a3b": 98304,
    "qwen3-32b": 262144,
    "qwen3-8b": 147456,
}


def read_spec(name: str) -> ModelSpec:
    config = json.loads((PROFILES / "models" / f"{name}.json").read_text())
    return ModelSpec.from_config(config, name=config["name"])


def test_every_shipped_model_has_a_published_total() -> None:
    """A new profile comes with a number to check it against."""
    assert {path.stem for path in MODELS} == set(PUBLISHED_TOTAL)


@pytest.mark.parametrize(("name", "billions"), PUBLISHED_TOTAL.items())
def test_model_profile_has_the_published_number_of_parameters(name: str, billions: float) -> None:
    """Total parameters within 1.5 % of what is published."""
    spec = read_spec(name)
    assert spec.name == name
    assert spec.total_weight_bytes() / spec.dtype_bytes / 1e9 == pytest.approx(billions, rel=0.015)


@pytest.mark.parametrize(("name", "billions"), PUBLISHED_ACTIVE.items())
def test_model_profile_has_the_published_number_of_active_parameters(
    name: str, billions: float
) -> None:
    """Parameters that one token uses within 3 % (they are published with two digits)."""
    spec = read_spec(name)
    active = spec.num_params("embedding") + spec.num_params("head")
    for index, layer in enumerate(spec.layers):
        active += spec.num_params("attention", index) + spec.num_params("router", index)
        active += layer.num_experts_per_token * spec.expert_params(index)
    assert active / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.parametrize(("name", "num_bytes"), KV_BYTES_PER_TOKEN.items())
def test_model_profile_has_the_known_cache_size(name: str, num_bytes: int) -> None:
    """Bytes of cache for a token, all layers."""
    spec = read_spec(name)
    assert sum(map(spec.kv_bytes_per_token, range(spec.num_layers))) == num_bytes


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_profile_says_its_name_and_source(path: Path) -> None:
    """The file is called what the command line calls the model."""
    config = json.loads(path.read_text())
    assert config["name"] == path.stem
    assert "/" in config["source"]


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_machine_profile_obeys_its_own_rules(path: Path) -> None:
    """It loads, names itself, is marked as datasheet, and its rates are below its own limits."""
    profile = HardwareProfile.load(path)
    assert profile.name == path.stem
    assert (profile.provenance, profile.fingerprint) == ("datasheet", None)
    assert profile.gpu is not None
    assert profile.link is not None
    assert profile.cpu.num_threads == max(cpu.num_threads for cpu in profile.cpu_by_threads)
    assert profile.cpu_by_threads[0].num_threads == 1
    for device in (*profile.cpu_by_threads, profile.gpu):
        check_device(device)
    assert profile.link.h2d_bytes_per_s < profile.gpu.read_bytes_per_s
    for pinned, pageable in (
        (profile.link.h2d_bytes_per_s, profile.link.pageable_h2d_bytes_per_s),
        (profile.link.d2h_bytes_per_s, profile.link.pageable_d2h_bytes_per_s),
    ):
        assert pageable is not None
        assert pageable < pinned


def check_device(device: DeviceProfile) -> None:
    assert 0 < device.reserved_bytes < device.memory_bytes / 4
    assert device.attention_bytes_per_s < device.read_bytes_per_s
    for dtype, num_bytes in DTYPE_BYTES.items():
        samples = [sample for sample in device.linear if sample.dtype == dtype]
        assert [sample.num_tokens for sample in samples] == [1, 4, 16, 64, 512]
        # One token reads every weight once: 2 FLOP for `num_bytes` bytes, or the peak below that.
        one_token_bytes_per_s = samples[0].flop_per_s * num_bytes / 2
        assert one_token_bytes_per_s <= device.read_bytes_per_s
        rates = [sample.flop_per_s for sample in samples]
        assert rates == sorted(rates)
        assert device.attention_flop_per_s <= max(rates) or device.kind == "cuda"
        for sample in samples:
            memory_bound = sample.num_tokens * samples[0].flop_per_s
            assert sample.flop_per_s <= memory_bound * 1.001  # rounded to four digits


def test_the_derivation_gives_the_numbers_of_a_machine() -> None:
    """The RTX 4090 desktop, by the formulas of profiles/__init__.py."""
    profile = HardwareProfile.load(PROFILES / "machines" / "desktop-rtx4090.json")
    assert profile.gpu is not None
    # Nominal 1008 GB/s: 0.80 reads; 2 FLOP / 2 bytes * 0.69 * 1008e9 at one token.
    assert profile.gpu.read_bytes_per_s == pytest.approx(0.80 * 1008e9, rel=1e-3)
    assert profile.gpu.linear_flop_per_s("bfloat16", 1) == pytest.approx(0.69 * 1008e9, rel=1e-3)
    # 165.2 TFLOP/s dense bfloat16 with float32 accumulation.
    assert profile.gpu.linear_flop_per_s("bfloat16", 512) == pytest.approx(0.7 * 165.2e12, rel=1e-3)
    # 2 channels DDR5-5200: 83.2 GB/s; 16 cores * 4.5 GHz * 32 FLOP * 0.60.
    assert profile.cpu.read_bytes_per_s == pytest.approx(0.80 * 83.2e9, rel=1e-3)
    assert profile.cpu.linear_flop_per_s("float32", 512) == pytest.approx(1382.4e9, rel=1e-3)
