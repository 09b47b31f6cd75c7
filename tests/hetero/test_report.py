"""Reports: digits and units, what a plan and a run look like, and that names are only text."""

from __future__ import annotations

from dataclasses import replace as replace_fields
from io import StringIO

import pytest
from msgspec.structs import replace
from rich.console import Console

from hetero.model_lookup import find_model, read_model_spec
from hetero.outputs import Measured
from hetero.planning import make_plan
from hetero.report import (
    bytes_text,
    calibration_lines,
    is_emulated,
    plan_lines,
    print_comparison,
    print_plan,
    print_terms,
    rate_text,
    ratio_text,
    seconds_text,
    where_text,
)
from planner.hardware import HardwareProfile
from planner.model_spec import ModelSpec
from planner.placement import ON_GPU, ModulePlacement, TierPlacement
from planner.plan import Alternative, Plan, Trial, TrialRow, TrialTimes
from planner.strategies import STRATEGIES
from planner.timeline import TermComparison
from planner.workload import Workload
from tests.machines import toy_machine
from tests.planner.tiny import tiny_spec

WORKLOAD = Workload(prompt_len=512, output_len=128, num_seqs=2)


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return read_model_spec(find_model())


@pytest.fixture(scope="module")
def hardware() -> HardwareProfile:
    """30 MB of accelerator memory: too little for all of the demo model and its activations."""
    return toy_machine().with_emulated_gpu(memory_bytes=30_000_000, link_bytes_per_s=4e9)


@pytest.fixture(scope="module")
def plan(spec: ModelSpec, hardware: HardwareProfile) -> Plan:
    return make_plan(spec, hardware, WORKLOAD, strategy="split")


def console(width: int) -> Console:
    return Console(width=width, file=StringIO(), color_system=None, highlight=False)


def printed(of: Console) -> list[str]:
    assert isinstance(of.file, StringIO)
    return of.file.getvalue().splitlines()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ms"),
        (0.0000123, "12.3 us"),
        (0.000999, "999 us"),
        (0.00099996, "1.00 ms"),
        (0.02764, "27.6 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.00 s"),
        (99.96, "100 s"),
        (600.0, "10.0 min"),
        (90000.0, "25.0 h"),
    ],
)
def test_seconds_have_three_digits(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_bytes_and_rates_have_three_digits() -> None:
    assert bytes_text(23_427_128) == "23.4 MB"
    assert bytes_text(141_590_000_000) == "142 GB"
    assert rate_text(6.6212) == "6.62 tokens/s"


@pytest.mark.parametrize(
    ("ratio", "text", "style"),
    [
        (1.25, "1.25x", ""),
        (1.26, "1.26x", "yellow"),
        (1.5, "1.50x", "yellow"),
        (1.51, "1.51x", "red"),
        (0.4, "0.40x", ""),
        (None, "-", ""),
    ],
)
def test_ratio_warns_by_its_size(ratio: float | None, text: str, style: str) -> None:
    found = ratio_text(ratio)
    assert (found.plain, found.style) == (text, style)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_plan_is_readable_at_every_width(plan: Plan, hardware: HardwareProfile, width: int) -> None:
    """No line is wider than the terminal; every section is there."""
    out = console(width)
    print_plan(out, plan, hardware)
    lines = printed(out)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    for words in (
        "demo on toy machine",
        "2 sequences of 512 prompt and 128 output tokens, for latency",
        "fits: split",
        "EMULATED, its speeds are not a GPU's",
        "gpu (emulated)",
        "first token",
        "time goes to",
    ):
        assert words in " ".join(text.split()), words


def test_the_only_token_is_the_first(plan: Plan, hardware: HardwareProfile) -> None:
    one = replace(plan, workload=replace(plan.workload, output_len=1))
    for each, is_told in ((plan, True), (one, False)):
        out = console(80)
        print_plan(out, each, hardware)
        assert ("each token" in "\n".join(printed(out))) == is_told


def test_plan_at_80_columns_has_aligned_numbers(plan: Plan, hardware: HardwareProfile) -> None:
    """The memory table, as a person sees it."""
    out = console(80)
    print_plan(out, plan, hardware)
    lines = printed(out)
    first = next(index for index, line in enumerate(lines) if line.startswith("memory "))
    heading, gpu, cpu = lines[first : first + 3]
    end = heading.index("may be used") + len("may be used")
    assert gpu.rstrip().endswith("28.8 MB") and len(gpu.rstrip()) == end
    assert cpu.rstrip().endswith(" GB") and len(cpu.rstrip()) == end


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        ("cpu", "attention cpu 6; experts cpu 6; head cpu"),
        ("split", "attention gpu 4, cpu 2; experts gpu 4, cpu 2; head gpu"),
        ("experts-on-cpu", "attention gpu 6; experts gpu 4, cpu 2; head gpu"),
        (
            "offload",
            "attention gpu 4, gpu (streamed) 2; experts gpu 4, gpu (streamed) 2; head gpu",
        ),
    ],
)
def test_where_counts_layers(spec: ModelSpec, strategy: str, text: str) -> None:
    """The demo has 6 layers; a cut of 2."""
    assert where_text(STRATEGIES[strategy](spec, "decode", 2)) == text


