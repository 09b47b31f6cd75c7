"""Sampler: what a request may ask of its next tokens, and logits -> token."""

# R rows (sequences that sample in this step), V vocabulary, M candidate tokens, best first

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hetero.errors import RequestError, UsageError

MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1
MAX_STOPS = 256

# Below this a temperature means greedy, as in vLLM.
GREEDY_TEMPERATURE = 1e-5

# Filters first look at this many best tokens; the whole vocabulary is sorted only for a row whose
# kept tokens are not all among them. Of 151936 tokens the best 1024 take 1.2 ms, a sort 25 ms
# (Xeon, one thread).
NUM_CANDIDATES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request samples: names, meanings and defaults of vLLM's `SamplingParams`.

    Parameters
    ----------
    temperature : float
        0 is greedy. Otherwise the order is temperature, min_p, top_k, top_p (vLLM's).
    top_p : float
        Keep the fewest best tokens whose probabilities, after top_k, reach this; in (0, 1].
    top_k : int
        Keep this many best tokens (and those tied with the last of them); 0 keeps all.
    min_p : float
        Drop tokens less likely than this times the likeliest; in [0, 1].
    seed : int, optional
        Makes the request's tokens independent of what else runs.
    stop : str or sequence of str, optional
        Strings that end the text; `stop_strings` is the normalised form.
    stop_token_ids : sequence of int, optional
        Tokens that end the text; `stop_ids` is the normalised form.
    ignore_eos : bool
        Go on after the model's end-of-sequence token.
    max_tokens : int, optional
        Most tokens to generate; None goes on to the model's limit.
    min_tokens : int
        Until this many are generated, end-of-sequence and stop tokens cannot be sampled.
    logprobs : int, optional
        Number of best log-probabilities to report per token, of the raw logits; at most 20.
    skip_special_tokens : bool
        Leave special tokens out of the text.
    include_stop_str_in_output : bool
        Keep the stop string at the end of the text.
    n : int
        Only 1 is supported.

    Raises
    ------
    RequestError
        A value out of its bounds.
    UsageError
        `n` other than 1.

    Examples
    --------
    >>> SamplingParams(temperature=0.0, stop="END").stop_strings
    ('END',)
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        if self.n != 1:
            raise UsageError(f"n={self.n!r} is not supported; send the prompt once per output")
        _check_real("temperature", self.temperature, high=math.inf)
        _check_real("top_p", self.top_p, high=1.0)
        if self.top_p == 0:
            raise RequestError("top_p is 0 but must be above 0; temperature 0 is greedy")
        _check_real("min_p", self.min_p, high=1.0)
        _check_whole("top_k", self.top_k)
        _check_whole("min_tokens", self.min_tokens)
        if self.seed is not None:
            _check_whole("seed", self.seed, high=MAX_SEED)
        if self.logprobs is not None:
            _check_whole("logprobs", self.logprobs, high=MAX_LOGPROBS)
        if self.max_tokens is not None:
            _check_whole("max_tokens", self.max_tokens, low=1)
            if self.min_tokens > self.max_tokens:
                raise RequestError(
                    f"min_tokens is {self.min_tokens} but max_tokens is {self.max_tokens}; "
                    f"raise max_tokens or lower min_tokens"
                )
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r} but must be true or false")
        _check_stops(self.stop, self.stop_token_ids)
        # Copies, so that a list the caller changes later does not change a frozen value.
        if self.stop is not None and not isinstance(self.stop, str):
            object.__setattr__(self, "stop", tuple(self.stop))
        if self.stop_token_ids is not None:
            object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, none or more."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The stop tokens, none or more."""
        return () if self.stop_token_ids is None else tuple(self.stop_token_ids)


def _check_real(name: str, value: object, *, high: float) -> None:
    bounds = "0 or more" if high == math.inf else f"in 0..{high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} is {value!r} but must be a number {bounds}")
    if not math.isfinite(value) or not 0 <= value <= high:
        raise RequestError(f"{name} is {value} but must be {bounds}")


