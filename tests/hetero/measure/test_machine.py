"""A whole measurement: it loads, it says what it is, and it has samples of all that is priced."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from cpu_kernels import compiling
from cpu_kernels.calls import Chain
from hetero import LLM, SamplingParams
from hetero.errors import EnvironmentProblemError
from hetero.measure import cpu as cpu_probes
from hetero.measure import gpu as gpu_probes
from hetero.measure import machine, settling
from hetero.measure.cold_memory import cold_cpu_memory
from hetero.measure.cpu import choose_threads, thread_counts
from hetero.measure.effort import FULL, QUICK
from hetero.measure.gpu import other_use_notes, own_context_bytes
from hetero.measure.machine import measure_machine, measure_with
from hetero.measure.timing import torch_threads
from planner import strategies
from planner.cost_model import Backends, CostModel
from planner.hardware import HardwareProfile
from planner.kernel_table import KernelEstimate, KernelTable
from planner.kernels import Backend, Kernel, KernelCall
from planner.model_spec import Dtype, ModelSpec, Module, Quantization
from planner.speed_of_light import speed_of_light
from planner.step_graph import build
from planner.workload import BatchShape, decode_shape, prefill_shapes
from tests.hetero.measure.tiny_effort import MEMORY_BYTES, TINY, two_layers
from tests.machines import toy_machine
from tests.tiny_models import save_tiny_model

MODULES: tuple[Module, ...] = ("attention", "router", "experts", "dense", "head")


@pytest.fixture(scope="module", params=[1, 2], ids=["one-core", "two-cores"])
def measured(request: pytest.FixtureRequest) -> Iterator[HardwareProfile]:
    """A machine of one core, or of two that are used both; the one thread is measured briefly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_probes, "physical_cores", lambda: request.param)
        patch.setattr(cpu_probes, "choose_threads", max)
        patch.setattr(cpu_probes, "QUICK", TINY)
        patch.setattr(settling, "_MAX_ROUNDS", 0)
        yield measure_with(
            replace(TINY, has_all_thread_counts=True),
            progress=lambda line: None,
            has_gpu=False,
            notes=("tiny",),
            memory_bytes=MEMORY_BYTES,
        )


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> mock.MagicMock:
    """What others do meanwhile is what the test says; one core, so that it is quick."""
    others = mock.MagicMock()
    others.return_value.notes.return_value = ()
    monkeypatch.setattr(machine, "OtherProcesses", others)
    monkeypatch.setattr(cpu_probes, "physical_cores", lambda: 1)
    monkeypatch.setattr(settling, "_MAX_ROUNDS", 0)
    return others


def measure_tiny(spec: ModelSpec | None = None) -> HardwareProfile:
    return measure_with(
        TINY, progress=lambda line: None, has_gpu=False, spec=spec, memory_bytes=MEMORY_BYTES
    )


# --- the profile


def test_a_measured_profile_passes_strict_loading(measured: HardwareProfile) -> None:
    """Its own file gives the same profile."""
    assert HardwareProfile.from_json(measured.to_json(), source="test") == measured


def test_no_sample_is_faster_than_the_ceilings(measured: HardwareProfile) -> None:
    """Those beside other work too; every sample's number of threads is one that has ceilings."""
    devices = {device.num_threads: device for device in measured.cpu_by_threads}
    on_cpu = [sample for sample in measured.samples if sample.lane == "cpu"]
    assert {sample.num_threads for sample in on_cpu} == set(devices)
    for sample in on_cpu:
        assert sample.seconds >= speed_of_light(sample.call, devices[sample.num_threads]).seconds


def test_a_profile_says_what_it_is(measured: HardwareProfile) -> None:
    """Where it is from, its notes, its threads; no GPU was asked for."""
    assert (measured.provenance, measured.notes[0]) == ("measured", "tiny")
    assert measured.fingerprint is not None and measured.measured_at is not None
    assert (measured.gpu, measured.link) == (None, None)
    counts = [device.num_threads for device in measured.cpu_by_threads]
    assert measured.num_threads == measured.cpu.num_threads == max(counts)
    assert counts == list(range(1, max(counts) + 1))


def test_every_call_is_measured_once(measured: HardwareProfile) -> None:
    """Alone, with a number of threads; and again beside what kept a lane busy."""
    calls = [(each.lane, each.num_threads, each.busy, each.call) for each in measured.samples]
    assert len(set(calls)) == len(calls)


