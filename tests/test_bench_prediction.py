"""The arithmetic of bench/bench_prediction.py: which cells there are, and how errors are told."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.bench_prediction import (
    BATCHES,
    FORMATS,
    MODELS,
    PROMPT_LENS,
    Pair,
    calibration_cells,
    cpu_cells,
    emulated_cells,
    errors,
    quick_cells,
    ranking,
    rows_of,
    summary,
    without_folders,
)

SECONDS = st.floats(min_value=1e-6, max_value=1e3)


def emulated_rows(
    case: str, strategy: str | None, cut: int, ttft_s: float, tpot_s: float
) -> list[Any]:
    """Both rows of one emulated cell of 11 output tokens, predicted to take half the time."""
    return [
        {
            "cell": f"{case}/{strategy}",
            "case": case,
            "placement": strategy or "split",
            "strategy": strategy,
            "cut": {"prefill": cut, "decode": cut},
            "accelerator": "emulated",
            "phase": phase,
            "predicted_s": seconds / 2,
            "uncorrected_s": 0.9 * seconds,
            "measured_s": seconds,
            "low_s": None,
            "high_s": None,
            "output_len": 11,
            "terms": {
                "experts": {"predicted_s": seconds / 4, "measured_s": 0.99 * seconds},
                "router": {"predicted_s": 0.0, "measured_s": 0.01 * seconds},
            },
        }
        for phase, seconds in (("ttft", ttft_s), ("tpot", tpot_s))
    ]


def test_every_two_values_of_two_factors_meet_in_a_cpu_cell() -> None:
    """All but 16 prompts of 2048 tokens, which would take minutes."""
    factors: tuple[tuple[Any, ...], ...] = (MODELS, FORMATS, PROMPT_LENS, BATCHES)
    cells = [(cell.model, cell.format, cell.prompt_len, cell.num_seqs) for cell in cpu_cells()]
    missing = {
        (one, other)
        for (i, left), (j, right) in combinations(enumerate(factors), 2)
        for one, other in product(left, right)
        if not any(cell[i] == one and cell[j] == other for cell in cells)
    }
    assert missing == {(2048, 16)}


def test_there_are_at_least_twenty_cpu_cells_and_six_quick_ones() -> None:
    assert len(cpu_cells()) >= 20
    assert len(quick_cells()) == 6


@pytest.mark.parametrize("cells", [[*cpu_cells(), *emulated_cells()], quick_cells()])
def test_no_two_cells_have_one_name(cells: list[Any]) -> None:
    assert len({cell.name for cell in cells}) == len(cells)


def test_the_emulated_cells_have_every_strategy_and_the_planners_choice_in_each_case() -> None:
    cells = emulated_cells()
    named = {cell.strategy for cell in cells}
    assert named == {"gpu", "cpu", "offload", "split", "experts-on-cpu", None}
    searched = [cell.case for cell in cells if cell.strategy is None]
    assert sorted(searched) == sorted({cell.case for cell in cells})


def test_every_model_is_run_as_often_and_none_as_in_a_cell() -> None:
    cells = [*cpu_cells(), *emulated_cells()]
    runs = calibration_cells(cells, 5)
    assert not {(run.prompt_len, run.num_seqs) for run in runs} & {
        (cell.prompt_len, cell.num_seqs) for cell in cells
    }
    counts = Counter((run.accelerator, run.folder, run.format) for run in runs)
    assert counts == dict.fromkeys({(c.accelerator, c.folder, c.format) for c in cells}, 5)


def test_errors_of_four_pairs_are_those_computed_by_hand() -> None:
    """Measured 1 s and predicted 0.9, 1.2, 1.0, 0.6: errors 0, 0.1, 0.2, 0.4."""
    found = errors([Pair(predicted_s=p, measured_s=1.0) for p in (0.9, 1.2, 1.0, 0.6)])
    assert found["n"] == 4
    assert found["median_error"] == pytest.approx(0.15)
    # 0.9 * 3 = 2.7: seven tenths of the way from 0.2 to 0.4
    assert found["p90_error"] == pytest.approx(0.34)
    # of log(1 / 1.2), 0, log(1 / 0.9), log(1 / 0.6) the middle two
    assert found["bias"] == pytest.approx(math.log(1 / 0.9) / 2)


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=30))
def test_errors_agree_with_numpy(times: list[tuple[float, float]]) -> None:
    found = errors([Pair(predicted_s=p, measured_s=m) for p, m in times])
    predicted, measured = np.array(times).T
    sizes = np.abs(predicted - measured) / measured
    assert found["median_error"] == pytest.approx(np.median(sizes))
    assert found["p90_error"] == pytest.approx(np.quantile(sizes, 0.9))
    assert found["bias"] == pytest.approx(np.median(np.log(measured / predicted)), abs=1e-12)


def test_a_cost_that_nobody_predicted_is_a_whole_error_and_no_bias() -> None:
    """A logarithm of 0 would be infinite, which JSON cannot hold."""
    found = errors([Pair(predicted_s=0.0, measured_s=1.0)])
    assert found == {"n": 1, "median_error": 1.0, "p90_error": 1.0, "bias": None}


def test_a_choice_within_five_percent_of_the_fastest_counts_as_right() -> None:
    """1 s + 10 * 0.1 s = 2 s against 1.92 s (4 % more) and, in the other case, 1.8 s (11 %)."""
    near = emulated_rows("a", None, 1, 1.0, 0.1) + emulated_rows("a", "offload", 1, 0.92, 0.1)
    far = emulated_rows("b", None, 1, 1.0, 0.1) + emulated_rows("b", "offload", 1, 0.8, 0.1)
    found = ranking(near + far)
    assert found["share_within"] == 0.5
    assert [case["ratio"] for case in found["cases"]] == pytest.approx([2 / 1.92, 2 / 1.8])


def test_a_choice_that_is_a_named_strategy_shares_its_measured_time() -> None:
    """Split was measured at 2 s and 3 s: its median of 2.5 s is compared with 2.6 s."""
    rows = (
        emulated_rows("a", None, 1, 2.0, 0.1)
        + emulated_rows("a", "split", 1, 1.0, 0.1)
        + emulated_rows("a", "offload", 1, 1.6, 0.1)
    )
    (case,) = ranking(rows)["cases"]
    assert (case["chosen"], case["fastest"], case["ratio"]) == ("split 1,1", "split 1,1", 1.0)


def test_a_case_without_another_placement_is_no_case_of_the_ranking() -> None:
    rows = emulated_rows("a", None, 1, 2.0, 0.1) + emulated_rows("a", "split", 1, 1.0, 0.1)
    assert ranking(rows) == {"share_within": None, "cases": []}


def test_rows_of_a_cell_have_medians_bands_and_terms() -> None:
    """Three runs; a term that is in no estimate was predicted to take no time."""
    estimate: dict[str, Any] = {
        "ttft_s": 2.0,
        "tpot_s": 0.5,
        "band_by_metric": {"ttft_s": [1.5, 2.5]},
        "calibrated_runs": 0,
        "source_by_phase": {"decode": {"measured": 1.0}},
        "terms_by_phase": {"prefill": {"dense": 2.0}, "decode": {"dense": 0.5, "router": 0.0}},
    }
    runs = [
        {
            "ttft_s": seconds,
            "tpot_s": seconds / 10,
            "terms": {"prefill": {"dense": seconds}, "decode": {"host": seconds / 10}},
        }
        for seconds in (3.0, 9.0, 1.0)
    ]
    found = {
        "placement": "cpu",
        "cut": {"prefill": 0, "decode": 0},
        "estimate": estimate,
        "uncorrected": {"ttft_s": 1.8, "tpot_s": 0.4},
        "runs": runs,
    }
    first, later = rows_of(cpu_cells()[0], found, 0)
    assert (first["uncorrected_s"], later["uncorrected_s"]) == (1.8, 0.4)
    assert (first["phase"], first["predicted_s"], first["measured_s"]) == ("ttft", 2.0, 3.0)
    assert (first["low_s"], first["high_s"]) == (1.5, 2.5)
    assert (later["phase"], later["predicted_s"], later["measured_s"]) == ("tpot", 0.5, 0.3)
    assert (later["low_s"], later["high_s"]) == (None, None)
    assert first["terms"] == {"dense": {"predicted_s": 2.0, "measured_s": 3.0}}
    assert later["terms"] == {
        "dense": {"predicted_s": 0.5, "measured_s": 0.0},
        "host": {"predicted_s": 0.0, "measured_s": 0.3},
    }
    assert (first["sources"], later["sources"]) == ({}, {"measured": 1.0})


def test_a_summary_has_phases_and_the_terms_that_count() -> None:
    """A router that takes a hundredth of the phase is left out."""
    found = summary(emulated_rows("a", "split", 1, 2.0, 0.1))
    by_phase = found["errors"]["emulated"]
    assert {phase: each["n"] for phase, each in by_phase.items()} == {
        "ttft": 1,
        "tpot": 1,
        "both": 2,
    }
    assert by_phase["both"]["median_error"] == pytest.approx(0.5)
    assert by_phase["both"]["uncorrected_median_error"] == pytest.approx(0.1)
    assert by_phase["both"]["bias"] == pytest.approx(math.log(2))
    terms = found["terms"]["emulated"]
    assert set(terms) == {"prefill experts", "decode experts"}
    # |0.25 - 0.99| / 0.99
    assert terms["decode experts"]["median_error"] == pytest.approx(0.74 / 0.99)
    assert terms["decode experts"]["median_share"] == pytest.approx(0.99)


def test_the_band_counts_the_rows_that_lie_in_it() -> None:
    rows = emulated_rows("a", "split", 1, 2.0, 0.1)
    rows[0] |= {"low_s": 1.5, "high_s": 2.5}
    rows[1] |= {"low_s": 0.2, "high_s": 0.3}
    by_phase = summary(rows)["errors"]["emulated"]
    shares = {phase: each["share_in_band"] for phase, each in by_phase.items()}
    assert shares == {"ttft": 1.0, "tpot": 0.0, "both": 0.5}


def test_a_command_keeps_names_of_files_and_all_else() -> None:
    argv = ["--cells", "cpu/dense", "--models", "/some/where/models", "--output=/else/out.json"]
    expected = ["--cells", "cpu/dense", "--models", "models", "--output=out.json"]
    assert without_folders(argv) == expected
