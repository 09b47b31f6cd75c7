"""Sampler: bounds of the parameters, and the distribution that tokens are drawn from."""

# R rows, V vocabulary

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from hetero import sampler
from hetero.errors import RequestError, UsageError
from hetero.sampler import SamplingParams, SamplingRow, draw_tokens, make_generator, sample

GREEDY = SamplingParams(temperature=0.0)
NUM_DRAWS = 1000

Floats = NDArray[np.float64]


def random_logits(num_rows: int, vocab_size: int, seed: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * scale


def reference_probabilities(logits: Tensor, params: SamplingParams) -> Floats:
    """Temperature, min_p, top_k, top_p in float64, one after the other and each renormalised."""
    scaled = logits.numpy().astype(np.float64) / params.temperature
    probabilities: Floats = np.exp(scaled - scaled.max())
    probabilities[probabilities < params.min_p] = 0.0
    if 0 < params.top_k < len(logits):
        probabilities[probabilities < np.sort(probabilities)[-params.top_k]] = 0.0
    probabilities /= probabilities.sum()
    if params.top_p < 1:
        mass = 0.0
        for token_id in np.argsort(-probabilities):
            if mass >= params.top_p:
                probabilities[token_id] = 0.0
            mass += probabilities[token_id]
        probabilities /= probabilities.sum()
    return probabilities


def drawn_frequencies(logits: Tensor, params: SamplingParams) -> Floats:
    """Share of each token among draws at evenly spaced points of the distribution."""
    uniform = (torch.arange(NUM_DRAWS, dtype=torch.float64) + 0.5) / NUM_DRAWS
    drawn = draw_tokens(logits.expand(NUM_DRAWS, -1), [params] * NUM_DRAWS, uniform)
    return np.bincount(drawn, minlength=len(logits)) / NUM_DRAWS


def rows_of(*params: SamplingParams) -> list[SamplingRow]:
    return [SamplingRow(params=p, generator=make_generator(p)) for p in params]


def tokens(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
    return [token.token_id for token in sample(logits, rows)]


# Parameters


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "0.5"},
        {"temperature": True},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.01},
        {"min_p": 1.01},
        {"top_k": -1},
        {"top_k": 1.5},
        {"seed": -1},
        {"seed": 2**63},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": ["x"] * 257},
        {"stop": [1]},
        {"stop": 1},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": ["a"]},
        {"stop_token_ids": 5},
        {"stop_token_ids": list(range(257))},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"min_tokens": -1},
        {"min_tokens": 17},
        {"logprobs": -1},
        {"logprobs": 21},
        {"ignore_eos": 1},
        {"skip_special_tokens": None},
    ],
)
def test_a_value_out_of_its_bounds_is_refused_by_name(values: dict[str, Any]) -> None:
    """The message starts with, or speaks of, the offending parameter."""
    (name,) = values
    with pytest.raises(RequestError, match=name):
        SamplingParams(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": 100.0},
        {"top_p": 1e-9},
        {"top_p": 1},
        {"min_p": 1.0},
        {"top_k": 10**9},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"max_tokens": None, "min_tokens": 1000},
        {"max_tokens": 3, "min_tokens": 3},
        {"logprobs": 0},
        {"logprobs": 20},
        {"stop": []},
        {"stop_token_ids": []},
    ],
)
def test_a_value_on_its_bound_is_accepted(values: dict[str, Any]) -> None:
    """Bounds are inclusive where vLLM's are, and the value is kept."""
    params = SamplingParams(**values)
    for name, value in values.items():
        kept = getattr(params, name)
        assert (tuple(value) if isinstance(value, list) else value) == kept


def test_more_than_one_output_is_not_supported() -> None:
    """`n` other than 1 is a usage error that says so."""
    with pytest.raises(UsageError, match="n=2 is not supported"):
        SamplingParams(n=2)


def test_an_unknown_parameter_is_an_error() -> None:
    """Nothing that vLLM knows and hetero does not is ignored."""
    values: dict[str, Any] = {"presence_penalty": 0.5}
    with pytest.raises(TypeError, match="presence_penalty"):
        SamplingParams(**values)


def test_defaults_are_those_of_vllm() -> None:
    """A request that says nothing samples 16 tokens at temperature 1."""
    expected = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": None,
        "stop_token_ids": None,
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "n": 1,
    }
    assert expected == dataclasses.asdict(SamplingParams())


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(None, ()), ("END", ("END",)), (["a", "b"], ("a", "b")), (("a",), ("a",))],
)
def test_stop_is_normalised_to_a_tuple(
    stop: str | Sequence[str] | None, expected: tuple[str, ...]
) -> None:
    """A string, a list and None all read as a tuple."""
    assert expected == SamplingParams(stop=stop).stop_strings


