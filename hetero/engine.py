"""Engine: requests in, tokens out, one step of the plan's graphs at a time."""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from hetero.errors import MemoryBudgetError, RequestError
from hetero.faults import NO_FAULTS, Faults
from hetero.kv_cache import BlockPools, Caches, MovedPages
from hetero.kv_tables import KVTables
from hetero.model.decoder import Decoder, DecoderStep, KVMove, OtherPages, SubBatchSteps
from hetero.model.divided_cache import DividedCacheStep
from hetero.runtime.devices import Accelerator
from hetero.runtime.executor import Executor
from hetero.runtime.expert_slots import SlotCounts
from hetero.runtime.issue_order import runs_by_itself
from hetero.runtime.step_run import Performer, StepRun
from hetero.sampler import (
    SampledToken,
    SamplingParams,
    SamplingRow,
    make_generator,
    sample,
)
from hetero.scheduler import Batch, Scheduler
from hetero.sequence import Sequence
from hetero.tokenizer import IncrementalDetokenizer, StopChecker, Tokenizer
from planner.kv_blocks import KVBlocks
from planner.model_spec import ModelSpec
from planner.placement import Device, Placement, TierPlacement
from planner.step_graph import StepGraph, build_kv_move
from planner.tier_graphs import TierGraphs
from planner.timeline import Timeline
from planner.workload import PHASES, BatchShape, Phase, prompt_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedCache:
    """A sequence's cache that went to where decode wants it, after its prompt had ended."""

    graph: StepGraph
    shape: BatchShape
    timeline: Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEvent:
    """Something that a user should know of, and what was done about it; `time.perf_counter`."""

    at_s: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step did: its batch, when its ops ran, and the sequences that ended with it.

    `seconds` is how long it took in all; `is_beside` whether another step ran at the same time,
    which its ops were not priced with; `events` what happened meanwhile that was not planned.
    """

    batch: Batch
    graph: StepGraph
    timeline: Timeline
    finished: tuple[Sequence, ...]
    seconds: float
    is_beside: bool
    events: tuple[EngineEvent, ...] = ()
    moved: tuple[MovedCache, ...] = ()


@dataclass(slots=True, kw_only=True)
class PhaseTotals:
    """Work of one phase so far. Mutable."""

    num_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """Totals since the engine was made. Mutable: the engine adds each step."""

    phases: dict[Phase, PhaseTotals] = field(
        default_factory=lambda: {phase: PhaseTotals() for phase in PHASES}
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Step:
    """A step that has begun: what it computes, where what it samples is put, what it draws from."""

    batch: Batch
    graph: StepGraph
    run: StepRun
    tokens: Mapping[str, SampledToken]
    generators: list[tuple[torch.Generator, Tensor]]
    begin_s: float


@dataclass(slots=True, kw_only=True)
class _Request:
    """What a running sequence needs beside its tokens. Mutable."""

    sequence: Sequence
    generator: torch.Generator | None
    eos_token_ids: tuple[int, ...]
    detokenizer: IncrementalDetokenizer | None
    stops: StopChecker


class Engine:
    """Runs sequences under a placement.

    Parameters
    ----------
    decoder : Decoder
        The loaded model.
    placement : Placement
        Where everything lives and runs.
    accelerator : Accelerator, optional
        None where the placement uses the CPU only.
    tokenizer : Tokenizer, optional
        Without it text is empty and stop strings are refused.
    eos_token_ids : tuple of int
        Tokens that end a sequence.
    kv_blocks : KVBlocks
        Blocks of the KV caches.
    max_num_seqs, max_model_len : int
        Most sequences of a step; most tokens of a sequence.
    overlap : bool
        False runs one op at a time: the reference for the overlapped run.
    faults : Faults
        What is to fail; nothing in a usual run.
    """

    def __init__(
        self,
        *,
        decoder: Decoder,
        placement: Placement,
        accelerator: Accelerator | None,
        tokenizer: Tokenizer | None,
        eos_token_ids: tuple[int, ...],
        kv_blocks: KVBlocks,
        max_num_seqs: int,
        max_model_len: int,
        overlap: bool = True,
        faults: Faults = NO_FAULTS,
    ) -> None:
        self.stats = EngineStats()
        self._tried_again: Batch | None = None  # for want of memory
        self._events: list[EngineEvent] = []  # since the last step that was returned
        self._faults = faults
        self.last_step: StepResult | None = None
        self._decoder = decoder
        self._placement = placement
        self._accelerator = accelerator
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._graphs = TierGraphs(decoder.spec, placement)
        self._kv_tables = KVTables.create(placement, kv_blocks)
        self._kv_moves = [
            build_kv_move(placement.prefill, placement.decode, sub_batch=number)
            for number in _sub_batches(placement)
        ]
        self._executor = Executor(accelerator.lanes if accelerator else {}, overlap=overlap)
        self._caches = _allocate_kv(decoder.spec, placement, accelerator, kv_blocks)
        self.scheduler = Scheduler(
            blocks=BlockPools.create(placement, kv_blocks),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=placement.prefill.max_num_tokens,
            max_model_len=max_model_len,
            max_first_seqs=max_num_seqs - placement.decode.num_second_seqs,
        )
        self._requests: dict[str, _Request] = {}
        # A prefill step of the accelerator's, beside which decode steps run on the CPU.
        self._on_its_way: _Step | None = None
        decode_tiers = (tier for tier in placement.tiers if tier.phase == "decode")
        self._by_itself: dict[int, bool] = {}  # by the identity of a graph that is kept
        self._decodes_beside = overlap and not any(tier.uses("gpu") for tier in decode_tiers)
        if accelerator is not None:
            # What was put there so far was put there outside the lanes.
            accelerator.synchronize()

    @property
    def spec(self) -> ModelSpec:
        return self._decoder.spec

    @property
    def slot_counts(self) -> Mapping[int, SlotCounts]:
        """By split layer, what its steps found in expert slots and copied; a snapshot."""
        return self._decoder.weights.expert_slots.counts()

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def add_request(
        self, seq_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> Sequence:
        """Queue a request.

        Raises
        ------
        RequestError
            An empty or too long prompt, a token id outside the vocabulary, stop strings without a
            tokenizer, a request that the KV cache can never hold.
        """
        self._check_tokens(prompt_token_ids)
        if self._tokenizer is None and params.stop_strings:
            raise RequestError(
                "stop strings need a tokenizer and the model folder has no tokenizer.json; "
                "use stop_token_ids"
            )
        sequence = Sequence(seq_id=seq_id, prompt_token_ids=prompt_token_ids, params=params)
        detokenizer = None
        if self._tokenizer is not None:
            detokenizer = IncrementalDetokenizer(
                self._tokenizer, prompt_token_ids, skip_special_tokens=params.skip_special_tokens
            )
        request = _Request(
            sequence=sequence,
            generator=make_generator(params),
            eos_token_ids=() if params.ignore_eos else self._eos_token_ids,
            detokenizer=detokenizer,
            stops=StopChecker(params.stop_strings, params.include_stop_str_in_output),
        )
        self.scheduler.add(sequence)
        self._requests[seq_id] = request
        return sequence

    def warm_up(self) -> None:
        """Run one short request and forget it.

        The first step of a process compiles or loads kernels and makes the library set itself up,
        which is no part of what a step costs.
        """
        if self.scheduler.max_model_len < 3:
            return
        params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        sequence = self.add_request("warm-up", [0], params)
        while self.step() is not None:
            pass
        self.release(sequence)
        self.stats, self.last_step = EngineStats(), None
        self._decoder.weights.expert_slots.forget_counts()

    def text(self, sequence: Sequence) -> str:
        """Text that a request has so far and that no stop string can take back."""
        request = self._requests[sequence.seq_id]
        return request.stops.final_text if sequence.is_finished else request.stops.visible_text

    def release(self, sequence: Sequence) -> None:
        """Forget a finished request."""
        assert sequence.is_finished
        del self._requests[sequence.seq_id]

    def abort_all(self) -> None:
        """End every unfinished request and forget it."""
        # Nothing of a step on its way is wanted any more, but lanes still write its pages.
        self._executor.abandon()
        self._on_its_way = None
        self.scheduler.hold(None)
        for seq_id in list(self._requests):
            self.scheduler.abort(seq_id)
            del self._requests[seq_id]

    def step(self) -> StepResult | None:
        """Run one step to its end; None when nothing is unfinished.

        Where decode is the CPU's alone, a prefill step that the accelerator does by itself begins,
        and decode steps of other sequences run and are returned until it has ended.

        A step for which memory does not suffice is run again with fewer tokens, and no later one
        has more (`StepResult.events` says so). What it had computed is overwritten.

        Raises
        ------
        MemoryBudgetError
            Memory does not suffice for the smallest step either.
        Exception
            What an op raised; nothing of the step is kept.
        """
        if self._on_its_way is not None:
            beside = None if self._on_its_way.run.is_ready else self.scheduler.schedule_beside()
            return self._land() if beside is None else self._run(beside, is_beside=True)
        batch = self.scheduler.schedule()
        return None if batch is None else self._run(batch, is_beside=False)

    def _run(self, batch: Batch, *, is_beside: bool) -> StepResult:
        """Run a step, or a smaller one in its place."""
        while True:
            try:
                step = self._begin(batch)
                if not self._goes_by_itself(step):
                    return self._finish(step, is_beside=is_beside)
                self._on_its_way = step
                self.scheduler.hold(batch)
            except torch.OutOfMemoryError as error:
                # Its traceback holds the tensors of the step: memory is free after this block only.
                problem = str(error)
            else:
                found = self.step()
                assert found is not None, "sequences decode beside the step that has begun"
                return found
            batch = self._instead_of(batch, problem)

    def _instead_of(self, batch: Batch, problem: str) -> Batch:
        """What to compute in place of a step for which memory did not suffice.

        A smaller one; the smallest is tried once more, now that what was kept has been given back.
        """
        if self._accelerator is not None:
            self._accelerator.trim()
        num_tokens, smaller = batch.shape.num_tokens, self.scheduler.cut(batch)
        step = f"a {batch.phase} step of {num_tokens} token{'s' * (num_tokens > 1)}"
        if smaller is None:
            if self._tried_again is batch:
                raise MemoryBudgetError(
                    f"{step} ran out of memory ({problem}); plan with a smaller --gpu-mem-gb, or "
                    "fewer or shorter sequences"
                )
            self._tried_again = smaller = batch
            done = "it was tried again"
        else:
            what = "tokens" if batch.phase == "prefill" else "sequences"
            done = f"no more than {smaller.shape.num_tokens} {what} a step from now on"
        event = EngineEvent(at_s=time.perf_counter(), text=f"{step} ran out of memory: {done}")
        self._events.append(event)
        return smaller

    def _goes_by_itself(self, step: _Step) -> bool:
        """May decode steps run beside this one, and are there any sequences for them?"""
        if not self._decodes_beside or step.batch.phase == "decode" or self._accelerator is None:
            return False
        if id(step.graph) not in self._by_itself:
            self._by_itself[id(step.graph)] = runs_by_itself(step.graph)
        return self._by_itself[id(step.graph)] and self.scheduler.decodes_beside(step.batch)

    def _land(self) -> StepResult:
        """Finish the prefill step that is on its way."""
        step = self._on_its_way
        assert step is not None
        self._on_its_way = None
        self.scheduler.hold(None)
        try:
            return self._finish(step, is_beside=True)
        except torch.OutOfMemoryError as error:
            problem = str(error)
        return self._run(self._instead_of(step.batch, problem), is_beside=False)

    def _begin(self, batch: Batch) -> _Step:
        """Begin a step: all that other lanes do of it before they need this thread again."""
        begin_s = time.perf_counter()
        parts = self._parts(batch)
        tier, graph = self._graphs.find(batch.phase, batch.shape.num_tokens, tuple(parts))
        tokens: dict[str, SampledToken] = {}
        generators: list[tuple[torch.Generator, Tensor]] = []
        steps = [
            self._step_of(number, part, tier, tokens, generators) for number, part in parts.items()
        ]
        step = steps[0] if len(steps) == 1 else SubBatchSteps(*steps)
        performer = self._faults.performer(
            Performer(step.perform, step.perform_run, step.perform_until)
        )
        with torch.inference_mode(), _restoring(generators):
            run = self._executor.start(graph, performer)
        return _Step(
            batch=batch,
            graph=graph,
            run=run,
            tokens=tokens,
            generators=generators,
            begin_s=begin_s,
        )

    def _finish(self, step: _Step, *, is_beside: bool) -> StepResult:
        """Wait for a step, and record what it sampled."""
        batch = step.batch
        with torch.inference_mode(), _restoring(step.generators):
            timeline = step.run.finish()
        # First tokens are there now; moving the cache is the beginning of decode.
        sampled = [step.tokens[sequence.seq_id] for sequence in batch.sampled]
        self.scheduler.advance(batch, [token.token_id for token in sampled])
        finished = self._settle(batch, sampled)
        moved = self._move_kv(batch)
        seconds = time.perf_counter() - step.begin_s
        totals = self.stats.phases[batch.phase]
        totals.num_steps += 1
        totals.num_tokens += batch.num_phase_tokens
        totals.seconds += seconds
        self.last_step = StepResult(
            batch=batch,
            graph=step.graph,
            timeline=timeline,
            finished=tuple(finished),
            seconds=seconds,
            is_beside=is_beside,
            events=tuple(self._events),
            moved=moved,
        )
        self._events.clear()
        return self.last_step

    def _parts(self, batch: Batch) -> Mapping[int, Batch]:
        """What each sub-batch computes in a step, by its number; a prefill step has but one."""
        if batch.phase == "prefill":
            return {0: batch}
        parts = {number: batch.part(number) for number in _sub_batches(self._placement)}
        return {number: part for number, part in parts.items() if part is not None}

    def _step_of(
        self,
        sub_batch: int,
        batch: Batch,
        tier: TierPlacement,
        tokens: dict[str, SampledToken],
        generators: list[tuple[torch.Generator, Tensor]],
    ) -> DecoderStep:
        """What performs the ops of a sub-batch.

        Its tokens are added to `tokens` by sequence, and to `generators` what gave them, each with
        its state before.
        """
        rows = [self._sampling_row(sequence) for sequence in batch.sampled]
        names = [sequence.seq_id for sequence in batch.sampled]

        def pick(logits_LV: Tensor) -> None:
            drawn = [row.generator for row in rows if row.generator is not None]
            generators.extend((each, each.get_state()) for each in drawn)
            logits_LV = self._faults.logits(logits_LV)
            tokens.update(zip(names, sample(logits_LV, rows), strict=True))

        is_prefill, tables = batch.phase == "prefill", self._kv_tables
        others = tables.of_prompts() if is_prefill else ()
        return DecoderStep(
            self._decoder,
            tier,
            self._caches.prefill if is_prefill else self._caches.decode[sub_batch],
            batch.tensors(),
            pick,
            sub_batch,
            others=[
                OtherPages(layers=layers, batch=batch.tensors_in(table)) for layers, table in others
            ],
            divided=self._divided_step(batch) if tables.divided and not is_prefill else None,
        )

    def _divided_step(self, batch: Batch) -> DividedCacheStep:
        """What layers share whose caches are divided."""
        return DividedCacheStep(
            self.spec,
            num_front_tokens=self._placement.decode.num_gpu_kv_tokens,
            fronts=self._caches.fronts,
            rest=self._kv_tables.rest_rows(batch),
        )

    def _check_tokens(self, token_ids: Collection[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self.spec.vocab_size:
                raise RequestError(
                    f"the prompt has token id {token_id} but the model knows "
                    f"0..{self.spec.vocab_size - 1}"
                )

    def _sampling_row(self, sequence: Sequence) -> SamplingRow:
        request = self._requests[sequence.seq_id]
        return SamplingRow(
            params=sequence.params,
            generator=request.generator,
            num_output_tokens=sequence.num_output_tokens,
            eos_token_ids=request.eos_token_ids,
        )

    def _move_kv(self, batch: Batch) -> tuple[MovedCache, ...]:
        """Take the caches of prompts that ended in a step to where decode wants them."""
        moved = []
        for sequence in (item.sequence for item in batch.items):
            if not sequence.must_move:
                continue
            moved.append(self._moved(sequence))
            self.scheduler.leave_prompt_pages(sequence)
        return tuple(moved)

    def _moved(self, sequence: Sequence) -> MovedCache:
        """Move a sequence's cache; once more where memory did not suffice.

        Its step is recorded by now: that is not run again.
        """
        assert self._accelerator is not None
        graph = self._kv_moves[sequence.sub_batch]
        move = KVMove(self._accelerator, partial(self._moved_pages, sequence))
        performer = self._faults.performer(Performer(move.perform))
        problem = ""
        for _ in range(2):
            try:
                with torch.inference_mode():
                    timeline = self._executor.start(graph, performer).finish()
            except torch.OutOfMemoryError as error:
                problem = str(error)  # see `_run`
            else:
                shape = prompt_shape(sequence.num_computed_tokens)
                return MovedCache(graph=graph, shape=shape, timeline=timeline)
            self._accelerator.trim()
        raise MemoryBudgetError(
            f"moving the cache of a prompt of {sequence.num_computed_tokens} tokens ran out of "
            f"memory ({problem}); plan with a smaller --gpu-mem-gb, or shorter sequences"
        )

    def _moved_pages(self, sequence: Sequence, layer: int) -> MovedPages:
        return self._kv_tables.moved_pages(self._caches, layer, sequence)

    def _settle(self, batch: Batch, sampled: list[SampledToken]) -> list[Sequence]:
        """Record what was sampled and end the sequences that are complete."""
        finished = []
        for sequence, token in zip(batch.sampled, sampled, strict=True):
            if self._is_over(sequence, token):
                finished.append(sequence)
        return finished

    def _is_over(self, sequence: Sequence, token: SampledToken) -> bool:
        request, finish = self._requests[sequence.seq_id], self.scheduler.finish
        if token.error is not None or token.token_id is None:
            self._clear_pages(sequence)
            finish(sequence, "error", token.error)
            return True
        if token.top_logprobs is not None:
            assert token.logprob is not None
            chosen = {token.token_id: token.logprob}
            sequence.output_logprobs.append(chosen | dict(token.top_logprobs))
        is_eos = token.token_id in request.eos_token_ids
        is_stop = is_eos or token.token_id in sequence.params.stop_ids
        if not is_stop and request.detokenizer is not None:
            self._show(request, request.detokenizer.append([token.token_id]))
        is_last = sequence.num_tokens >= self.scheduler.token_limit(sequence)
        if (is_stop or is_last) and request.detokenizer is not None:
            self._show(request, request.detokenizer.flush())
        if request.stops.stop is not None:
            finish(sequence, "stop", request.stops.stop)
        elif is_stop:
            finish(sequence, "stop", None if is_eos else token.token_id)
        elif is_last:
            finish(sequence, "length")
        return sequence.is_finished

    def _show(self, request: _Request, text: str) -> None:
        """Add text; before `min_tokens` no stop string counts."""
        is_early = request.sequence.num_output_tokens < request.sequence.params.min_tokens
        request.stops.append(text, may_stop=not is_early)

    def _clear_pages(self, sequence: Sequence) -> None:
        """Zero a sequence's cache: a NaN in a reused page would survive the mask of its reader."""
        with torch.inference_mode():
            for layer, pages in self._kv_tables.pages(self._caches, sequence):
                layer.key[pages] = 0
                layer.value[pages] = 0
        if self._accelerator is not None:
            self._accelerator.synchronize()