def _check_whole(name: str, value: object, *, low: int = 0, high: int | None = None) -> None:
    bounds = f"{low} or more" if high is None else f"in {low}..{high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} is {value!r} but must be a whole number {bounds}")
    if value < low or (high is not None and value > high):
        raise RequestError(f"{name} is {value} but must be {bounds}")


def _check_stops(stop: object, stop_token_ids: object) -> None:
    if stop is not None and not isinstance(stop, str | list | tuple):
        raise RequestError(f"stop is {stop!r} but must be a string or a list of strings")
    if stop_token_ids is not None and not isinstance(stop_token_ids, list | tuple):
        raise RequestError(f"stop_token_ids is {stop_token_ids!r} but must be a list of token ids")
    strings = [stop] if isinstance(stop, str) else list(stop or ())
    token_ids = list(stop_token_ids or ())
    for name, values in (("stop", strings), ("stop_token_ids", token_ids)):
        if len(values) > MAX_STOPS:
            raise RequestError(f"{name} has {len(values)} entries but may have {MAX_STOPS}")
    for text in strings:
        if not isinstance(text, str) or not text:
            raise RequestError(f"stop contains {text!r} but must hold strings that are not empty")
    for token_id in token_ids:
        _check_whole("an entry of stop_token_ids", token_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    """One row of logits: who samples from it and how far it has come.

    `generator` is the request's own (see `make_generator`); None draws from torch's default one.
    """

    params: SamplingParams
    generator: torch.Generator | None = None
    num_output_tokens: int = 0
    eos_token_ids: Collection[int] = ()

    @property
    def forbidden_ids(self) -> tuple[int, ...]:
        """Tokens that would end the text before `min_tokens`."""
        if self.num_output_tokens >= self.params.min_tokens:
            return ()
        return (*self.eos_token_ids, *self.params.stop_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """What one row gave: a token, or an error that concerns this row only.

    `logprob` and `top_logprobs` (best first) are those of the raw logits, None unless asked for.
    """

    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None
    error: Literal["numerical_error"] | None = None


def make_generator(params: SamplingParams) -> torch.Generator | None:
    """A request's own generator where it has a seed."""
    if params.seed is None:
        return None
    return torch.Generator().manual_seed(params.seed)


def sample(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """Choose one token per row.

    Parameters
    ----------
    logits_RV : Tensor
        float32 on the CPU, shape (number of rows, vocabulary); not changed.
    rows : sequence of SamplingRow
        One per row of logits.

    Returns
    -------
    list of SampledToken
        In the order of the rows. A row with a NaN or an infinity, or with every token forbidden by
        `min_tokens`, has `error="numerical_error"` and no token; the others are not affected. What
        a seeded row gives does not depend on the rows beside it.

    Examples
    --------
    >>> greedy = SamplingRow(params=SamplingParams(temperature=0.0))
    >>> sample(torch.tensor([[0.0, 2.0, 1.0]]), [greedy])[0].token_id
    1
    """
    assert logits_RV.shape[0] == len(rows) and logits_RV.dtype == torch.float32
    if not rows:
        return []
    # By numpy, whose reductions take 5 us a row; torch's wait for its threads. A NaN is both least
    # and most.
    logits = logits_RV.numpy()
    is_valid_R = np.isfinite(logits.min(axis=1)) & np.isfinite(logits.max(axis=1))
    allowed_RV = _forbid(logits_RV, rows)
    if allowed_RV is not logits_RV:
        is_valid_R &= allowed_RV.numpy().max(axis=1) > -math.inf
    is_valid: list[bool] = is_valid_R.tolist()

    token_ids: list[int] = allowed_RV.numpy().argmax(axis=1).tolist()
    drawing = [r for r, row in enumerate(rows) if is_valid[r] and not row.params.is_greedy]
    if drawing:
        drawn = draw_tokens(
            _take_rows(allowed_RV, drawing),
            [rows[r].params for r in drawing],
            _uniform(rows[r].generator for r in drawing),
        )
        for r, token_id in zip(drawing, drawn, strict=True):
            token_ids[r] = token_id

    reports = _logprobs(logits_RV, rows, token_ids)
    return [
        reports.get(r, SampledToken(token_id=token_id))
        if is_valid[r]
        else SampledToken(token_id=None, error="numerical_error")
        for r, token_id in enumerate(token_ids)
    ]


def _forbid(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """The logits with forbidden tokens at -inf; the same tensor where none is forbidden."""
    vocab_size = logits_RV.shape[1]
    cells = [(r, t) for r, row in enumerate(rows) for t in row.forbidden_ids if t < vocab_size]
    if not cells:
        return logits_RV
    allowed_RV = logits_RV.clone()
    row_indices, token_ids = zip(*cells, strict=True)
    allowed_RV[list(row_indices), list(token_ids)] = -math.inf
    return allowed_RV


def _take_rows(logits_RV: Tensor, chosen: Sequence[int]) -> Tensor:
    """The chosen rows, ascending; the same tensor where that is all of them."""
    return logits_RV if len(chosen) == logits_RV.shape[0] else logits_RV[chosen]


def _uniform(generators: Iterable[torch.Generator | None]) -> Tensor:
    """One float64 in [0, 1) per row, each from its row's generator."""
    return torch.stack(
        [torch.rand((), dtype=torch.float64, generator=generator) for generator in generators]
    )


def _logprobs(
    logits_RV: Tensor, rows: Sequence[SamplingRow], token_ids: Sequence[int]
) -> dict[int, SampledToken]:
    """The sampled token with its log-probabilities, for the rows that want them."""
    counts = {
        r: row.params.logprobs for r, row in enumerate(rows) if row.params.logprobs is not None
    }
    if not counts:
        return {}
    logprobs_RV = logits_RV[list(counts)].log_softmax(dim=1)
    values_RM, ids_RM = logprobs_RV.topk(min(max(counts.values()), logits_RV.shape[1]), dim=1)
    values, ids = values_RM.tolist(), ids_RM.tolist()
    return {
        r: SampledToken(
            token_id=token_ids[r],
            logprob=logprobs_RV[i, token_ids[r]].item(),
            top_logprobs=tuple(zip(ids[i][:count], values[i][:count], strict=True)),
        )
        for i, (r, count) in enumerate(counts.items())
    }


def draw_tokens(
    logits_RV: Tensor, params: Sequence[SamplingParams], uniform_R: Tensor
) -> list[int]:
    """Draw from the filtered distribution of each row, given a number in [0, 1) per row.

    The number is inverted through the cumulative distribution: evenly spaced numbers give every
    kept token in proportion to its probability. Rows need one token above -inf.
    """
    token_ids = [0] * len(params)
    vocab_size = logits_RV.shape[1]
    filtered = [r for r, p in enumerate(params) if 0 < p.top_k < vocab_size or p.top_p < 1]
    plain = sorted(set(range(len(params))) - set(filtered))
    for chosen, num_candidates in ((plain, None), (filtered, NUM_CANDIDATES)):
        if chosen:
            filters = _Filters.of([params[r] for r in chosen], vocab_size)
            drawn_R = _draw(
                _take_rows(logits_RV, chosen), filters, uniform_R[chosen], num_candidates
            )
            for r, token_id in zip(chosen, drawn_R.tolist(), strict=True):
                token_ids[r] = token_id
    return token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class _Filters:
    """The parameters of rows as columns; what is switched off keeps every token.

    Whole-vocabulary values stay float32 (float64 takes twice the time); sums are float64.
    """

    temperature_R1: Tensor
    min_p_R1: Tensor
    top_k_R1: Tensor
    top_p_R1: Tensor

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int) -> _Filters:
        top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
        # Above 1, so that rounding of the sums cannot drop a token.
        top_p = [p.top_p if p.top_p < 1 else 2.0 for p in params]
        # Finite, as -inf / inf would be NaN.
        temperature = [min(p.temperature, torch.finfo(torch.float32).max) for p in params]
        return cls(
            temperature_R1=torch.tensor(temperature, dtype=torch.float32)[:, None],
            min_p_R1=torch.tensor([p.min_p for p in params], dtype=torch.float32)[:, None],
            top_k_R1=torch.tensor(top_k)[:, None],
            top_p_R1=torch.tensor(top_p, dtype=torch.float64)[:, None],
        )

    def rows(self, chosen_R: Tensor) -> _Filters:
        return _Filters(
            temperature_R1=self.temperature_R1[chosen_R],
            min_p_R1=self.min_p_R1[chosen_R],
            top_k_R1=self.top_k_R1[chosen_R],
            top_p_R1=self.top_p_R1[chosen_R],
        )


def _weights(logits_RV: Tensor, high_R1: Tensor, filters: _Filters) -> Tensor:
    """Probabilities after temperature and min_p, over that of the likeliest token."""
    # Shifted before the division, so that a tiny temperature overflows to weight 0 only.
    weights_RV = (logits_RV - high_R1).div_(filters.temperature_R1).exp_()
    if (filters.min_p_R1 > 0).any():
        weights_RV.masked_fill_(weights_RV < filters.min_p_R1, 0.0)
    return weights_RV


def _draw(
    logits_RV: Tensor, filters: _Filters, uniform_R: Tensor, num_candidates: int | None
) -> Tensor:
    """Draw a token id per row; `num_candidates` None means rows without top_k and top_p."""
    high_R1 = logits_RV.amax(dim=1, keepdim=True)
    if num_candidates is None:
        return _invert(_weights(logits_RV, high_R1, filters), uniform_R)

    vocab_size = logits_RV.shape[1]
    if num_candidates < vocab_size:
        values_RM, ids_RM = logits_RV.topk(num_candidates, dim=1)
    else:
        values_RM, ids_RM = logits_RV.sort(dim=1, descending=True, stable=True)
    weights_RM = _weights(values_RM, high_R1, filters)
    last_R1 = filters.top_k_R1.clamp(max=values_RM.shape[1]) - 1
    weights_RM.masked_fill_(values_RM < values_RM.gather(1, last_R1), 0.0)

    # A last candidate of weight 0 shows that no token after it is kept.
    is_complete_R = weights_RM[:, -1] == 0
    sums_RM = weights_RM.double().cumsum(dim=1)
    total_R1 = sums_RM[:, -1:].clone()
    if num_candidates < vocab_size:
        only_top_p_R = (filters.top_k_R1[:, 0] == vocab_size) & ~is_complete_R
        if only_top_p_R.any():
            rest = _weights(
                logits_RV[only_top_p_R], high_R1[only_top_p_R], filters.rows(only_top_p_R)
            )
            total_R1[only_top_p_R] = rest.double().sum(dim=1, keepdim=True)
            reached_R = sums_RM[:, -1] >= (filters.top_p_R1 * total_R1)[:, 0]
            is_complete_R |= only_top_p_R & reached_R
    else:
        is_complete_R.fill_(True)

    weights_RM[:, 1:].masked_fill_(sums_RM[:, :-1] >= filters.top_p_R1 * total_R1, 0.0)
    ids_R = ids_RM.gather(1, _invert(weights_RM, uniform_R)[:, None])[:, 0]
    if not is_complete_R.all():
        redo_R = ~is_complete_R
        ids_R[redo_R] = _draw(
            logits_RV[redo_R], filters.rows(redo_R), uniform_R[redo_R], vocab_size
        )
    return ids_R


def _invert(weights_RM: Tensor, uniform_R: Tensor) -> Tensor:
    """The first index of each row whose running sum of weights exceeds `uniform` of the total."""
    sums_RM = weights_RM.double().cumsum(dim=1)
    # At most (1 - 2**-53) of the total, which rounds to less than the total: the index found is
    # that of a positive weight.
    target_R1 = uniform_R[:, None] * sums_RM[:, -1:]
    return torch.searchsorted(sums_RM, target_R1, right=True)[:, 0]
