"""Probes with tiny budgets: right structure, positive finite numbers. No timing is judged."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import pytest
import torch

from cpu_kernels.calls import Chain
from hetero.errors import EnvironmentProblemError
from hetero.measure import machine
from hetero.measure.attention import AttentionShape, cpu_decode_bytes_per_s, prefill_flop_per_s
from hetero.measure.cold_memory import (
    ColdMemory,
    cold_bytes,
    cold_cpu_memory,
    cold_gpu_memory,
    gpu_cold_bytes,
    last_level_cache_bytes,
)
from hetero.measure.gemm import linear_sample, model_shapes
from hetero.measure.launch import launch_s, link_s
from hetero.measure.link import emulated_bytes_per_s
from hetero.measure.machine import (
    QUICK,
    Effort,
    measure_machine,
    measure_with,
    other_use_notes,
    own_context_bytes,
    thread_counts,
)
from hetero.measure.memory import cpu_read_bytes_per_s
from hetero.measure.timing import median_seconds, torch_threads
from planner.hardware import Backend, HardwareProfile
from planner.model_spec import Dtype, LayerSpec, ModelSpec, RopeSpec, WeightKind

CPU = torch.device("cpu")
HEADS = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=32, context_len=64, prefill_len=16)
TINY = Effort(
    budget_s=0.0,
    tokens={"bfloat16": (1, 4), "float32": (1,), "float16": (1,)},
    other_tokens={"bfloat16": (2,), "int8": (1,)},
    gpu_tokens=(1, 16),
    has_all_thread_counts=False,
)
SPEC = ModelSpec(
    name="toy",
    architecture="Qwen3MoeForCausalLM",
    dtype="float32",
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=100,
    max_position_embeddings=128,
    layers=(
        LayerSpec(intermediate_size=48, num_experts=4, num_experts_per_token=2),
        LayerSpec(intermediate_size=96),
    ),
    rope=RopeSpec(theta=1e4),
    is_tied=True,
)


@pytest.fixture(scope="module")
def memory() -> ColdMemory:
    return cold_cpu_memory(24 << 20)


def is_rate(value: float) -> bool:
    return math.isfinite(value) and value > 0


def test_pieces_follow_each_other_and_wrap(memory: ColdMemory) -> None:
    """A piece begins where the last one ended, and at the start where it would not fit."""
    small = cold_cpu_memory(4096)
    starts = [small.take("float32", 8, 32).storage_offset() for _ in range(5)]
    assert starts == [0, 256, 512, 768, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pieces_hold_ordinary_numbers(memory: ColdMemory, dtype: Dtype) -> None:
    """No zeros, no subnormals: both can be faster or slower than weights."""
    piece = memory.take(dtype, 3, 5).float()
    assert bool(((piece > 1e-3) & (piece <= 1)).all())


def test_cold_bytes_outgrow_caches_within_an_eighth() -> None:
    """Twice 400 MB of caches, 512 MB with small ones, an eighth of 1 GiB where memory is short."""
    assert cold_bytes(64 << 30, 400 << 20) == 800 << 20
    assert cold_bytes(64 << 30, 16 << 20) == 512 << 20
    assert cold_bytes(1 << 30, 400 << 20) == 128 << 20


def test_last_level_caches_are_summed_once_each(tmp_path: Path) -> None:
    """Two cores share one 32 MB cache, a third has another; smaller levels do not count."""
    for core, shared in ((0, "0-1"), (1, "0-1"), (2, "2")):
        for index, (level, size, cores) in enumerate(((1, "48K", str(core)), (3, "32M", shared))):
            folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            (folder / "level").write_text(f"{level}\n")
            (folder / "size").write_text(f"{size}\n")
            (folder / "shared_cpu_list").write_text(f"{cores}\n")
    # 32 MiB + 32 MiB
    assert last_level_cache_bytes(tmp_path) == 67108864


def test_system_that_hides_its_caches_has_none(tmp_path: Path) -> None:
    """No folder, no bytes."""
    assert last_level_cache_bytes(tmp_path) == 0


def test_thread_count_is_put_back() -> None:
    """Also when the block raises."""
    before = torch.get_num_threads()
    with pytest.raises(KeyError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_first_call_is_not_timed() -> None:
    """One warm-up and three timed calls."""
    calls: list[int] = []
    assert median_seconds(lambda: calls.append(1), device=CPU, budget_s=0.0) >= 0
    assert len(calls) == 4


@pytest.mark.parametrize("num_threads", [1, 2])
def test_read_rate(memory: ColdMemory, num_threads: int) -> None:
    """A number for any thread count."""
    assert is_rate(cpu_read_bytes_per_s(memory, num_threads=num_threads, budget_s=0.0))


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", "int4"])
def test_linear_sample_names_what_it_measured(
    memory: ColdMemory, backend: Backend, dtype: WeightKind
) -> None:
    """Format, token count and backend go into the profile."""
    sample = linear_sample(
        memory,
        dtype=dtype,
        num_tokens=3,
        shapes=((32, 128), (128, 256)),
        budget_s=0.0,
        backend=backend,
    )
    assert (sample.dtype, sample.num_tokens, sample.backend) == (dtype, 3, backend)
    assert is_rate(sample.flop_per_s)


def test_links_read_memory_that_was_not_read_for_a_lap() -> None:
    """A chain goes through all of the memory, a piece of its own for every product."""
    small = cold_cpu_memory(40 << 10)
    chains: list[list[int]] = []
    run = Chain.run

    def noted(chain: Chain) -> None:
        chains.append([link.call.panels for link in chain.links])
        run(chain)

    with mock.patch.object(Chain, "run", noted):
        # 16 rows of 64 columns, 2 bytes each: 2048 bytes, 20 times in 40960
        linear_sample(
            small,
            dtype="bfloat16",
            num_tokens=1,
            shapes=((16, 64),),
            budget_s=0.05,
            backend="numba",
        )
    longest = max(chains, key=len)
    assert len(set(longest)) == len(longest) > 1
    assert len({panel for chain in chains for panel in chain}) == 20


def test_shapes_are_those_of_the_largest_layer() -> None:
    """qkv: 4*32 + 2*2*32 = 256; gate and up: 2*96 = 192."""
    shapes = model_shapes(SPEC, max_elements=1_000_000)
    assert shapes == ((256, 64), (64, 128), (192, 64), (64, 96))


def test_shapes_are_cut_to_the_memory() -> None:
    """6400 / 64 = 100 rows of qkv and of gate and up, 6400 / 128 = 50 of the output, down whole."""
    shapes = model_shapes(SPEC, max_elements=6400)
    assert shapes == ((100, 64), (50, 128), (64, 96))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_attention_rates(memory: ColdMemory, dtype: Dtype) -> None:
    """Decode reads both cache formats, prefill both kinds of tensors."""
    rate = cpu_decode_bytes_per_s(memory, HEADS, dtype=dtype, num_threads=1, budget_s=0.0)
    assert is_rate(rate)
    assert is_rate(prefill_flop_per_s(CPU, HEADS, dtype=dtype, budget_s=0.0))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_launch(memory: ColdMemory, num_threads: int) -> None:
    """A small operation takes some time, in torch and in a chain."""
    assert is_rate(launch_s(CPU, budget_s=0.0))
    assert is_rate(link_s(memory, num_threads=num_threads, budget_s=0.0))


def test_emulated_link_is_not_faster_than_stated() -> None:
    """1 MB at 100 MB/s: sleeps, so it can be slower, never faster."""
    rate = emulated_bytes_per_s(
        link_bytes_per_s=1e8, latency_s=0.0, budget_s=0.0, copy_bytes=1_000_000
    )
    assert 0 < rate <= 1e8


def test_thread_counts_double_up_to_all() -> None:
    """1, 2, 4, ... and all; quick takes the two ends."""
    full = machine.FULL
    assert thread_counts(1, full) == (1,)
    assert thread_counts(6, full) == (1, 2, 4, 6)
    assert thread_counts(8, full) == (1, 2, 4, 8)
    assert thread_counts(8, QUICK) == (1, 8)


@pytest.fixture(scope="module")
def measured() -> HardwareProfile:
    lines: list[str] = []
    profile = measure_with(
        TINY, progress=lines.append, has_gpu=False, notes=("tiny",), memory_bytes=40 << 20
    )
    assert len(lines) == 1 + 3 * len(profile.cpu_by_threads)
    return profile


def test_measured_profile_survives_its_file(measured: HardwareProfile) -> None:
    """What is measured is valid in the planner's strict schema."""
    assert HardwareProfile.from_json(measured.to_json(), source="test") == measured


