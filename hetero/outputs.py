"""What `generate` returns: outputs of requests, their times, and what a whole call measured."""

from __future__ import annotations

from dataclasses import dataclass

from hetero.engine import EngineStats
from hetero.sequence import FinishReason, Sequence
from planner.workload import Phase, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """Times of one request, in seconds; `tpot_s` is None with a single output token."""

    ttft_s: float
    tpot_s: float | None
    e2e_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One generated continuation.

    `token_ids` includes the token that ended it. `logprobs` has a dictionary (token id ->
    log-probability) for each token where they were asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...] | None
    finish_reason: FinishReason
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A prompt and its completion."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    metrics: RequestMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a call to `generate` measured; the same keys as `planner.plan.Estimate`."""

    ttft_s: float
    tpot_s: float
    e2e_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def output_of(sequence: Sequence, prompt: str | None, text: str) -> RequestOutput:
    assert sequence.finish_reason is not None and sequence.arrival_s is not None
    last_s = sequence.last_token_s or sequence.arrival_s
    first_s = sequence.first_token_s or last_s
    num_later = sequence.num_output_tokens - 1
    return RequestOutput(
        request_id=sequence.seq_id,
        prompt=prompt,
        prompt_token_ids=tuple(sequence.prompt_token_ids),
        outputs=(
            CompletionOutput(
                index=0,
                text=text,
                token_ids=tuple(sequence.output_token_ids),
                logprobs=(
                    None if sequence.params.logprobs is None else tuple(sequence.output_logprobs)
                ),
                finish_reason=sequence.finish_reason,
                stop_reason=sequence.stop_reason,
            ),
        ),
        finished=True,
        metrics=RequestMetrics(
            ttft_s=first_s - sequence.arrival_s,
            tpot_s=(last_s - first_s) / num_later if num_later > 0 else None,
            e2e_s=last_s - sequence.arrival_s,
        ),
    )


def measured(
    stats: EngineStats, outputs: list[RequestOutput], before: dict[Phase, tuple[int, float]]
) -> Measured:
    """Times and rates of one call, by the definitions of `planner.plan.Estimate`."""
    rates = {}
    for phase, totals in stats.phases.items():
        tokens, seconds = before[phase]
        elapsed_s = totals.seconds - seconds
        rates[phase] = (totals.num_tokens - tokens) / elapsed_s if elapsed_s > 0 else 0.0
    tpots = [out.metrics.tpot_s for out in outputs if out.metrics.tpot_s is not None]
    return Measured(
        ttft_s=sum(out.metrics.ttft_s for out in outputs) / len(outputs),
        tpot_s=sum(tpots) / len(tpots) if tpots else 0.0,
        e2e_s=max(out.metrics.e2e_s for out in outputs),
        prefill_tokens_per_s=rates["prefill"],
        decode_tokens_per_s=rates["decode"],
    )


def workload_of(outputs: list[RequestOutput]) -> Workload:
    """The workload that a call turned out to be: mean prompt, longest output."""
    prompt_tokens = sum(len(out.prompt_token_ids) for out in outputs)
    return Workload(
        prompt_len=max(1, round(prompt_tokens / len(outputs))),
        output_len=max(1, *(len(out.outputs[0].token_ids) for out in outputs)),
        num_seqs=len(outputs),
    )
