"""What Python costs, by running the engine: a step beside its ops, an op beside its kernels,
embedding and sampling.

Weights that are larger than the caches drive the interpreter's code and data out of them, so the
caches are emptied before each step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hetero.checkpoint import Checkpoint
from hetero.engine import Engine, StepResult
from hetero.measure.cold_memory import ColdMemory
from hetero.measure.timing import Timing
from hetero.model.decoder import Decoder
from hetero.model_lookup import ModelSource, read_model_spec
from hetero.runtime.weights import load_weights
from hetero.sampler import SamplingParams
from planner.device import Sample
from planner.kernels import Kernel
from planner.kv_blocks import KVBlocks
from planner.step_graph import OpKind
from planner.strategies import placement
from planner.workload import Phase

_NUM_STEPS = 6
_KV_BLOCKS = KVBlocks(first=64)
# Ops that a prefill step calls one by one, where a decode step has one chain.
_OWN_OPS: frozenset[OpKind] = frozenset(
    {"attention", "router", "experts", "combine", "dense", "head"}
)
# Ops that are Python for the most part, which weights have driven from the caches.
_COLD_OPS: tuple[Literal["embed", "sample"], ...] = ("embed", "sample")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """Seconds of a step: all of it, from its first op to its last, and of single ops."""

    phase: Phase
    wall_s: float
    ops_s: float
    num_ops: int
    op_s: dict[OpKind, float]


def host_samples(
    memory: ColdMemory,
    source: ModelSource,
    *,
    num_threads: int,
    num_seqs: tuple[int, ...] = (1, 4, 16),
) -> tuple[Sample, ...]:
    """Measure decode steps of a small model, by sequences, and prefill steps of one token."""
    assert source.folder is not None
    spec = read_model_spec(source)
    where = placement(spec, "cpu", 0)
    with Checkpoint.open(source.folder) as checkpoint:
        weights = load_weights(spec, checkpoint, where, None)
    engine = Engine(
        decoder=Decoder.create(spec, weights, None, num_threads=num_threads),
        placement=where,
        accelerator=None,
        tokenizer=None,
        eos_token_ids=(),
        kv_blocks=_KV_BLOCKS,
        max_num_seqs=max(num_seqs),
        max_model_len=_NUM_STEPS + 4,
    )
    engine.warm_up()
    samples: list[Sample] = []
    for count in num_seqs:
        steps = _run(engine, count, memory, num_threads)
        decode = [step for step in steps if step.phase == "decode"]
        found = Timing.of([max(1e-9, step.wall_s - step.ops_s) for step in decode])
        samples.append(_sample("step", found, num_threads, num_seqs=count))
        for kind in _COLD_OPS:
            found = Timing.of([step.op_s[kind] for step in decode])
            shape = () if kind == "embed" else (spec.vocab_size,)
            samples.append(_sample(kind, found, num_threads, num_seqs=count, shape=shape))
        if count == 1:
            # a prompt of one token does what a decode step does, an op at a time
            prefill = [step for step in steps if step.phase == "prefill"]
            chained_s = float(np.median([step.ops_s for step in decode]))
            found = Timing.of(
                [max(1e-9, (step.ops_s - chained_s) / step.num_ops) for step in prefill]
            )
            samples.append(_sample("op", found, num_threads))
    return tuple(samples)


def _sample(
    kernel: Kernel,
    found: Timing,
    num_threads: int,
    num_seqs: int = 1,
    shape: tuple[int, ...] = (),
) -> Sample:
    return Sample(
        lane="cpu",
        kernel=kernel,
        backend="torch",
        shape=shape,
        num_tokens=num_seqs if kernel == "embed" else 1,
        num_seqs=1 if kernel == "embed" else num_seqs,
        num_threads=num_threads,
        seconds=found.seconds,
        spread=found.spread,
    )


def _run(engine: Engine, num_seqs: int, memory: ColdMemory, num_threads: int) -> list[_Step]:
    """Run sequences of one prompt token, the caches emptied before each step."""
    params = SamplingParams(max_tokens=_NUM_STEPS, temperature=0.0, ignore_eos=True)
    found: list[_Step] = []
    for turn in range(3 if num_seqs == 1 else 1):
        running = [
            engine.add_request(f"{num_seqs}-{turn}-{index}", [index + 1], params)
            for index in range(num_seqs)
        ]
        while True:
            memory.displace_caches(num_threads)
            begin_s = time.perf_counter()
            result = engine.step()
            wall_s = time.perf_counter() - begin_s
            if result is None:
                break
            found.append(_step(result, wall_s))
        for sequence in running:
            engine.release(sequence)
    return found


def _step(result: StepResult, wall_s: float) -> _Step:
    return _Step(
        phase=result.batch.phase,
        wall_s=wall_s,
        ops_s=result.timeline.makespan_s,
        num_ops=sum(op.kind in _OWN_OPS for op in result.graph.ops),
        op_s={span.op.kind: span.seconds for span in result.timeline.spans},
    )