def test_measured_profile_says_what_was_measured(measured: HardwareProfile) -> None:
    """One entry a thread count, every sample asked for, a note, a fingerprint."""
    cpu = measured.cpu_by_threads[0]
    assert measured.provenance == "measured"
    assert cpu.num_threads == 1
    assert [(s.backend, s.dtype, s.num_tokens) for s in cpu.linear] == [
        ("numba", "bfloat16", 1),
        ("numba", "bfloat16", 4),
        ("numba", "float32", 1),
        ("torch", "float16", 1),
        ("torch", "bfloat16", 2),
        ("torch", "int8", 1),
    ]
    assert cpu.torch_launch_s is not None and is_rate(cpu.torch_launch_s)
    rates = (
        cpu.read_bytes_per_s,
        cpu.attention_bytes_per_s,
        cpu.attention_flop_per_s,
        cpu.launch_s,
        *(sample.flop_per_s for sample in cpu.linear),
    )
    assert all(is_rate(rate) for rate in rates)
    assert measured.notes[0] == "tiny"
    assert measured.fingerprint is not None
    assert measured.gpu is None


def test_model_is_measured_with_its_own_shapes() -> None:
    """The note names the model, whose head size the decode kernel takes."""
    profile = measure_with(
        TINY, progress=lambda line: None, has_gpu=False, spec=SPEC, memory_bytes=40 << 20
    )
    assert profile.notes[0] == "measured with the shapes of toy"
    # 48 columns are no whole groups of quantised weights, which torch's products need
    assert profile.cpu.backends("int8") == ()
    assert profile.cpu.backends("bfloat16") == ("numba", "torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_refused() -> None:
    """Asking for CUDA without one is an error of the environment, not a CPU profile."""
    with pytest.raises(EnvironmentProblemError, match="cuda was asked for"):
        measure_machine(quick=True, accelerator="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_gpu_and_link_are_measured() -> None:
    """A GPU comes with its link, and what the runtime takes of its memory."""
    profile = measure_with(TINY, progress=lambda line: None, has_gpu=True, memory_bytes=40 << 20)
    assert profile.gpu is not None
    assert profile.link is not None
    assert is_rate(profile.gpu.read_bytes_per_s)
    assert is_rate(profile.gpu.attention_bytes_per_s)
    assert is_rate(profile.gpu.linear_flop_per_s("bfloat16", 16))
    assert 500_000_000 <= profile.gpu.reserved_bytes < profile.gpu.memory_bytes
    assert is_rate(profile.link.h2d_bytes_per_s)
    assert is_rate(profile.link.latency_s)
    assert profile.fingerprint is not None
    assert profile.fingerprint.gpu_uuid is not None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gpu_memory_holds_numbers_of_both_signs(dtype: Dtype) -> None:
    """No infinity, no NaN, nothing subnormal, in whatever format it is read."""
    values = cold_gpu_memory(1 << 20, CPU).take(dtype, 1 << 17)
    assert torch.isfinite(values).all()
    assert values.abs().min() > torch.finfo(values.dtype).smallest_normal
    assert 0.2 < float((values < 0).float().mean()) < 0.5


def test_gpu_memory_holds_the_largest_sample_or_says_why_not() -> None:
    """A sixteenth of 1.6 GB; more where a sample needs it; never more than half of what is free."""
    assert gpu_cold_bytes(1_600_000_000, 64_000_000) == 100_000_000
    assert gpu_cold_bytes(160_000_000, 64_000_000) == 64_000_000
    assert cold_gpu_memory(1001, CPU).num_bytes == 1024
    with pytest.raises(EnvironmentProblemError, match=r"needs 128 MB .* but 100 MB are free"):
        gpu_cold_bytes(100_000_000, 64_000_000)


def test_other_use_of_the_gpu_is_noted_and_not_kept() -> None:
    """The context is what the use grew by beside tensors: 5.0 - 2.0 - 2.2 GB."""
    assert own_context_bytes(2_000_000_000, 5_000_000_000, 2_200_000_000) == 800_000_000
    assert own_context_bytes(2_000_000_000, 2_100_000_000, 0) == 500_000_000
    assert own_context_bytes(None, None, 0) == 500_000_000
    assert other_use_notes(0, 8_000_000_000) == ()
    (note,) = other_use_notes(2_000_000_000, 8_000_000_000)
    assert note.startswith("measured while other processes held 2.0 of the GPU's 8.0 GB")