def test_lanes_are_measured_beside_each_other(measured: HardwareProfile) -> None:
    """Experts beside copies, copies beside experts, experts beside attention; emulated copies."""
    beside = {(each.lane, each.kernel, each.busy) for each in measured.samples if each.busy}
    assert beside == {
        ("cpu", "experts", ("h2d",)),
        ("h2d", "copy", ("cpu",)),
        ("cpu", "experts", ("cpu",)),
        ("cpu", "linear", ("h2d",)),  # torch's, beside the emulated accelerator's copies
    }


# --- all that is priced has samples


Priced = list[tuple[str, KernelCall, KernelEstimate]]


def estimates(
    hardware: HardwareProfile,
    spec: ModelSpec,
    shapes: list[BatchShape],
    backends: Backends | None = None,
) -> Priced:
    """Each kernel that a step of any strategy calls, with its lane and its price."""
    costs, found = CostModel(hardware), list[tuple[str, KernelCall, KernelEstimate]]()
    lanes = {id(table): lane for lane, table in costs._tables.items()}
    estimate = KernelTable.estimate

    def noted(table: KernelTable, call: KernelCall) -> KernelEstimate:
        priced = estimate(table, call)
        found.append((lanes[id(table)], call, priced))
        return priced

    names = ("cpu",) if hardware.gpu is None else tuple(strategies.STRATEGIES)
    with mock.patch.object(KernelTable, "estimate", noted):
        for shape in shapes:
            costs.host_cost(shape)
            for name in names:
                graph = build(spec, strategies.STRATEGIES[name](spec, shape.phase, 1))
                for op in graph.ops:
                    costs.op_cost(op, spec, shape, backends or {})
    return found


def steps() -> list[BatchShape]:
    """Decode of one and of many, a prompt, a prompt with a past."""
    past = BatchShape(phase="prefill", num_tokens=8, num_seqs=1, num_past_tokens=40, num_logits=1)
    return [decode_shape(1, 20.0), decode_shape(9, 300.5), *prefill_shapes(1, 24, 64), past]


@pytest.mark.parametrize(
    ("dtype", "quantization", "backend"),
    [
        ("bfloat16", None, "numba"),
        ("float32", None, "numba"),
        ("bfloat16", "int8", "numba"),
        ("bfloat16", "int4", "numba"),
        ("bfloat16", None, "torch"),
        ("float32", None, "torch"),
        ("float16", None, "torch"),
    ],
)
def test_every_kernel_of_a_step_on_the_cpu_has_samples(
    measured: HardwareProfile, dtype: Dtype, quantization: Quantization | None, backend: Backend
) -> None:
    """In each format, of our kernels and of torch's; nothing is a guess."""
    spec = two_layers(dtype, quantization)
    found = estimates(measured, spec, steps(), dict.fromkeys(MODULES, backend))
    assert {lane for lane, _, _ in found} == {"cpu"}
    assert [(call.kernel, call.backend) for _, call, each in found if each.source == "prior"] == []


@pytest.mark.parametrize(
    ("quantization", "backend"),
    [(None, "numba"), ("int8", "numba"), ("int4", "numba"), (None, "torch")],
)
def test_products_have_samples_of_their_own_format_and_threads(
    measured: HardwareProfile, quantization: Quantization | None, backend: Backend
) -> None:
    """Those of another would be assumptions."""
    spec = two_layers("bfloat16", quantization)
    products: tuple[Kernel, ...] = ("linear", "experts")
    found = [
        (call, each.source)
        for _, call, each in estimates(measured, spec, steps(), dict.fromkeys(MODULES, backend))
        if call.kernel in products
    ]
    assert {(call.kernel, call.backend) for call, _ in found} == {(k, backend) for k in products}
    assert {source for _, source in found} <= {"measured", "interpolated", "extrapolated"}


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [
        ("bfloat16", None),
        ("float32", None),
        ("float16", None),
        ("bfloat16", "int8"),
        ("bfloat16", "int4"),
    ],
)
def test_every_kernel_of_a_step_on_the_emulated_accelerator_has_samples(
    measured: HardwareProfile, dtype: Dtype, quantization: Quantization | None
) -> None:
    """What torch did with one thread; copies are throttled and need none."""
    hardware = measured.with_emulated_gpu(memory_bytes=1_000_000_000, link_bytes_per_s=1e9)
    found = estimates(hardware, two_layers(dtype, quantization), steps())
    assert {lane for lane, _, _ in found} == {"cpu", "gpu"}
    on_gpu = {(call.backend, call.format) for lane, call, _ in found if lane == "gpu"}
    # the router stays as it is, the head of an int4 model is int8
    panels = {None: set(), "int8": {"int8"}, "int4": {"int8", "int4"}}[quantization]
    assert {kind for backend, kind in on_gpu if backend == "panels"} == panels
    assert {backend for backend, kind in on_gpu if kind not in panels} == {"torch"}
    guessed = {(lane, call.kernel) for lane, call, each in found if each.source == "prior"}
    assert guessed == set()
    assert {"handover", "sample", "step"} <= {call.kernel for _, call, _ in found}


