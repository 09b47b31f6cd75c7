"""Tiny specs and machines whose bytes and seconds a person can redo by hand."""

from __future__ import annotations

from msgspec.structs import replace

from planner.device import DeviceKind, DeviceProfile, LinkProfile, Sample
from planner.hardware import HardwareProfile
from planner.kernels import Backend, Kernel
from planner.model_spec import Dtype, LayerSpec, ModelSpec, RopeSpec, WeightKind
from planner.speed_of_light import speed_of_light
from planner.step_graph import Lane

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
# Bytes of their matrices alone, which products read.
ATTENTION_MATRICES = 384  # 8 * (2*8 + 2*4) * 2
DENSE_MATRICES = 768  # 3 * 8*16 * 2
ROUTER_MATRIX = 64  # 4 * 8 * 2
HEAD_MATRIX = 160  # 10 * 8 * 2
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
    flop_per_s: float = 2.0**60,
    elements_per_s: float = 2.0**60,
    launch_s: float = 0.0,
    num_threads: int = 1,
    reserved_bytes: int = 0,
) -> DeviceProfile:
    """A device that is bound by its memory at 16 bytes per second unless it is told otherwise."""
    kinds: dict[str, DeviceKind] = {"cpu": "cpu", "gpu": "cuda", "emulated": "emulated"}
    return DeviceProfile(
        name=f"tiny {kind}",
        kind=kinds[kind],
        memory_bytes=memory_bytes,
        read_bytes_per_s=read_bytes_per_s,
        flop_per_s={"bfloat16": flop_per_s, "float32": flop_per_s},
        elements_per_s=elements_per_s,
        launch_s=launch_s,
        num_threads=num_threads,
        reserved_bytes=reserved_bytes,
    )


def ideal_samples(device: DeviceProfile) -> tuple[Sample, ...]:
    """Products and attention at the speed of light: their seconds are work over a ceiling.

    A hand-over between lanes takes no time to speak of.
    """
    lane: Lane = "cpu" if device.kind == "cpu" else "gpu"
    own: Backend = "numba" if lane == "cpu" else "torch"
    prompts: tuple[WeightKind, ...] = ("bfloat16", "float32")
    samples = [
        _sample(lane, device, "linear", own, (8, 8)),
        _sample(lane, device, "experts", own, (1, 8, 8)),
        _sample(lane, device, "decode_attention", own, (2, 1, 4)),
        *(_sample(lane, device, "prefill_attention", "torch", (2, 1, 4), each) for each in prompts),
    ]
    ideal = [
        replace(sample, seconds=speed_of_light(sample.call, device).seconds) for sample in samples
    ]
    if lane == "cpu":
        handover = _sample(lane, device, "handover", "torch", (), "float32")
        ideal.append(replace(handover, seconds=2.0**-60))
    return tuple(ideal)


def _sample(
    lane: Lane,
    device: DeviceProfile,
    kernel: Kernel,
    backend: Backend,
    shape: tuple[int, ...],
    kind: WeightKind = "bfloat16",
) -> Sample:
    return Sample(
        lane=lane,
        kernel=kernel,
        format=kind,
        backend=backend,
        shape=shape,
        context=1 if kernel == "decode_attention" else 0,
        num_threads=device.num_threads if lane == "cpu" else 1,
        seconds=1.0,
    )


def tiny_machine(
    *,
    cpu: DeviceProfile | None = None,
    gpu: DeviceProfile | None = None,
    link_bytes_per_s: float = 16.0,
    latency_s: float = 0.0,
) -> HardwareProfile:
    """A machine of tiny devices that reach their ceilings; without `gpu` it has none."""
    machine = _machine(cpu or tiny_device("cpu"), gpu, link_bytes_per_s, latency_s)
    devices = [*machine.cpu_by_threads, *([] if gpu is None else [gpu])]
    return replace(
        machine, samples=tuple(sample for device in devices for sample in ideal_samples(device))
    )


def _machine(
    cpu: DeviceProfile, gpu: DeviceProfile | None, link_bytes_per_s: float, latency_s: float
) -> HardwareProfile:
    link = LinkProfile(
        name="tiny link",
        h2d_bytes_per_s=link_bytes_per_s,
        d2h_bytes_per_s=link_bytes_per_s,
        latency_s=latency_s,
    )
    return HardwareProfile(
        name="tiny machine",
        provenance="datasheet",
        cpu_by_threads=(cpu,),
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

    Every kind of bound occurs: compute, memory, launches and the link. It has no samples, so that
    what its kernels reach of the ceilings is assumed, as of a CPU on both: what is assumed of CUDA
    counts megabytes.
    """
    cpu = tiny_device(
        "cpu",
        memory_bytes=cpu_bytes,
        read_bytes_per_s=cpu_read_bytes_per_s,
        flop_per_s=cpu_flop_per_s,
        elements_per_s=60e3,
        launch_s=1e-4,
    )
    gpu = tiny_device(
        "emulated",
        memory_bytes=gpu_bytes or 0,
        read_bytes_per_s=800e3,
        flop_per_s=3e6,
        elements_per_s=800e3,
        launch_s=5e-5,
    )
    return _machine(cpu, gpu if gpu_bytes is not None else None, link_bytes_per_s, 1e-4)