def test_caches_on_the_cpu_and_sub_batches_are_told(spec: ModelSpec) -> None:
    tier = STRATEGIES["gpu"](spec, "decode", 0)
    layers = (*tier.layers[:4], *(replace(layer, kv_on_cpu=True) for layer in tier.layers[4:]))
    text = where_text(replace(tier, layers=layers))
    caches = "caches of 2 of the gpu's layers on the cpu"
    assert text == f"attention gpu 6; {caches}; experts gpu 6; head gpu"
    divided = (*layers[:5], replace(layers[5], num_gpu_kv_tokens=48))
    text = where_text(replace(tier, layers=divided))
    assert f"{caches} from token 48 on in 1 of them; experts" in text
    divided = (*divided[:4], replace(layers[4], num_gpu_kv_tokens=48), divided[5])
    assert f"{caches} from token 48 on; experts" in where_text(replace(tier, layers=divided))
    text = where_text(replace(tier, num_second_seqs=12))
    apart = "in two sub-batches: 12 sequences keep their caches on the cpu"
    assert text == f"attention gpu 6; experts gpu 6; head gpu; {apart}"


def test_a_tier_for_smaller_steps_has_a_line_of_its_own(
    spec: ModelSpec, plan: Plan, hardware: HardwareProfile
) -> None:
    whole = plan.placement.decode
    tier = replace(whole, max_num_tokens=1)
    tiered = replace(plan, placement=replace(plan.placement, smaller=(tier,)))
    (line,) = [each for each in plan_lines(tiered, hardware) if "of up to" in each]
    assert line == f"decode of up to 1 sequence: split {whole.cut} ({where_text(whole)})"


def _with_experts(spec: ModelSpec, places: list[ModulePlacement]) -> TierPlacement:
    """The demo's tier on the GPU, with the experts of each layer where they are said to be."""
    tier = STRATEGIES["gpu"](spec, "decode", 0)
    layers = tuple(
        replace(layer, ffn=place) for layer, place in zip(tier.layers, places, strict=True)
    )
    return replace(tier, layers=layers, num_expert_slots=2)


CPU = ModulePlacement(lives="cpu", runs="cpu")
STREAM = ModulePlacement(lives="cpu", runs="stream")
SPLIT = ModulePlacement(lives="cpu", runs="split")


@pytest.mark.parametrize(
    ("places", "text"),
    [
        (
            [CPU, CPU, CPU, *[replace(CPU, num_resident=3)] * 2, replace(CPU, num_resident=4)],
            "3 layers on the cpu, 2 layers with 3 of 16 on the gpu (the rest on the cpu), "
            "1 layer with 4 of 16 on the gpu (the rest on the cpu)",
        ),
        (
            [ON_GPU, CPU, *(replace(CPU, num_resident=count) for count in (5, 2, 3, 2))],
            "1 layer on the gpu, 1 layer on the cpu, 4 layers with 2 to 5 of 16 on the gpu "
            "(the rest on the cpu)",
        ),
        (
            [STREAM, replace(STREAM, num_resident=1), SPLIT, *[replace(SPLIT, num_resident=2)] * 3],
            "1 layer streamed to the gpu, 1 layer with 1 of 16 on the gpu (the rest streamed), "
            "1 layer split, 3 layers with 2 of 16 on the gpu (the rest split)",
        ),
    ],
)
def test_experts_in_both_memories_are_counted_by_layers(
    spec: ModelSpec, places: list[ModulePlacement], text: str
) -> None:
    """The demo has 16 experts in each layer; a plan alone does not say of how many."""
    tier = _with_experts(spec, places)
    assert where_text(tier, spec) == f"attention gpu 6; experts: {text}; head gpu"
    assert where_text(tier) == where_text(tier, spec).replace("of 16", "experts")