def test_params_do_not_change_with_the_lists_they_were_made_of() -> None:
    """Lists are copied, so the frozen value can be hashed and shared."""
    stop, stop_token_ids = ["a"], [1]
    params = SamplingParams(stop=stop, stop_token_ids=stop_token_ids)
    stop.append("b")
    stop_token_ids.append(2)
    assert params.stop_strings == ("a",)
    assert params.stop_ids == (1,)
    assert hash(params) == hash(SamplingParams(stop=("a",), stop_token_ids=(1,)))


# Greedy


def test_greedy_rows_take_the_best_token() -> None:
    """Temperature 0, and one too small to matter, give the argmax of each row."""
    logits = random_logits(5, 37, seed=0)
    rows = rows_of(*[GREEDY] * 4, SamplingParams(temperature=1e-6, top_p=0.1, seed=1))
    assert logits.argmax(dim=1).tolist() == tokens(logits, rows)


def test_greedy_takes_the_first_of_equal_tokens() -> None:
    """Ties have one answer, so that runs compare."""
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert tokens(logits, rows_of(GREEDY)) == [1]


def test_no_rows_give_no_tokens() -> None:
    """A chunk of a long prompt reaches the sampler with nothing to sample."""
    assert sample(torch.empty(0, 8), []) == []


# The distribution


@settings(deadline=None, max_examples=100)
@given(
    vocab_size=st.integers(2, 60),
    seed=st.integers(0, 2**32),
    temperature=st.floats(0.3, 3.0),
    top_k=st.integers(0, 70),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
    num_candidates=st.sampled_from([1, 3, 16, 1024]),
)
def test_draws_follow_the_float64_reference(
    vocab_size: int,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    num_candidates: int,
) -> None:
    """Of N even draws a token of probability p gets N * p within one, however many candidates."""
    logits = random_logits(1, vocab_size, seed)[0]
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    with mock.patch.object(sampler, "NUM_CANDIDATES", num_candidates):
        actual = drawn_frequencies(logits, params)
    expected = reference_probabilities(logits, params)
    # 1e-5 for float32 weights.
    assert np.abs(expected - actual).max() <= 1 / NUM_DRAWS + 1e-5
    assert not actual[expected == 0].any()


@settings(deadline=None, max_examples=50)
@given(
    logits=st.lists(st.floats(-1, 1, width=16), min_size=2, max_size=20),
    top_p=st.floats(0.05, 0.99),
)
def test_top_p_keeps_the_smallest_prefix_that_reaches_it(logits: list[float], top_p: float) -> None:
    """The kept mass reaches top_p, without its last token it does not, and all kept are best."""
    # The least likely of 20 tokens has e^-2 / 20 = 0.7 % and is among 1000 even draws if kept.
    row = torch.tensor(logits)
    kept = drawn_frequencies(row, SamplingParams(top_p=top_p)) > 0
    probabilities = row.double().softmax(dim=0).numpy()
    assert probabilities[kept].sum() >= top_p - 1e-6
    assert probabilities[kept].sum() - probabilities[kept].min() < top_p + 1e-6
    assert probabilities[kept].min() >= probabilities[~kept].max(initial=0.0)


def test_top_p_stops_at_the_token_that_reaches_it_exactly() -> None:
    """Of four equal tokens, 0.5 keeps two: the mass before the third is not below 0.5."""
    frequencies = drawn_frequencies(torch.zeros(4), SamplingParams(top_p=0.5))
    assert frequencies.tolist() == [0.5, 0.5, 0.0, 0.0]


