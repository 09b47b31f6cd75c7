"""Scheduler: which sequences run in the next step, and which blocks their tokens go to."""

# T new tokens, S sequences, B blocks of the longest sequence, L rows that reach the head

from __future__ import annotations

import time
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from hetero.errors import RequestError
from hetero.kv_cache import BLOCK_SIZE, BlockPools
from hetero.model.batch import BatchTensors
from hetero.sequence import FinishReason, Sequence
from planner.kv_blocks import num_blocks_for
from planner.workload import BatchShape, Phase

_CPU = torch.device("cpu")
# No prefill step is made smaller than this, which takes no more memory than a decode step.
MIN_BATCHED_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledSequence:
    """A sequence's share of one step: `num_tokens` tokens after `num_past_tokens` cached ones.

    `has_logits` is true where the share ends with the sequence's last token, so that the step
    samples its next one. `phase` is decode where it only goes on by a token, also in a step that
    prefills others. All facts are as scheduled: the sequence moves on.
    """

    sequence: Sequence
    phase: Phase
    num_tokens: int
    num_past_tokens: int
    has_logits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one step computes; a prefill step may take sequences that decode along."""

    phase: Phase
    items: tuple[ScheduledSequence, ...]

    @property
    def num_phase_tokens(self) -> int:
        """Tokens of the step's own phase, without those of sequences that are taken along."""
        return sum(item.num_tokens for item in self.items if item.phase == self.phase)

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """The sequences that get a token in this step, in the order of the rows of logits."""
        return tuple(item.sequence for item in self.items if item.has_logits)

    @property
    def shape(self) -> BatchShape:
        """The size of the step, by which the planner prices it."""
        num_tokens = sum(item.num_tokens for item in self.items)
        # Weighted by the tokens that see it, as in planner.workload.prefill_shapes.
        past = sum(item.num_tokens * item.num_past_tokens for item in self.items)
        is_decode = self.phase == "decode"
        num_second_seqs = sum(item.sequence.sub_batch for item in self.items if is_decode)
        return BatchShape(
            phase=self.phase,
            num_tokens=num_tokens,
            num_seqs=len(self.items),
            num_past_tokens=past / num_tokens,
            num_logits=sum(item.has_logits for item in self.items),
            num_second_seqs=num_second_seqs or None,
        )

    def part(self, number: int) -> Batch | None:
        """The share of one sub-batch; None where the step has none of its sequences."""
        items = tuple(item for item in self.items if item.sequence.sub_batch == number)
        return replace(self, items=items) if items else None

    def tensors(self, device: torch.device = _CPU) -> BatchTensors:
        """The indices of the step, in the pages that its sequences decode from.

        Call it before `Scheduler.advance`: a sequence that ends has no blocks.
        """
        return self._tensors([item.sequence.block_table for item in self.items], device)

    def prompt_tensors(self, device: torch.device = _CPU) -> BatchTensors:
        """The same in the pages in which prompts are computed whose cache moves when they end."""
        return self.tensors_in(lambda each: each.prompt_table or each.block_table, device)

    def tensors_in(
        self, table: Callable[[Sequence], list[int]], device: torch.device = _CPU
    ) -> BatchTensors:
        """The same in the pages that a table gives for a sequence, by their position in it."""
        return self._tensors([table(item.sequence) for item in self.items], device)

    def _tensors(self, block_tables: list[list[int]], device: torch.device) -> BatchTensors:
        counts_S = np.array([item.num_tokens for item in self.items])
        past_S = np.array([item.num_past_tokens for item in self.items])
        starts = np.concatenate(([0], counts_S.cumsum()))
        # A table may be longer than what is in it by now.
        tables = [
            table[: num_blocks_for(item.num_past_tokens + item.num_tokens)]
            for table, item in zip(block_tables, self.items, strict=True)
        ]
        tables_SB = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
        for row, table in zip(tables_SB, tables, strict=True):
            row[: len(table)] = table
        token_ids_T = np.concatenate(
            [
                item.sequence.token_ids[item.num_past_tokens :][: item.num_tokens]
                for item in self.items
            ]
        )
        rows_T = np.repeat(np.arange(len(tables)), counts_S)
        positions_T = np.arange(starts[-1]) + np.repeat(past_S - starts[:-1], counts_S)
        blocks_T = tables_SB[rows_T, positions_T // BLOCK_SIZE].astype(np.int64)
        has_logits_S = np.array([item.has_logits for item in self.items])
        return BatchTensors(
            phase=self.phase,
            token_ids_T=torch.from_numpy(token_ids_T),
            positions_T=torch.from_numpy(positions_T),
            slots_T=torch.from_numpy(blocks_T * BLOCK_SIZE + positions_T % BLOCK_SIZE),
            block_tables_SB=torch.from_numpy(tables_SB),
            context_lens_S=torch.from_numpy((past_S + counts_S).astype(np.int32)),
            logit_rows_L=torch.from_numpy((starts[1:] - 1)[has_logits_S]),
            query_starts=tuple(starts.tolist()),
            past_lens=tuple(past_S.tolist()),
        ).to(device)


class Scheduler:
    """Chooses the sequences of each step. Mutable.

    Every step runs one phase's graph, and every choice follows the order of `add`:

    - Prefill goes first: while prompts wait, steps of up to `max_num_batched_tokens` prompt tokens
      are made. A prompt that does not end in a step goes on in the next one, before any other
      prompt starts; so at most one is part-way. A prompt starts when fewer than `max_num_seqs`
      sequences run and the free blocks hold all of it; no other prompt overtakes it.
    - Otherwise every running sequence decodes one token. So prompts that arrive together are all
      prefilled before the first decode step.
    - Once sequences decode, a prefill step takes all of them along by a token each, where their
      caches are in the pages in which prompts are computed: it reads the same weights.
    - Elsewhere a sequence is late if some other was decoding when it was added. After a prefill
      step, and while any sequence decodes, the next late prompt lets one decode step go first.
      Either way an endless stream of new prompts cannot hold up a decoding sequence for more than
      one step.
    - Where memory does not suffice for a step (`cut`), half of it is computed, and no later step of
      its phase is larger; of more sequences than a decode step may have, all have their turns.
    - While a prefill step is on its way on the accelerator (`hold`), the other sequences may decode
      (`schedule_beside`); those of it keep their blocks.
    - Of two sub-batches a sequence joins the first that has room for all it may come to, else the
      first that has room for what it has now.
    - When a decode step lacks a block, the running sequence of that sub-batch added last gives back
      its blocks and waits again, before all that were added later; its prompt and output so far are
      prefilled again later, in either sub-batch.
    - A sequence that grows beyond the pages in which prompts are computed cannot be prefilled
      again. With the last block before that it gets the blocks of all it may come to, and never
      gives way. The others lack blocks only until some of those end, and the oldest of the others
      gives way to none of the younger ones: so all of them finish.

    A step goes `batch = schedule()`, compute, `advance(batch, tokens)`, then `finish` for each
    sequence that ends, and `leave_prompt_pages` for each other that `must_move`. `finish` and
    `abort` give the blocks back at once: call them between steps.

    Parameters
    ----------
    blocks : BlockPools
        Where KV blocks come from.
    max_num_seqs : int
        Most sequences that hold blocks at a time; the size of the largest decode step.
    max_num_batched_tokens : int
        Most tokens of a prefill step. This and `max_decode_seqs`, most sequences of a decode step,
        become smaller with `cut`.
    max_model_len : int
        Most tokens of a sequence, prompt and output.
    clock : callable
        The time, in seconds, that sequences are stamped with.
    """

    def __init__(
        self,
        *,
        blocks: BlockPools,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_first_seqs: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        assert min(max_num_seqs, max_num_batched_tokens) >= 1
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_decode_seqs = max_num_seqs
        self.max_first_seqs = max_num_seqs if max_first_seqs is None else max(1, max_first_seqs)
        self.pools = blocks
        self._clock = clock
        # Both in the order of `add`.
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._unfinished: dict[str, Sequence] = {}
        self._numbers: dict[str, int] = {}  # in that order
        self._num_added = 0
        self._late: set[str] = set()
        self._is_decode_due = False
        self._held: frozenset[str] = frozenset()
        self._last_turn = -1  # number of the last sequence of a decode step that had not all
        self._last_prefilled: Sequence | None = None  # of a step, only the last can be part-way

    @property
    def has_unfinished(self) -> bool:
        return bool(self._unfinished)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def token_limit(self, sequence: Sequence) -> int:
        """Most tokens, prompt and output, that a sequence may come to."""
        if sequence.params.max_tokens is None:
            return self.max_model_len
        return min(self.max_model_len, sequence.num_prompt_tokens + sequence.params.max_tokens)

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait for its turn.

        Raises
        ------
        RequestError
            Its prompt is empty or leaves no room under `max_model_len`, its blocks could never be
            free at one time, or its `seq_id` is in use.
        """
        self._check(sequence)
        if any(not other.is_prefill for other in self._running):
            self._late.add(sequence.seq_id)
        self._unfinished[sequence.seq_id] = sequence
        self._numbers[sequence.seq_id] = self._num_added
        self._num_added += 1
        self._waiting.append(sequence)

    def _check(self, sequence: Sequence) -> None:
        num_prompt_tokens = sequence.num_prompt_tokens
        if sequence.seq_id in self._unfinished:
            raise RequestError(f"request id {sequence.seq_id!r} is in use; give each its own")
        if num_prompt_tokens == 0:
            raise RequestError("the prompt has no tokens but generation needs at least 1")
        if num_prompt_tokens >= self.max_model_len:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens but the model's limit is "
                f"{self.max_model_len} with at least 1 to generate; shorten the prompt"
            )
        num_slots = self._num_slots(sequence)
        capacity = self.pools.max_num_tokens
        if num_slots > capacity:
            room = capacity + 1 - num_prompt_tokens
            lower = f"lower max_tokens to {room} or less, " if room > 0 else "shorten the prompt, "
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens and max_tokens is "
                f"{sequence.params.max_tokens}, which needs the KV cache to hold {num_slots} "
                f"tokens but it holds {capacity}; {lower}or give the KV cache more memory"
            )
        if not self._fitting(sequence, num_prompt_tokens):
            prompts = self.pools.prompts
            assert prompts is not None
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens but the part of the KV cache in which "
                f"prompts are computed holds {self.pools.max_prompt_tokens}; shorten the "
                "prompt, or plan for prompts of its length"
            )

    def _num_slots(self, sequence: Sequence) -> int:
        """Most tokens that a sequence may have in the cache: the last one is never fed."""
        return self.token_limit(sequence) - 1

    def _fitting(self, sequence: Sequence, num_prefilled: int) -> list[int]:
        """Sub-batches that could hold a sequence to its end and prefill so many tokens of it."""
        num_slots = self._num_slots(sequence)
        return [
            number
            for number in range(len(self.pools.decode))
            if self.pools.fits(number, num_tokens=num_slots, num_prefilled=num_prefilled)
        ]

    def _stays(self, sequence: Sequence, num_blocks: int) -> bool:
        """Could a sequence with so many blocks be too long to be prefilled again, once they fill?

        Then it has the blocks of all it may come to, and never gives way.
        """
        if self.pools.prompts is None:
            return False
        # With all slots of its blocks in use it has one token more, which is not fed yet.
        num_prefilled = min(num_blocks * BLOCK_SIZE + 1, self._num_slots(sequence))
        return not self._fitting(sequence, num_prefilled)

    def _num_needed(self, sequence: Sequence, num_cached: int) -> int:
        """Blocks that a sequence has to have with so many tokens in the cache."""
        needed = num_blocks_for(num_cached)
        if not self._stays(sequence, needed):
            return needed
        return num_blocks_for(self._num_slots(sequence))

    def schedule(self) -> Batch | None:
        """The next step, its blocks allocated; None when nothing is unfinished."""
        if not self._unfinished:
            return None
        if self._takes_along():
            along = self._decode_items()
            items = self._prefill_items(self.max_num_batched_tokens - len(along))
            return self._batch("prefill" if items else "decode", along + items)
        if not self._must_decode():
            items = self._prefill_items(self.max_num_batched_tokens)
            if items:
                self._is_decode_due = True
                return self._batch("prefill", items)
        self._is_decode_due = False
        items = self._decode_items()
        if items:
            return self._batch("decode", items)
        # All that decode gave way: a prompt that is part-way goes on.
        return self._batch("prefill", self._prefill_items(self.max_num_batched_tokens))

    def hold(self, batch: Batch | None) -> None:
        """The sequences of a step that is on its way keep their blocks; None: it has ended."""
        items = () if batch is None else batch.items
        self._held = frozenset(item.sequence.seq_id for item in items)

    def decodes_beside(self, batch: Batch) -> bool:
        """Do sequences decode that are not of this prefill step?"""
        own = {item.sequence.seq_id for item in batch.items}
        return any(not each.is_prefill and each.seq_id not in own for each in self._running)

    def schedule_beside(self) -> Batch | None:
        """A decode step of the sequences that are not held; None where there is none."""
        items = self._decode_items()
        return self._batch("decode", items) if items else None

    def cut(self, batch: Batch) -> Batch | None:
        """Half of a step for which memory did not suffice; None where it is the smallest.

        The others' turn comes later, and no later step of its phase is larger than this one.
        """
        if batch.phase == "decode":
            return self._cut_decode(batch)
        room = batch.shape.num_tokens // 2
        if room < MIN_BATCHED_TOKENS:
            return None
        self.max_num_batched_tokens = room
        items: list[ScheduledSequence] = []
        for item in batch.items:
            num_tokens = min(room, item.num_tokens)
            room -= num_tokens
            if num_tokens:
                items.append(_share(item.sequence, item.phase, num_tokens))
            elif item.phase == "prefill":
                # Only one prompt may be part-way.
                self._wait_again(item.sequence)
        prefilled = [item.sequence for item in items if item.phase == "prefill"]
        self._last_prefilled = prefilled[-1] if prefilled else None
        return replace(batch, items=tuple(items))

    def _cut_decode(self, batch: Batch) -> Batch | None:
        if len(batch.items) == 1:
            return None
        self.max_decode_seqs = len(batch.items) // 2
        self._last_turn = self._numbers[batch.items[self.max_decode_seqs - 1].sequence.seq_id]
        return replace(batch, items=batch.items[: self.max_decode_seqs])

    def _batch(self, phase: Phase, items: list[ScheduledSequence]) -> Batch:
        assert items, "sequences are unfinished but none can run"
        now_s = self._clock()
        for item in items:
            if item.sequence.first_scheduled_s is None:
                item.sequence.first_scheduled_s = now_s
        return Batch(phase=phase, items=tuple(items))

    def _takes_along(self) -> bool:
        """Whether sequences decode whose caches are where prompts are computed.

        One with a single token has not begun to: others of its kind may still be prefilled.
        """
        if self.pools.prompts is not None:
            return False
        decoding = [each for each in self._running if not each.is_prefill]
        has_begun = any(each.num_output_tokens > 1 for each in decoding)
        num_along = min(len(decoding), self.max_decode_seqs)
        return has_begun and num_along < self.max_num_batched_tokens

    def _must_decode(self) -> bool:
        """Whether it is the turn of the decoding sequences, ahead of a late prompt."""
        if not self._is_decode_due or all(sequence.is_prefill for sequence in self._running):
            return False
        following = self._part_way() or (self._waiting[0] if self._waiting else None)
        return following is not None and following.seq_id in self._late

    def _part_way(self) -> Sequence | None:
        """The one running sequence whose prompt is not yet all in the cache."""
        last = self._last_prefilled
        if last is not None and last.status == "running" and last.is_prefill:
            return last
        return None

    def _prefill_items(self, room: int) -> list[ScheduledSequence]:
        """Prompts, or parts of them, of up to so many tokens."""
        items: list[ScheduledSequence] = []
        part_way = self._part_way()
        if part_way is not None:
            num_tokens = min(room, part_way.num_tokens - part_way.num_computed_tokens)
            if not self._grow(part_way, num_tokens):
                return []
            items.append(_share(part_way, "prefill", num_tokens))
            room -= num_tokens
        while room and self._waiting and len(self._running) < self.max_num_seqs:
            sequence = self._waiting[0]
            sub_batch = self._sub_batch_for(sequence)
            if sub_batch is None:
                break
            sequence.sub_batch = sub_batch
            num_tokens = min(room, sequence.num_tokens)
            self._grow(sequence, num_tokens)
            del self._waiting[0]
            self._insert(self._running, sequence)
            sequence.status = "running"
            items.append(_share(sequence, "prefill", num_tokens))
            room -= num_tokens
        if items:
            self._last_prefilled = items[-1].sequence
        return items

    def _sub_batch_for(self, sequence: Sequence) -> int | None:
        """The sub-batch that a waiting sequence joins now; None where it goes on waiting."""
        num_now = num_blocks_for(sequence.num_tokens)
        num_in_all = num_blocks_for(self._num_slots(sequence))
        num_needed = self._num_needed(sequence, sequence.num_tokens)
        pools = self.pools
        counts = [0] * len(pools.decode)
        for each in self._running:
            counts[each.sub_batch] += 1
        # Two whose caches are both on the CPU are as large as each other; one that is on the GPU
        # is filled first, up to what was planned.
        are_alike = len(counts) > 1 and 0 in pools.moving
        with_room = [
            number
            for number in self._fitting(sequence, sequence.num_tokens)
            if pools.has_room(number, 0, num_needed)
            and (number > 0 or are_alike or counts[0] < self.max_first_seqs)
        ]
        if not with_room:
            return None
        if len(with_room) > 1:
            to_the_end = [
                number
                for number in with_room
                if self._num_promised(number) + num_in_all <= pools.decode[number].num_blocks
            ]
            with_room = to_the_end or with_room
        chosen = min(with_room, key=lambda number: counts[number]) if are_alike else with_room[0]
        # Those are free again after a step: it is not worth another sub-batch.
        prompts = pools.prompts_of(chosen)
        num_prompts = pools.num_prompt_blocks(num_now)
        return chosen if prompts is None or num_prompts <= prompts.num_free else None

    def _num_promised(self, sub_batch: int) -> int:
        """Blocks of the running sequences of a sub-batch when each has come to its limit."""
        return sum(
            num_blocks_for(self._num_slots(sequence))
            for sequence in self._running
            if sequence.sub_batch == sub_batch
        )

    def _decode_items(self) -> list[ScheduledSequence]:
        items: list[ScheduledSequence] = []
        for sequence in self._whose_turn():
            if sequence.status != "running":  # it has given way to an older one
                continue
            assert sequence.num_tokens < self.token_limit(sequence), "should have been finished"
            while not self._grow(sequence, 1):
                last = self._last_to_give_way(sequence.sub_batch)
                if last.seq_id in self._held:
                    return items
                self._preempt(last)
                if sequence.status != "running":
                    break
            else:
                items.append(_share(sequence, "decode", 1))
        return items

    def _whose_turn(self) -> list[Sequence]:
        """The sequences of a decode step, in the order of `add`; where not all can be, in turns."""
        found = [
            each for each in self._running if not each.is_prefill and each.seq_id not in self._held
        ]
        if len(found) <= self.max_decode_seqs:
            return found
        numbers = [self._numbers[each.seq_id] for each in found]
        first = bisect_right(numbers, self._last_turn)
        turns = [(first + at) % len(found) for at in range(self.max_decode_seqs)]
        self._last_turn = numbers[turns[-1]]
        return [found[at] for at in sorted(turns)]

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a sequence the blocks for its next tokens; False where too few are free."""
        num_cached = sequence.num_computed_tokens + num_tokens
        num_held, num_more = len(sequence.block_table), 0
        if num_cached > num_held * BLOCK_SIZE:
            num_more = self._num_needed(sequence, num_cached) - num_held
        pools, sub_batch = self.pools, sequence.sub_batch
        prompts = pools.prompts_of(sub_batch)
        num_prompts = 0
        if prompts is not None and sequence.is_prefill:
            num_prompts = pools.num_prompt_blocks(num_blocks_for(num_cached))
            num_prompts -= len(sequence.prompt_table)
        if not pools.has_room(sub_batch, num_held, num_more):
            return False
        if prompts is not None and num_prompts > prompts.num_free:
            return False
        if num_more:
            sequence.block_table += pools.take(sub_batch, num_held, num_more)
        if prompts is not None and num_prompts:
            sequence.prompt_table += prompts.allocate(num_prompts) or []
        return True

    def _last_to_give_way(self, sub_batch: int) -> Sequence:
        """The running sequence that was added last, of those of a sub-batch that can wait."""
        return next(
            sequence
            for sequence in reversed(self._running)
            if sequence.sub_batch == sub_batch
            and not self._stays(sequence, len(sequence.block_table))
        )

    def _preempt(self, sequence: Sequence) -> None:
        self._wait_again(sequence)
        sequence.num_preemptions += 1

    def _wait_again(self, sequence: Sequence) -> None:
        self._release(sequence)
        self._running.remove(sequence)
        self._insert(self._waiting, sequence)
        sequence.status = "waiting"
        sequence.num_computed_tokens = 0

    def _insert(self, sequences: list[Sequence], sequence: Sequence) -> None:
        insort(sequences, sequence, key=lambda each: self._numbers[each.seq_id])

    def _release(self, sequence: Sequence) -> None:
        self.pools.give_back(sequence.sub_batch, sequence.block_table)
        sequence.block_table = []
        self.leave_prompt_pages(sequence)

    def leave_prompt_pages(self, sequence: Sequence) -> None:
        """Take back the blocks in which a prompt was computed, once its cache has moved."""
        if self.pools.prompts is not None:
            self.pools.prompts.free(sequence.prompt_table)
        sequence.prompt_table = []

    def advance(self, batch: Batch, tokens: Iterable[int | None]) -> None:
        """Record that a step was computed: its tokens are cached, and what was sampled is added.

        `tokens` are in the order of `batch.sampled`; None adds nothing (the row had an error: the
        engine finishes that sequence). Sequences that were finished or aborted stay as they are.
        """
        now_s = self._clock()
        for item in batch.items:
            if not item.sequence.is_finished:
                item.sequence.num_computed_tokens += item.num_tokens
        for sequence, token_id in zip(batch.sampled, tokens, strict=True):
            if token_id is not None and not sequence.is_finished:
                sequence.append(token_id, now_s)

    def finish(
        self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None
    ) -> None:
        """End a sequence and give its blocks back."""
        del self._unfinished[sequence.seq_id]
        self._late.discard(sequence.seq_id)
        if sequence.status == "running":
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        del self._numbers[sequence.seq_id]
        self._release(sequence)
        sequence.status = "finished"
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason

    def abort(self, seq_id: str) -> Sequence | None:
        """End a sequence by its id; None where no such sequence is unfinished."""
        sequence = self._unfinished.get(seq_id)
        if sequence is not None:
            self.finish(sequence, "abort")
        return sequence


def _share(sequence: Sequence, phase: Phase, num_tokens: int) -> ScheduledSequence:
    past = sequence.num_computed_tokens
    return ScheduledSequence(
        sequence=sequence,
        phase=phase,
        num_tokens=num_tokens,
        num_past_tokens=past,
        has_logits=past + num_tokens == sequence.num_tokens,
    )