def test_divided_feed_forwards_are_counted_by_layers() -> None:
    """By the shares of their columns on the GPU, of 16."""
    spec = tiny_spec("dddd")
    tier = STRATEGIES["gpu"](spec, "decode", 0)
    places = [ON_GPU, replace(CPU, num_resident=3), *[replace(STREAM, num_resident=13)] * 2]
    layers = (replace(each, ffn=place) for each, place in zip(tier.layers, places, strict=True))
    assert where_text(replace(tier, layers=tuple(layers)), spec) == (
        "attention gpu 4; feed-forward: 1 layer on the gpu, 2 layers with 13 of 16 shares on the "
        "gpu (the rest streamed), 1 layer with 3 of 16 shares on the gpu (the rest on the cpu); "
        "head gpu"
    )


def test_summary_has_a_line_for_each_question(plan: Plan, hardware: HardwareProfile) -> None:
    """What, on what, prefill, decode, memory, speed, its band, what it rests on."""
    words = [line.partition(":")[0] for line in plan_lines(plan, hardware)]
    assert words == [
        *("plan", "machine", "prefill", "decode", "memory", "predicted"),
        *("4 of 5 such predictions end in", "beyond what was measured"),
    ]


def test_a_machine_without_gpu_is_said_to_be_one(spec: ModelSpec) -> None:
    hardware = toy_machine()
    lines = plan_lines(make_plan(spec, hardware, WORKLOAD), hardware)
    assert lines[1] == "machine: toy machine: CPU only, no accelerator is used (measured rates)"


def test_an_accelerator_that_is_not_used_is_not_shown(
    spec: ModelSpec, hardware: HardwareProfile
) -> None:
    """Neither as emulated nor with its memory; why, where another plan was slower."""
    made = make_plan(spec, hardware, WORKLOAD, strategy="cpu")
    lines = plan_lines(made, hardware)
    assert lines[1] == (
        "machine: toy machine + emulated accelerator: the accelerator is not used (measured rates)"
    )
    assert "gpu" not in lines[4]
    assert not is_emulated(made)
    slower = Alternative(
        name="gpu",
        cut_by_phase={},
        feasible=True,
        ttft_s=1.0,
        tpot_s=1.0,
        e2e_s=1.0,
        reason="slower",
    )
    line = plan_lines(replace(made, alternatives=(slower,)), hardware)[1]
    assert "the accelerator is not used: all on the CPU is predicted to be faster" in line


def test_names_are_neither_markup_nor_commands(
    spec: ModelSpec, plan: Plan, hardware: HardwareProfile
) -> None:
    """A model's name comes from whoever named its folder."""
    hostile = replace(plan, model="[red]evil[/red] \x1b[2J")
    out = console(120)
    print_plan(out, hostile, hardware)
    assert printed(out)[0].startswith("[red]evil[/red] ?[2J on toy machine")
    assert plan_lines(hostile, hardware)[0].startswith("plan: [red]evil[/red] ?[2J, 2 sequences")


def test_infeasible_plan_shows_what_is_too_much(spec: ModelSpec) -> None:
    hardware = toy_machine().with_memory(cpu_bytes=10_000_000, gpu_bytes=None)
    out = console(80)
    print_plan(out, make_plan(spec, hardware, WORKLOAD), hardware)
    lines = printed(out)
    assert "does not fit; the nearest miss is: cpu" in lines
    assert any(line.split()[-2:] == ["9.00", "MB"] for line in lines if line.startswith("cpu"))


def test_comparison_has_measured_over_predicted() -> None:
    """Twice the time is 2.00x; half the rate is 0.50x."""
    predicted = Measured(
        ttft_s=0.1, tpot_s=0.01, e2e_s=1.37, prefill_tokens_per_s=1000, decode_tokens_per_s=100
    )
    measured = replace_fields(predicted, tpot_s=0.02, decode_tokens_per_s=50.0)
    out = console(80)
    print_comparison(out, predicted, measured)
    cells = [line.split("  ") for line in printed(out)]
    rows = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in cells}
    assert rows["first token"] == ["100 ms", "100 ms", "1.00x"]
    assert rows["each token"] == ["10.0 ms", "20.0 ms", "2.00x"]
    assert rows["decode"] == ["100 tokens/s", "50.0 tokens/s", "0.50x"]


def test_an_emulated_run_is_labelled() -> None:
    speed = Measured(
        ttft_s=0.1, tpot_s=0.0, e2e_s=0.1, prefill_tokens_per_s=1000, decode_tokens_per_s=0
    )
    out = console(80)
    print_comparison(out, speed, speed, is_emulated=True)
    lines = printed(out)
    assert lines[0].startswith("this run (emulated)")
    assert not any(line.startswith("decode") for line in lines), "nothing was decoded"


