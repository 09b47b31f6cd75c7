"""A predictor whose times are in proportion to tokens, and sequences to give to it."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from planner.sub_batches import Decode, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Straight:
    """Every time in proportion to its tokens, in milliseconds; the defaults are VEC 7's."""

    launch_s: float = 0.1
    linear_base: float = 1.0
    linear: float = 0.01
    gpu_expert: float = 0.0
    cpu_expert: float = 0.0
    prefill: float = 0.002
    gpu_context: float = 1e-4
    cpu_context: float = 0.002

    def linear_s(self, num_tokens: int) -> float:
        return self.linear_base + self.linear * num_tokens

    def gpu_experts_s(self, num_tokens: int) -> float:
        return self.gpu_expert * num_tokens

    def cpu_experts_s(self, num_tokens: int) -> float:
        return self.cpu_expert * num_tokens

    def prefill_s(self, num_tokens: int) -> float:
        return self.prefill * num_tokens

    def gpu_attention_s(self, num_context_tokens: int) -> float:
        return self.gpu_context * num_context_tokens

    def cpu_attention_s(self, num_seqs: int, num_context_tokens: int) -> float:
        assert num_seqs > 0
        return self.cpu_context * num_context_tokens


STUB = Straight()


def decodes(count: int, num_tokens: int, first_id: int = 0) -> tuple[Decode, ...]:
    return tuple(Decode(seq_id=first_id + index, num_tokens=num_tokens) for index in range(count))


def prompt(num_tokens: int, seq_id: int = 100) -> Prompt:
    return Prompt(seq_id=seq_id, num_tokens=num_tokens)


predictors = st.builds(
    Straight,
    launch_s=st.floats(0.0, 1.0),
    linear_base=st.floats(0.1, 2.0),
    linear=st.floats(0.0, 0.05),
    gpu_expert=st.floats(0.0, 0.02),
    cpu_expert=st.sampled_from([0.0, 0.002, 0.02]),
    cpu_context=st.floats(1e-5, 0.01),
)
