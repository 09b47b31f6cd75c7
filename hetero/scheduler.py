"""Scheduler: which sequences run in the next step, and which blocks their tokens go to."""

# T new tokens, S sequences, B blocks of the longest sequence, L rows that reach the head

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from hetero.errors import RequestError
from hetero.kv_cache import BLOCK_SIZE, BlockAllocator, num_blocks_for
from hetero.model.batch import BatchTensors
from hetero.sequence import FinishReason, Sequence
from planner.workload import BatchShape, Phase

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledSequence:
    """A sequence's share of one step: `num_tokens` tokens after `num_past_tokens` cached ones.

    `has_logits` is true where the share ends with the sequence's last token, so that the step
    samples its next one. Both facts are as scheduled: the sequence moves on.
    """

    sequence: Sequence
    num_tokens: int
    num_past_tokens: int
    has_logits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one step computes."""

    phase: Phase
    items: tuple[ScheduledSequence, ...]

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
        return BatchShape(
            phase=self.phase,
            num_tokens=num_tokens,
            num_seqs=len(self.items),
            num_past_tokens=past / num_tokens,
            num_logits=sum(item.has_logits for item in self.items),
        )

    def tensors(self, device: torch.device = _CPU) -> BatchTensors:
        """The indices of the step. Call it before `Scheduler.advance`, which frees blocks."""
        counts_S = np.array([item.num_tokens for item in self.items])
        past_S = np.array([item.num_past_tokens for item in self.items])
        starts = np.concatenate(([0], counts_S.cumsum()))
        tables = [item.sequence.block_table for item in self.items]
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

    Every step has one phase, and every choice follows the order of `add`:

    - Prefill goes first: while prompts wait, steps of up to `max_num_batched_tokens` prompt tokens
      are made. A prompt that does not end in a step goes on in the next one, before any other
      prompt starts; so at most one is part-way. A prompt starts when fewer than `max_num_seqs`
      sequences run and the free blocks hold all of it; no other prompt overtakes it.
    - Otherwise every running sequence decodes one token.
    - A sequence is late if some other was decoding when it was added. After a prefill step, and
      while any sequence decodes, the next late prompt lets one decode step go first. So prompts
      that arrive together are all prefilled before the first decode step, and an endless stream
      of new prompts cannot hold up a decoding sequence for more than one step.
    - When a decode step lacks a block, the running sequence added last gives back its blocks and
      waits again, before all others; its prompt and output so far are prefilled again later. The
      oldest sequence is never the one that gives way while another runs, so all of them finish.

    A step goes `batch = schedule()`, compute, `advance(batch, tokens)`, then `finish` for each
    sequence that ends. `finish` and `abort` give the blocks back at once: call them between steps.

    Parameters
    ----------
    blocks : BlockAllocator
        Where KV blocks come from.
    max_num_seqs : int
        Most sequences that hold blocks at a time; the size of the largest decode step.
    max_num_batched_tokens : int
        Most tokens of a prefill step.
    max_model_len : int
        Most tokens of a sequence, prompt and output.
    clock : callable
        The time, in seconds, that sequences are stamped with.
    """

    def __init__(
        self,
        *,
        blocks: BlockAllocator,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        assert min(max_num_seqs, max_num_batched_tokens) >= 1
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self._blocks = blocks
        self._clock = clock
        self._waiting: deque[Sequence] = deque()
        # In the order of `add`, all before those that wait: only the first waiting sequence is
        # admitted, and only the last running one is preempted.
        self._running: list[Sequence] = []
        self._unfinished: dict[str, Sequence] = {}
        self._late: set[str] = set()
        self._is_decode_due = False

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
        # The last token is generated but never fed, so it needs no slot.
        num_slots = self.token_limit(sequence) - 1
        if num_blocks_for(num_slots) > self._blocks.num_blocks:
            capacity = self._blocks.num_blocks * BLOCK_SIZE
            room = capacity + 1 - num_prompt_tokens
            lower = f"lower max_tokens to {room} or less, " if room > 0 else "shorten the prompt, "
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens and max_tokens is "
                f"{sequence.params.max_tokens}, which needs the KV cache to hold {num_slots} "
                f"tokens but it holds {capacity}; {lower}or give the KV cache more memory"
            )

    def schedule(self) -> Batch | None:
        """The next step, its blocks allocated; None when nothing is unfinished."""
        if not self._unfinished:
            return None
        if not self._must_decode():
            items = self._prefill_items()
            if items:
                self._is_decode_due = True
                return self._batch("prefill", items)
        self._is_decode_due = False
        return self._batch("decode", self._decode_items())

    def _batch(self, phase: Phase, items: list[ScheduledSequence]) -> Batch:
        assert items, "sequences are unfinished but none can run"
        now_s = self._clock()
        for item in items:
            if item.sequence.first_scheduled_s is None:
                item.sequence.first_scheduled_s = now_s
        return Batch(phase=phase, items=tuple(items))

    def _must_decode(self) -> bool:
        """Whether it is the turn of the decoding sequences, ahead of a late prompt."""
        if not self._is_decode_due or all(sequence.is_prefill for sequence in self._running):
            return False
        following = self._part_way() or (self._waiting[0] if self._waiting else None)
        return following is not None and following.seq_id in self._late

    def _part_way(self) -> Sequence | None:
        """The one running sequence whose prompt is not yet all in the cache."""
        if self._running and self._running[-1].is_prefill:
            return self._running[-1]
        return None

    def _prefill_items(self) -> list[ScheduledSequence]:
        items: list[ScheduledSequence] = []
        room = self.max_num_batched_tokens
        part_way = self._part_way()
        if part_way is not None:
            num_tokens = min(room, part_way.num_tokens - part_way.num_computed_tokens)
            if not self._grow(part_way, num_tokens):
                return []
            items.append(_share(part_way, num_tokens))
            room -= num_tokens
        while room and self._waiting and len(self._running) < self.max_num_seqs:
            sequence = self._waiting[0]
            if num_blocks_for(sequence.num_tokens) > self._blocks.num_free:
                break
            num_tokens = min(room, sequence.num_tokens)
            self._grow(sequence, num_tokens)
            self._waiting.popleft()
            self._running.append(sequence)
            sequence.status = "running"
            items.append(_share(sequence, num_tokens))
            room -= num_tokens
        return items

    def _decode_items(self) -> list[ScheduledSequence]:
        items: list[ScheduledSequence] = []
        for sequence in tuple(self._running):
            if sequence.status != "running":
                break  # it gave way to an older one, and so did all after it
            if sequence.is_prefill:
                continue
            assert sequence.num_tokens < self.token_limit(sequence), "should have been finished"
            while not self._grow(sequence, 1):
                self._preempt(self._running[-1])
                if sequence.status != "running":
                    break
            else:
                items.append(_share(sequence, 1))
        return items

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a sequence the blocks for its next tokens; False where too few are free."""
        needed = num_blocks_for(sequence.num_computed_tokens + num_tokens)
        blocks = self._blocks.allocate(needed - len(sequence.block_table))
        if blocks is None:
            return False
        sequence.block_table += blocks
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self._running.remove(sequence)
        self._waiting.appendleft(sequence)
        sequence.status = "waiting"
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self._blocks.free(sequence.block_table)
        sequence.block_table = []

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


def _share(sequence: Sequence, num_tokens: int) -> ScheduledSequence:
    past = sequence.num_computed_tokens
    return ScheduledSequence(
        sequence=sequence,
        num_tokens=num_tokens,
        num_past_tokens=past,
        has_logits=past + num_tokens == sequence.num_tokens,
    )