def test_terms_add_up_to_the_step() -> None:
    terms = (
        TermComparison(term="attention", predicted_s=0.001, measured_s=0.002),
        TermComparison(term="wait", predicted_s=0.0, measured_s=0.001),
    )
    out = console(80)
    print_terms(out, "decode", terms)
    assert [" ".join(line.split()) for line in printed(out)] == [
        "last decode step predicted measured ratio",
        "attention 1.00 ms 2.00 ms 2.00x",
        "wait 0 ms 1.00 ms -",
        "step 1.00 ms 3.00 ms 3.00x",
    ]


def corrected(plan: Plan, **factors: float) -> list[str]:
    """What is said of a plan whose decode spends 60 ms in experts and 2 ms in the head."""
    names = {name.replace("_", " "): factor for name, factor in factors.items()}
    est = replace(
        plan.estimate,
        calibrated_runs=7,
        terms_by_phase={"prefill": {"experts": 1.0}, "decode": {"experts": 0.060, "head": 0.002}},
        correction_by_phase={"prefill": {}, "decode": names},
    )
    return calibration_lines(est)


def test_a_prediction_without_runs_says_nothing_of_calibration(plan: Plan) -> None:
    assert calibration_lines(plan.estimate) == []


def test_only_corrections_that_matter_are_told(plan: Plan) -> None:
    """A factor within 3 %, or of a term below 5 % of its phase, changes nothing to speak of."""
    assert corrected(plan, cpu_experts=1.08, gpu_experts=1.02, cpu_head=1.5) == [
        "calibrated from 7 runs",
        "corrected in decode: cpu experts 1.08x",
    ]


def test_a_correction_at_its_bound_asks_for_a_new_measurement(plan: Plan) -> None:
    *_, last = corrected(plan, cpu_experts=2.0, cpu_head=0.5)
    assert last.startswith("warning: runs are further off the prediction than is corrected")
    assert last.endswith("in decode cpu experts; measure the machine again with: hetero profile")


def tried(name: str, *, predicted_s: float, measured_s: float | None) -> TrialRow:
    def times(seconds: float) -> TrialTimes:
        return TrialTimes(ttft_s=seconds, tpot_s=seconds / 10, e2e_s=2 * seconds)

    return TrialRow(
        name=name,
        cut_by_phase={"prefill": 1, "decode": 1},
        predicted=times(predicted_s),
        measured=None if measured_s is None else times(measured_s),
        failure=None if measured_s is not None else "needs 3.00 GB [on] the gpu",
    )


def test_a_trial_is_a_table_of_predicted_and_measured(
    plan: Plan, hardware: HardwareProfile
) -> None:
    rows = (
        tried("split", predicted_s=1.0, measured_s=2.0),
        tried("cpu", predicted_s=1.5, measured_s=1.2),
        tried("gpu", predicted_s=1.0, measured_s=None),
    )
    workload = Workload(prompt_len=512, output_len=9)
    found = Trial(workload=workload, rows=rows, kept="cpu")
    to = console(100)
    print_plan(to, replace(plan, trial=found), hardware)
    lines = [" ".join(line.split()) for line in printed(to)]
    assert "split 1.00 s 2.00 s 100 ms 200 ms 2.00x" in lines
    assert "cpu 1.50 s 1.20 s 150 ms 120 ms 0.80x kept" in lines
    assert "gpu 1.00 s - 100 ms - - needs 3.00 GB [on] the gpu" in lines
    assert any(line.endswith("the plan changed: cpu instead of split") for line in lines)


@pytest.mark.parametrize(
    ("names", "words"),
    [(("split", "cpu"), "the plan stands: split is"), (("split",), "no other placement fits")],
)
def test_a_trial_that_changes_nothing_says_so(
    plan: Plan, hardware: HardwareProfile, names: tuple[str, ...], words: str
) -> None:
    rows = tuple(tried(name, predicted_s=1.0, measured_s=1.0) for name in names)
    to = console(100)
    found = Trial(workload=WORKLOAD, rows=rows, kept="split")
    print_plan(to, replace(plan, trial=found), hardware)
    assert any(words in line for line in printed(to))


def test_a_plan_says_how_much_faster_any_other_could_be(
    plan: Plan, hardware: HardwareProfile
) -> None:
    """Where there is a choice: on the CPU alone there is none."""
    both, alone = console(120), console(120)
    print_plan(both, replace(plan, optimality_gap=0.0123), hardware)
    print_plan(alone, plan, toy_machine())
    assert any(
        "none of all placements searched takes more than 1.2% less time" in line
        for line in printed(both)
    )
    assert not any("proven" in line for line in printed(alone))
