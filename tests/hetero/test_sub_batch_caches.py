"""Prompts of two sub-batches are computed on the GPU, and each is decoded where it lies then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from hetero import LLM, SamplingParams
from hetero.checkpoint import Checkpoint
from hetero.engine import Engine
from hetero.model.decoder import Decoder
from hetero.model_lookup import find_model, read_model_spec
from hetero.runtime.devices import EmulatedAccelerator
from hetero.runtime.weights import load_weights
from hetero.sequence import Sequence
from planner import strategies
from planner.hardware import HardwareProfile
from planner.kv_blocks import KVBlocks, kv_blocks
from planner.memory import needs
from planner.model_spec import ModelSpec
from planner.placement import Placement
from planner.workload import Workload
from tests.machines import toy_machine
from tests.tiny_models import save_tiny_model

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
# Four of them come to one block more than their prompts have.
PROMPTS = [[(7 * at + 3 * size) % 101 for at in range(size)] for size in (12, 21, 1, 30, 15, 10)]
WAVE = Workload(prompt_len=16, output_len=8, num_seqs=len(PROMPTS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama", folder, seed=7)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    with LLM(folder, profile=toy_machine(), accelerator="none") as llm:
        outputs = llm.generate([{"prompt_token_ids": each} for each in PROMPTS], GREEDY)
        return [list(out.outputs[0].token_ids) for out in outputs]


@pytest.fixture
def accelerator() -> Iterator[EmulatedAccelerator]:
    made = EmulatedAccelerator(budget_bytes=10**9, link_bytes_per_s=4e9, latency_s=0.0)
    yield made
    made.close()


def sub_batches(spec: ModelSpec, *, kv_on_cpu: bool, chunk_tokens: int) -> Placement:
    """All weights on the GPU; three sequences with their cache on the CPU, or all of them."""
    decode = strategies.gpu(spec, "decode")
    layers = tuple(replace(layer, kv_on_cpu=kv_on_cpu) for layer in decode.layers)
    prefill = strategies.gpu(spec, "prefill")
    return Placement(
        prefill=replace(prefill, max_num_tokens=chunk_tokens),
        decode=replace(decode, layers=layers, num_second_seqs=3),
    )


def make_engine(
    folder: Path,
    spec: ModelSpec,
    placement: Placement,
    accelerator: EmulatedAccelerator,
    blocks: KVBlocks,
) -> Engine:
    with Checkpoint.open(folder) as checkpoint:
        weights = load_weights(spec, checkpoint, placement, accelerator)
    return Engine(
        decoder=Decoder.create(spec, weights, accelerator, num_threads=1),
        placement=placement,
        accelerator=accelerator,
        tokenizer=None,
        eos_token_ids=(),
        kv_blocks=blocks,
        max_num_seqs=len(PROMPTS),
        max_model_len=64,
    )


@pytest.mark.parametrize("chunk_tokens", [5, 64])
@pytest.mark.parametrize(
    "blocks",
    [
        # as many as planned, and more in the second; the longest needs 3 blocks
        KVBlocks(first=20, second=20, prompts=6),
        KVBlocks(first=4, second=20, prompts=6),
        KVBlocks(first=3, second=4, prompts=3),
        KVBlocks(first=1, second=4, prompts=4),
    ],
)
@pytest.mark.parametrize("kv_on_cpu", [False, True])
def test_both_sub_batches_give_the_tokens_of_all_cpu(
    folder: Path,
    expected: list[list[int]],
    accelerator: EmulatedAccelerator,
    kv_on_cpu: bool,
    blocks: KVBlocks,
    chunk_tokens: int,
) -> None:
    """Prompts in parts and whole; with few blocks some are prefilled again, some in the other."""
    spec = read_model_spec(find_model(str(folder)))
    placement = sub_batches(spec, kv_on_cpu=kv_on_cpu, chunk_tokens=chunk_tokens)
    engine = make_engine(folder, spec, placement, accelerator, blocks)
    seen: set[int] = set()
    sequences = [
        engine.add_request(str(number), prompt, GREEDY) for number, prompt in enumerate(PROMPTS)
    ]
    while (result := engine.step()) is not None:
        seen |= {item.sequence.sub_batch for item in result.batch.items}
    assert [each.output_token_ids for each in sequences] == expected
    assert any(each.num_preemptions for each in sequences) == (blocks.first < 4)
    assert seen == {0, 1}
    pools = engine.scheduler.pools
    assert pools.prompts is not None
    assert all(pool.num_free == pool.num_blocks for pool in (*pools.decode, pools.prompts))


@pytest.mark.parametrize("kv_on_cpu", [False, True])
def test_the_accelerator_holds_the_caches_that_were_planned(
    folder: Path, accelerator: EmulatedAccelerator, kv_on_cpu: bool
) -> None:
    """Its bytes beside the weights are those of the planner's count."""
    spec = read_model_spec(find_model(str(folder)))
    machine: HardwareProfile = toy_machine().with_emulated_gpu(
        memory_bytes=10**9, link_bytes_per_s=4e9
    )
    placement = sub_batches(spec, kv_on_cpu=kv_on_cpu, chunk_tokens=16)
    blocks = kv_blocks(placement, WAVE)
    engine = make_engine(folder, spec, placement, accelerator, blocks)
    with_caches = accelerator.used_bytes
    with Checkpoint.open(folder) as checkpoint:
        load_weights(spec, checkpoint, placement, accelerator)
    num_weight_bytes = accelerator.used_bytes - with_caches
    need = needs(spec, placement, WAVE, machine)
    assert with_caches - num_weight_bytes == need["gpu"].kv_bytes
    assert len(engine.scheduler.pools.decode) == 2


@pytest.mark.parametrize("kv_on_cpu", [False, True])
@pytest.mark.parametrize("more_blocks", [0, 50])
def test_the_planned_sequences_run_in_the_planned_sub_batches(
    folder: Path, accelerator: EmulatedAccelerator, kv_on_cpu: bool, more_blocks: int
) -> None:
    """Three and three, however much room there is for the first; fewer are all on the GPU."""
    spec = read_model_spec(find_model(str(folder)))
    placement = sub_batches(spec, kv_on_cpu=kv_on_cpu, chunk_tokens=64)
    planned = kv_blocks(placement, WAVE)
    blocks = KVBlocks(
        first=planned.first + more_blocks,
        second=planned.second,
        prompts=planned.prompts + more_blocks,
    )
    engine = make_engine(folder, spec, placement, accelerator, blocks)
    for count, expected in ((6, {(3, 3)}), (3, {(2, 1)} if kv_on_cpu else {(3, 0)})):
        for number in range(count):
            engine.add_request(str(number), PROMPTS[4], GREEDY)
        found, finished = set[tuple[int, int]](), list[Sequence]()
        while (result := engine.step()) is not None:
            finished += result.finished
            if result.batch.phase == "decode":
                second = result.batch.shape.num_second_seqs or 0
                found.add((len(result.batch.items) - second, second))
        assert found == expected
        for sequence in finished:
            engine.release(sequence)