def names_of_bodies(addresses: set[int]) -> set[tuple[object, ...]]:
    """The makers of compiled bodies, with what they were made for."""
    return {key for key, address in compiling._addresses.items() if address in addresses}


@pytest.mark.parametrize("name", ["mixtral", "mistral"])
def test_what_the_engine_runs_in_chains_is_what_is_measured(
    tmp_path: Path, quiet: mock.MagicMock, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Prefill and decode, with experts and without: a probe times every compiled body too."""
    seen: set[int] = set()
    run = Chain.run

    def noted(chain: Chain) -> None:
        seen.update(link.body for link in chain.links)
        run(chain)

    save_tiny_model(name, tmp_path, dtype=torch.bfloat16)
    greedy = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    with (
        LLM(tmp_path, profile=toy_machine(), accelerator="none") as llm,
        mock.patch.object(Chain, "run", noted),
    ):
        llm.generate([{"prompt_token_ids": [3, 14, 15]}], greedy)
    by_engine = names_of_bodies(seen)
    seen.clear()
    # which runs the engine itself
    monkeypatch.setattr(cpu_probes, "host_samples", lambda *arguments, **others: ())
    with mock.patch.object(Chain, "run", noted):
        measure_tiny()
    assert len(by_engine) > 5
    assert by_engine - names_of_bodies(seen) == set()


# --- a model's own shapes


@pytest.mark.parametrize(
    ("dtype", "quantization"), [("bfloat16", None), ("float32", None), ("bfloat16", "int4")]
)
def test_a_model_that_was_measured_is_priced_by_its_own_samples(
    quiet: mock.MagicMock, dtype: Dtype, quantization: Quantization | None
) -> None:
    """At token counts that were sampled: products, feed-forwards, attention, norms and sampling."""
    spec = two_layers(dtype, quantization)
    profile = HardwareProfile.from_json(measure_tiny(spec).to_json(), source="test")
    assert profile.notes == ("measured with the shapes of toy",)
    exact: tuple[Kernel, ...] = (
        *("linear", "decode_attention", "norm", "residual", "rotary", "sample"),
        *("step", "handover"),
    )
    for num_seqs in (1, 4):
        # 31 in the cache and the new one: a context of 32 is measured
        found = estimates(profile, spec, [decode_shape(num_seqs, 31.0)])
        sources = {(call.kernel, each.source) for _, call, each in found if call.kernel in exact}
        assert sources == {(kernel, "measured") for kernel in exact if kernel != "handover"}
        # a dense feed-forward is one expert
        dense = {
            each.source
            for _, call, each in found
            if call.kernel == "experts" and call.shape == (1.0, 128, 256)
        }
        assert dense == {"measured"}


def test_a_float16_model_can_be_measured(quiet: mock.MagicMock) -> None:
    """As a CPU runs it."""
    profile = measure_tiny(two_layers("float16"))
    assert profile.backends("float32") == ("numba", "torch")


def test_columns_of_no_whole_groups_are_left_to_our_kernels(quiet: mock.MagicMock) -> None:
    """Torch's products of quantised weights need them: 96 are none, o's 128 are one."""
    profile = measure_tiny(replace(two_layers(), hidden_size=96))
    products = {
        (each.format, each.backend, each.shape[1])
        for each in profile.samples
        if each.kernel == "linear" and each.shape[1] in (96, 128)
    }
    assert {("bfloat16", "torch", 96), ("int4", "numba", 96)} <= products
    assert {("int8", "torch", 128), ("int4", "torch", 128)} <= products
    assert products.isdisjoint({("int8", "torch", 96), ("int4", "torch", 96)})


# --- confidence, threads, devices


def test_a_busy_machine_has_low_confidence(
    quiet: mock.MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says why; a quiet one has high confidence."""
    monkeypatch.setattr(cpu_probes, "_measure_kernels", lambda *arguments: [])
    quiet.return_value.notes.return_value = ("others ran",)
    busy = measure_tiny()
    assert (busy.confidence, busy.notes) == ("low", ("others ran",))
    quiet.return_value.notes.return_value = ()
    still = measure_tiny()
    assert (still.confidence, still.notes) == ("high", ())


def test_other_processes_are_watched_from_before_the_first_probe(
    quiet: mock.MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To after the last one."""
    monkeypatch.setattr(cpu_probes, "_measure_kernels", lambda *arguments: [])
    order: list[str] = []
    others: mock.MagicMock = quiet.return_value

    def watch() -> mock.MagicMock:
        order.append("watch")
        return others

    def notes() -> tuple[str, ...]:
        order.append("notes")
        return ()

    quiet.side_effect, others.notes.side_effect = watch, notes
    measure_with(TINY, progress=order.append, has_gpu=False, memory_bytes=MEMORY_BYTES)
    assert (order[0], order[-1]) == ("watch", "notes")
    assert len(order) > 3


def test_measuring_leaves_no_thread_behind(quiet: mock.MagicMock) -> None:
    """Nor another number of threads."""
    before, num_threads = threading.enumerate(), torch.get_num_threads()
    measure_tiny()
    assert threading.enumerate() == before
    assert torch.get_num_threads() == num_threads


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({1: 1.0}, 1),
        ({1: 2.0, 2: 1.0}, 2),
        ({1: 1.0, 2: 2.0}, 1),
        # 1.0 * 1.03 < 1.04, but not < 1.02
        ({1: 1.04, 2: 1.0}, 2),
        ({1: 1.02, 2: 1.0}, 1),
        # two gain 2 % and four a tenth; eight lose half of it again
        ({8: 0.95, 4: 0.90, 2: 0.98, 1: 1.0}, 4),
        # each gains 2 % more than the one before: in the end 4 % more than the first
        ({1: 1.0, 2: 0.98, 4: 0.96}, 4),
    ],
)
def test_more_threads_must_gain_three_percent(seconds: dict[int, float], chosen: int) -> None:
    """Over the number that is chosen so far."""
    assert choose_threads(seconds) == chosen


def test_thread_counts_double_up_to_all() -> None:
    """1, 2, 4, ... and all; quick takes the two ends."""
    assert thread_counts(1, FULL) == (1,)
    assert thread_counts(6, FULL) == (1, 2, 4, 6)
    assert thread_counts(8, FULL) == (1, 2, 4, 8)
    assert thread_counts(8, QUICK) == (1, 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_refused() -> None:
    """Asking for CUDA without one is an error of the environment, not a CPU profile."""
    with pytest.raises(EnvironmentProblemError, match="cuda was asked for"):
        measure_machine(quick=True, accelerator="cuda")


def test_the_kernels_of_a_gpu_are_measured_wherever_the_memory_is() -> None:
    """On a CPU it is torch: every kernel of a step that has all on the GPU, in four formats."""
    with torch_threads(1), torch.inference_mode():
        found = gpu_probes.measure_gpu_kernels(cold_cpu_memory(MEMORY_BYTES), TINY)
    backends = {(each.backend, each.format in ("int8", "int4")) for each in found}
    assert backends == {("torch", False), ("panels", True)}
    every: set[Kernel] = {
        *("linear", "experts", "decode_attention", "prefill_attention", "elementwise")
    }
    assert {each.kernel for each in found} == every
    for kind in ("bfloat16", "float16", "int8", "int4"):
        kernels = {each.kernel for each in found if each.format == kind}
        assert kernels >= {"linear", "experts"}


@pytest.mark.gpu
def test_gpu_and_link_are_measured() -> None:
    """A GPU comes with its link, what the runtime takes of its memory, and samples of each kernel.

    Strict loading judges its ceilings.
    """
    profile = measure_with(
        TINY, progress=lambda line: None, has_gpu=True, memory_bytes=MEMORY_BYTES
    )
    assert HardwareProfile.from_json(profile.to_json(), source="test") == profile
    assert profile.gpu is not None and profile.link is not None
    assert 500_000_000 <= profile.gpu.reserved_bytes < profile.gpu.memory_bytes
    assert profile.link.h2d_bytes_per_s > 0 and profile.link.latency_s > 0
    assert profile.fingerprint is not None and profile.fingerprint.gpu_uuid is not None
    found = estimates(profile, two_layers(), steps())
    assert {lane for lane, _, _ in found} >= {"cpu", "gpu", "h2d", "d2h"}
    assert {(lane, call.kernel) for lane, call, each in found if each.source == "prior"} == set()


def test_other_use_of_the_gpu_is_noted_and_not_kept() -> None:
    """The context is what the use grew by beside tensors: 5.0 - 2.0 - 2.2 GB."""
    assert own_context_bytes(2_000_000_000, 5_000_000_000, 2_200_000_000) == 800_000_000
    assert own_context_bytes(2_000_000_000, 2_100_000_000, 0) == 500_000_000
    assert own_context_bytes(None, None, 0) == 500_000_000
    assert other_use_notes(0, 8_000_000_000) == ()
    (note,) = other_use_notes(2_000_000_000, 8_000_000_000)
    assert note.startswith("measured while other processes held 2.0 of the GPU's 8.0 GB")