@settings(deadline=None, max_examples=50)
@given(
    logits=st.lists(st.integers(-1, 1), min_size=2, max_size=30),
    top_k=st.integers(1, 30),
    num_candidates=st.sampled_from([2, 1024]),
)
def test_top_k_keeps_k_tokens_and_those_tied_with_the_last(
    logits: list[int], top_k: int, num_candidates: int
) -> None:
    """vLLM's rule: everything at least as good as the k-th best is kept."""
    row = torch.tensor(logits, dtype=torch.float32)
    with mock.patch.object(sampler, "NUM_CANDIDATES", num_candidates):
        kept = drawn_frequencies(row, SamplingParams(top_k=top_k)) > 0
    least = sorted(logits, reverse=True)[:top_k][-1]
    assert [value >= least for value in logits] == kept.tolist()


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), min_p=st.floats(0.0, 1.0))
def test_min_p_keeps_tokens_by_their_share_of_the_best(seed: int, min_p: float) -> None:
    """The likeliest token always stays; a token below min_p times it never does."""
    row = random_logits(1, 20, seed, scale=1.0)[0]
    frequencies = drawn_frequencies(row, SamplingParams(min_p=min_p))
    probabilities = row.double().softmax(dim=0).numpy()
    assert frequencies[probabilities.argmax()] > 0
    assert not frequencies[probabilities < (min_p - 1e-6) * probabilities.max()].any()


def test_top_k_one_is_greedy() -> None:
    """At any temperature, one candidate leaves no choice."""
    logits = random_logits(8, 50, seed=3)
    rows = rows_of(*(SamplingParams(temperature=5.0, top_k=1, seed=i) for i in range(8)))
    assert logits.argmax(dim=1).tolist() == tokens(logits, rows)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=7),
        SamplingParams(seed=7, temperature=0.6, top_p=0.9, top_k=8),
        SamplingParams(seed=7, temperature=1.5, min_p=0.05),
    ],
)
def test_sampled_frequencies_pass_a_chi_square_test(params: SamplingParams) -> None:
    """Draws from a seeded generator follow the reference distribution."""
    logits = random_logits(1, 12, seed=5, scale=1.0)
    (row,) = rows_of(params)
    drawn = tokens(logits.expand(NUM_DRAWS, -1), [row] * NUM_DRAWS)
    counts = np.bincount([t for t in drawn if t is not None], minlength=12)
    expected = NUM_DRAWS * reference_probabilities(logits[0], params)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    # 31.3 is the 99.9 % quantile of chi-square with 11 degrees of freedom.
    assert float(((counts - expected)[kept] ** 2 / expected[kept]).sum()) < 31.3


@pytest.mark.parametrize("temperature", [1e-4, 1.0, 1e300])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_extreme_numbers_never_give_a_forbidden_or_invalid_token(
    temperature: float, top_p: float
) -> None:
    """The largest float32 logits and any temperature leave a distribution to draw from."""
    logits = torch.tensor([[3e38, -3e38, 2.9e38, 3e38]]).expand(20, -1)
    params = SamplingParams(
        temperature=temperature, top_p=top_p, min_tokens=1, stop_token_ids=[3], seed=0
    )
    (row,) = rows_of(params)
    drawn = set(tokens(logits, [row] * 20))
    assert drawn <= {0, 1, 2}
    assert drawn == {0} or temperature == 1e300


def test_the_ends_of_the_unit_interval_draw_kept_tokens() -> None:
    """0 and the largest number below 1 do not fall on masked tokens at either end."""
    logits = torch.tensor([-9.0, 1.0, 0.5, -9.0]).expand(2, -1)
    uniform = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert draw_tokens(logits, [SamplingParams(min_p=0.1)] * 2, uniform) == [1, 2]
    assert draw_tokens(logits, [SamplingParams(top_k=2)] * 2, uniform) == [1, 2]


# Rows side by side


@settings(deadline=None, max_examples=40)
@given(
    others=st.lists(
        st.sampled_from(
            [
                GREEDY,
                SamplingParams(),
                SamplingParams(seed=1),
                SamplingParams(top_p=0.9),
                SamplingParams(top_p=0.999, temperature=3.0, seed=2),
                SamplingParams(top_k=30, min_p=0.1, logprobs=2),
            ]
        ),
        max_size=6,
    ),
    place=st.integers(0, 6),
    params=st.sampled_from(
        [
            SamplingParams(seed=11),
            SamplingParams(seed=11, top_p=0.8),
            SamplingParams(seed=11, top_p=0.99, temperature=2.0),
            SamplingParams(seed=11, top_k=5, logprobs=3),
        ]
    ),
)
def test_a_seeded_row_does_not_depend_on_the_rows_beside_it(
    others: list[SamplingParams], place: int, params: SamplingParams
) -> None:
    """Its tokens and log-probabilities are those that it gets alone, step after step."""
    place = min(place, len(others))
    (alone,) = rows_of(params)
    rows = rows_of(*others[:place], params, *others[place:])
    with mock.patch.object(sampler, "NUM_CANDIDATES", 16):
        for step in range(4):
            logits = random_logits(len(rows), 100, seed=step)
            if others:
                logits[(place + 1) % len(rows), 0] = math.nan
            (expected,) = sample(logits[place : place + 1], [alone])
            assert expected == sample(logits, rows)[place]