@contextlib.contextmanager
def _restoring(generators: list[tuple[torch.Generator, Tensor]]) -> Iterator[None]:
    """Give generators back the states that they had, if a step fails after it has drawn from them.

    Of two sub-batches one may have sampled when the other fails.
    """
    try:
        yield
    except BaseException:
        for generator, state in reversed(generators):
            generator.set_state(state)
        generators.clear()
        raise


def _sub_batches(placement: Placement) -> tuple[int, ...]:
    """Numbers of the sub-batches that a placement's decode steps may have."""
    return (0, 1) if placement.decode.num_second_seqs else (0,)


def _allocate_kv(
    spec: ModelSpec, placement: Placement, accelerator: Accelerator | None, blocks: KVBlocks
) -> Caches:
    """The caches of a placement, each in the memory of its device."""

    def empty(device: Device, num_bytes: int) -> Tensor:
        # Zeroed: pads of a block table are read and then masked, and a NaN survives a mask.
        if device == "cpu":
            # Pages of a fresh mapping are zero and take no memory until they are written.
            return torch.frombuffer(mmap.mmap(-1, max(1, num_bytes)), dtype=torch.uint8)[:num_bytes]
        assert accelerator is not None
        return accelerator.allocate(num_bytes, "the KV cache").zero_()

    return Caches.allocate(spec, placement, blocks, empty)
