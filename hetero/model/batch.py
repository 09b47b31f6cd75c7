"""BatchTensors: the indices of one step on one device."""

# T new tokens, S sequences, B blocks of the longest sequence, L rows that reach the head

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from planner.workload import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTensors:
    """Where the new tokens of a step stand and where their keys and values go.

    `query_starts` and `past_lens` are host numbers: sequence i owns rows query_starts[i] to
    query_starts[i + 1] and had past_lens[i] tokens in the cache before this step.
    """

    phase: Phase
    token_ids_T: Tensor  # int64
    positions_T: Tensor  # int64
    slots_T: Tensor  # int64: block * block_size + offset in the block
    block_tables_SB: Tensor  # int32, rows padded with 0
    context_lens_S: Tensor  # int32: tokens in the cache after this step
    logit_rows_L: Tensor  # int64: rows of the hidden states that reach the head
    query_starts: tuple[int, ...]
    past_lens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]

    @property
    def num_seqs(self) -> int:
        return len(self.past_lens)

    def map(self, move: Callable[[Tensor], Tensor]) -> BatchTensors:
        """The same batch with every tensor passed through `move`, a copy to another device."""
        return replace(
            self,
            token_ids_T=move(self.token_ids_T),
            positions_T=move(self.positions_T),
            slots_T=move(self.slots_T),
            block_tables_SB=move(self.block_tables_SB),
            context_lens_S=move(self.context_lens_S),
            logit_rows_L=move(self.logit_rows_L),
        )

    def to(self, device: torch.device) -> BatchTensors:
        """The same batch with its tensors on a device."""
        return self.map(lambda tensor: tensor.to(device))