def test_a_seed_repeats_its_tokens() -> None:
    """Two requests with one seed draw the same, one with another seed does not."""
    logits = random_logits(1, 1000, seed=0).expand(3, -1)
    rows = rows_of(*(SamplingParams(seed=seed) for seed in (5, 5, 6)))
    first, second, other = zip(*(tokens(logits, rows) for _ in range(10)), strict=True)
    assert first == second
    assert first != other


def test_rows_without_a_seed_draw_from_the_default_generator() -> None:
    """Each row gets its own number, and torch.manual_seed repeats a run."""
    logits = torch.zeros(8, 1000)
    rows = rows_of(*[SamplingParams()] * 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = tokens(logits, rows)
        torch.manual_seed(0)
        assert first == tokens(logits, rows)
    assert len(set(first)) > 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=1, logprobs=1)])
def test_a_row_that_is_not_finite_fails_alone(bad: float, params: SamplingParams) -> None:
    """Its neighbours get the tokens that they would have got."""
    logits = random_logits(3, 10, seed=1)
    expected = sample(logits, rows_of(*[params] * 3))
    logits[1, 4] = bad
    first, failed, last = sample(logits, rows_of(*[params] * 3))
    assert [expected[0], expected[2]] == [first, last]
    assert failed.error == "numerical_error"
    assert failed.token_id is None
    assert failed.logprob is None


# min_tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_forbids_the_tokens_that_end_the_text(temperature: float) -> None:
    """End-of-sequence (ignored or not) and stop tokens wait; an id past the vocabulary is fine."""
    params = SamplingParams(
        temperature=temperature, min_tokens=2, stop_token_ids=[1, 99], ignore_eos=True, top_k=1
    )
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0]]).expand(3, -1)
    rows = [
        SamplingRow(params=params, num_output_tokens=count, eos_token_ids={0}) for count in range(3)
    ]
    assert tokens(logits, rows) == [2, 2, 0]


def test_a_row_with_every_token_forbidden_is_an_error() -> None:
    """Nothing can be drawn, and the row beside it is not affected."""
    row = SamplingRow(params=SamplingParams(min_tokens=1), eos_token_ids=[0, 1])
    failed, fine = sample(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), [row, *rows_of(GREEDY)])
    assert failed.error == "numerical_error"
    assert fine.token_id == 1


def test_sampling_leaves_the_logits_as_they_were() -> None:
    """Forbidding and scaling work on copies."""
    logits = random_logits(3, 30, seed=2)
    before = logits.clone()
    stops = SamplingParams(min_tokens=1, stop_token_ids=[3], top_p=0.5)
    sample(logits, rows_of(stops, SamplingParams(temperature=0.3), GREEDY))
    assert torch.equal(before, logits)


# Log-probabilities


def test_logprobs_are_of_the_raw_logits() -> None:
    """Temperature, filters and min_tokens change what is drawn, not what is reported."""
    params = SamplingParams(
        temperature=0.2, top_k=2, min_tokens=1, stop_token_ids=[0], logprobs=3, seed=1
    )
    logits = torch.tensor([[5.0, 1.0, 4.0, 2.0]])
    (token,) = sample(logits, rows_of(params))
    expected = logits[0].double().log_softmax(dim=0).tolist()
    assert token.token_id == 2
    assert token.logprob == pytest.approx(expected[2], abs=1e-6)
    assert token.top_logprobs is not None
    assert [token_id for token_id, _ in token.top_logprobs] == [0, 2, 3]
    assert [value for _, value in token.top_logprobs] == pytest.approx(
        [expected[0], expected[2], expected[3]], abs=1e-6
    )


def test_each_row_gets_as_many_logprobs_as_it_asked_for() -> None:
    """None gives none at all, 0 the sampled token's only, and no row more than the vocabulary."""
    logits = random_logits(4, 6, seed=4)
    wanted = (None, 0, 2, 20)
    sampled = sample(logits, rows_of(*(SamplingParams(logprobs=k, temperature=0) for k in wanted)))
    counts = [None if t.top_logprobs is None else len(t.top_logprobs) for t in sampled]
    assert counts == [None, 0, 2, 6]
    assert [t.logprob is not None for t in sampled] == [False, True, True, True]
