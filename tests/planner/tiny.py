"""Tiny specs and machines whose bytes and seconds a person can redo by hand."""

from __future__ import annotations

from planner.hardware import DeviceProfile, HardwareProfile, LinearSample, LinkProfile
from planner.model_spec import Dtype, LayerSpec, ModelSpec, RopeSpec

# Bytes of the tiny model's modules in bfloat16, hidden 8, 2 heads of 4, 1 KV head, vocabulary 10:
ATTENTION = 400  # (8 * (2*8 + 2*4) + 8 norm) * 2
DENSE = 784  # (3 * 8*16 + 8 norm) * 2
ROUTER = 80  # (4 experts * 8 + 8 norm) * 2
EXPERT = 288  # 3 * 8*6 * 2
EXPERTS = 1152  # 4 * 288
EMBEDDING = 160  # 10 * 8 * 2
HEAD = 176  # (10 * 8 + 8 norm) * 2
KV_PER_TOKEN = 16  # 2 (K and V) * 1 head * 4 * 2
HIDDEN = 16  # 8 * 2: a token's hidden state
LOGITS = 40  # 10 * 4: a token's logits, float32
# Elements alive per token, 4 bytes each: 4 * hidden 8, and the widest of attention (2*8 + 2*4),
# dense (3*16 + 2*8) and experts (2 chosen * (3*6 + 2*8)).
DENSE_TOKEN = 384  # (32 + 64) * 4
MOE_TOKEN = 400  # (32 + 68) * 4

DENSE_LAYER = LayerSpec(intermediate_size=16)
MOE_LAYER = LayerSpec(intermediate_size=6, num_experts=4, num_experts_per_token=2)


def tiny_spec(layers: str, *, is_tied: bool = False, dtype: Dtype = "bfloat16") -> ModelSpec:
    """A model with one layer per letter: d is dense, m a mixture of experts."""
    kinds = {"d": DENSE_LAYER, "m": MOE_LAYER}
    return ModelSpec(
        name=f"tiny-{layers}",
        architecture="Qwen3MoeForCausalLM",
        dtype=dtype,
        hidden_size=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        vocab_size=10,
        max_position_embeddings=4096,
        layers=tuple(kinds[letter] for letter in layers),
        rope=RopeSpec(theta=1e4),
        is_tied=is_tied,
    )


def tiny_device(
    kind: str,
    *,
    memory_bytes: int = 1_000_000,
    read_bytes_per_s: float = 16.0,
    attention_bytes_per_s: float = 16.0,
    flop_per_s: float = 2.0**60,
    launch_s: float = 0.0,
    num_threads: int = 1,
    reserved_bytes: int = 0,
) -> DeviceProfile:
    """A device that is bound by its memory at 16 bytes per second unless it is told otherwise."""
    return DeviceProfile(
        name=f"tiny {kind}",
        kind="cuda" if kind == "gpu" else "cpu",
        memory_bytes=memory_bytes,
        read_bytes_per_s=read_bytes_per_s,
        attention_bytes_per_s=attention_bytes_per_s,
        attention_flop_per_s=flop_per_s,
        launch_s=launch_s,
        linear=(LinearSample(dtype="bfloat16", num_tokens=1, flop_per_s=flop_per_s),),
        num_threads=num_threads,
        reserved_bytes=reserved_bytes,
    )


def tiny_machine(
    *,
    cpu: DeviceProfile | None = None,
    gpu: DeviceProfile | None = None,
    link_bytes_per_s: float = 16.0,
    latency_s: float = 0.0,
) -> HardwareProfile:
    """A machine of tiny devices; without `gpu` it has none."""
    link = LinkProfile(
        name="tiny link",
        h2d_bytes_per_s=link_bytes_per_s,
        d2h_bytes_per_s=link_bytes_per_s,
        latency_s=latency_s,
    )
    return HardwareProfile(
        name="tiny machine",
        provenance="datasheet",
        cpu_by_threads=(cpu or tiny_device("cpu"),),
        gpu=gpu,
        link=None if gpu is None else link,
    )


def real_machine(
    *,
    cpu_bytes: int = 100_000,
    gpu_bytes: int | None = 100_000,
    link_bytes_per_s: float = 25e3,
    cpu_flop_per_s: float = 60e3,
    cpu_read_bytes_per_s: float = 60e3,
) -> HardwareProfile:
    """A machine with the proportions of a desktop (GPU 10 times the CPU), a million times slower.

    Every kind of bound occurs: compute, memory, launches and the link.
    """
    cpu = tiny_device(
        "cpu",
        memory_bytes=cpu_bytes,
        read_bytes_per_s=cpu_read_bytes_per_s,
        attention_bytes_per_s=50e3,
        flop_per_s=cpu_flop_per_s,
        launch_s=1e-4,
    )
    gpu = tiny_device(
        "gpu",
        memory_bytes=gpu_bytes or 0,
        read_bytes_per_s=800e3,
        attention_bytes_per_s=500e3,
        flop_per_s=3e6,
        launch_s=5e-5,
    )
    return tiny_machine(
        cpu=cpu,
        gpu=gpu if gpu_bytes is not None else None,
        link_bytes_per_s=link_bytes_per_s,
        latency_s=1e-4,
    )
