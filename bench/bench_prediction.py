"""How far is what hetero predicts from what it then measures, on cells the profile never saw?

A cell is a model, a format, a prompt length, a batch and a place to run; each runs in a process of
its own. Predicted is the plan's estimate, made before anything runs; measured is the median of some
runs after one that loads code. On the CPU: a dense and an MoE model, bfloat16, int8 and int4,
prompts of 32, 512 and 2048 tokens, 1, 4 and 16 of them, so that every two values of two factors
meet in a cell. On the emulated accelerator (its speeds are a CPU core's): the named strategies at
budgets that cut the model at other layers, and the planner's own choice beside them, which is to be
within 5 % of the fastest. What would change our mind: a median error above 8 % on the CPU or 12 %
on the emulated accelerator, a 90th percentile above 20 % or 25 %, or a bias of the size of the
error, which says that a cost is missing rather than noisy.

    python bench/bench_prediction.py [--quick] [--cells REGEX] [--list] [--repeat 3] [--models DIR]
                                     [--profile FILE] [--calibrate N] [--output FILE]

--calibrate runs other workloads of each model and format N times, as a user would, and then every
cell again: does hetero predict better where it has run? What it learns is kept in a folder of this
benchmark's own, and no cell learns from another. Of the second round two errors are told, with and
without what was learned: the machine itself may have changed since the first. Weights are random,
and so are the routers: they favour a few experts more than a trained one would. --quick has models
of 4 layers, which may stay in the caches of a large machine: it shows that the benchmark works, no
more.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice, pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cpu_kernels.threads import available_cores
from hetero.measure.fingerprint import cpu_model
from hetero.measure.store import default_cache_dir, kernel_cache_dir

if TYPE_CHECKING:
    from hetero.api import LLM, GenerationStep

Row = dict[str, Any]
Format = Literal["bf16", "int8", "int4", "float32"]
Accelerator = Literal["none", "emulated"]
Metric = Literal["ttft", "tpot"]
Shares = tuple[float, float]

COMMON = {
    "vocab_size": 16000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
# 16 layers: 0.60 B parameters, all of them used by a token.
DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1536,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 6144,
}
# 16 layers: 0.92 B parameters, of which a token uses 0.2 B.
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "intermediate_size": 2048,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
SHAPES: dict[str, dict[str, Any]] = {"dense": {**DENSE, **COMMON}, "moe": {**MOE, **COMMON}}
MODELS = tuple(SHAPES)
FORMATS: tuple[Format, ...] = ("bf16", "int8", "int4")
PROMPT_LENS = (32, 512, 2048)
BATCHES = (1, 4, 16)
NUM_LAYERS: dict[Accelerator, int] = {"none": 16, "emulated": 8}
QUICK_LAYERS = 4
OUTPUT_LENS: dict[Accelerator, int] = {"none": 33, "emulated": 17}
# What 16 prompts of 2048 tokens take is minutes.
MAX_PROMPT_TOKENS = 8192
# Beside the weights: cache, activations and the layers in transit.
HEADROOM_GB = 0.1
# Median and 90th percentile of the error.
TARGETS: dict[Accelerator, tuple[float, float]] = {"none": (0.08, 0.20), "emulated": (0.12, 0.25)}
METRICS: tuple[Metric, ...] = ("ttft", "tpot")
PHASES: dict[Metric, Literal["prefill", "decode"]] = {"ttft": "prefill", "tpot": "decode"}
# A term that takes less of its phase cannot spoil a prediction, and its own error says little.
MIN_TERM_SHARE = 0.02
AS_FAST = 1.05
PATH_OPTIONS = ("--profile", "--models", "--output")
MAKE_MODEL = Path(__file__).with_name("make_model.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one process predicts and measures.

    `strategy` is None for the planner's own choice. `shares` are the budgets of the accelerator and
    of the CPU as shares of the weights: where neither holds all of them, they decide between which
    layers a strategy cuts. None is as much as hetero gives.
    """

    model: str
    num_layers: int
    format: Format
    prompt_len: int
    num_seqs: int
    accelerator: Accelerator = "none"
    strategy: str | None = None
    shares: Shares | None = None

    @property
    def case(self) -> str:
        """Cells of one case differ in their placement only."""
        group = "cpu" if self.accelerator == "none" else self.accelerator
        shape = f"{self.prompt_len}x{self.num_seqs}"
        budget = "" if self.shares is None else "/{:.0%}+{:.0%}".format(*self.shares)
        return f"{group}/{self.folder}/{self.format}/{shape}{budget}"

    @property
    def name(self) -> str:
        if self.accelerator == "none":
            return self.case
        return f"{self.case}/{self.strategy or 'searched'}"

    @property
    def folder(self) -> str:
        return f"{self.model}-{self.num_layers}"

    @property
    def output_len(self) -> int:
        return OUTPUT_LENS[self.accelerator]


def cpu_cells() -> list[Cell]:
    """Half of all combinations, in which every two values of two factors meet (parity of indices).

    But for 16 prompts of 2048 tokens, which take too long.
    """
    return [
        Cell(
            model=model,
            num_layers=NUM_LAYERS["none"],
            format=kind,
            prompt_len=prompt_len,
            num_seqs=num_seqs,
        )
        for model, kind, prompt_len, num_seqs in product(MODELS, FORMATS, PROMPT_LENS, BATCHES)
        if prompt_len * num_seqs <= MAX_PROMPT_TOKENS
        and parity(model, kind, prompt_len, num_seqs) == 0
    ]


def parity(model: str, kind: Format, prompt_len: int, num_seqs: int) -> int:
    indices = (MODELS.index(model), FORMATS.index(kind))
    return sum((*indices, PROMPT_LENS.index(prompt_len), BATCHES.index(num_seqs))) % 2


def emulated_cells() -> list[Cell]:
    """Cases of several placements each: the strategies that apply, and the planner's choice."""
    cases: list[tuple[str, Format, int, int, Shares | None, tuple[str, ...]]] = [
        ("dense", "bf16", 512, 1, (0.8, 0.65), ("offload", "split")),
        ("dense", "float32", 32, 4, (0.55, 0.9), ("offload", "split")),
        ("dense", "bf16", 32, 1, None, ("gpu", "cpu")),
        ("moe", "bf16", 512, 1, (0.55, 0.9), ("offload", "split", "experts-on-cpu")),
        ("moe", "float32", 32, 1, (0.8, 0.65), ("offload", "split", "experts-on-cpu")),
        ("moe", "bf16", 32, 4, None, ("gpu", "cpu", "experts-on-cpu")),
    ]
    return [
        Cell(
            model=model,
            num_layers=NUM_LAYERS["emulated"],
            format=kind,
            prompt_len=prompt_len,
            num_seqs=num_seqs,
            accelerator="emulated",
            strategy=strategy,
            shares=shares,
        )
        for model, kind, prompt_len, num_seqs, shares, strategies in cases
        for strategy in (*strategies, None)
    ]


def quick_cells() -> list[Cell]:
    """Six small ones of both groups."""
    on_cpu: list[tuple[str, Format, int, int]] = [
        ("dense", "bf16", 512, 1),
        ("moe", "int8", 32, 4),
        ("moe", "int4", 32, 1),
    ]
    cells = [
        Cell(model=model, num_layers=QUICK_LAYERS, format=name, prompt_len=length, num_seqs=batch)
        for model, name, length, batch in on_cpu
    ]
    return cells + [
        Cell(
            model="moe",
            num_layers=QUICK_LAYERS,
            format="bf16",
            prompt_len=32,
            num_seqs=1,
            accelerator="emulated",
            strategy=strategy,
            shares=(0.8, 0.65),
        )
        for strategy in ("offload", "experts-on-cpu", None)
    ]


def calibration_cells(cells: Iterable[Cell], num_runs: int) -> list[Cell]:
    """So many runs of each model and format, with workloads that no cell has.

    Where cells of one have several placements they take turns.
    """
    by_model: dict[tuple[Accelerator, str, Format], dict[Cell, None]] = {}
    for cell in cells:
        # 200 tokens is no prompt length of a cell, 2 and 8 are no batches of one.
        fields = asdict(cell) | {"prompt_len": 200, "num_seqs": 8 if cell.num_seqs > 1 else 2}
        key = (cell.accelerator, cell.folder, cell.format)
        by_model.setdefault(key, {})[Cell(**fields)] = None
    return [run for runs in by_model.values() for run in islice(cycle(runs), num_runs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="six small cells, one run of each")
    parser.add_argument("--cells", type=re.compile, metavar="REGEX", help="those whose name has it")
    parser.add_argument("--list", action="store_true", help="names of the cells, and no more")
    parser.add_argument("--repeat", type=int, help="runs of a cell (default: 3, with --quick 1)")
    parser.add_argument("--profile", type=Path, help="of this machine; measured if left out")
    parser.add_argument("--models", type=Path, help="keep the models here, or use those there")
    parser.add_argument(
        "--calibrate", type=int, default=0, metavar="N", help="learn from N runs of each"
    )
    parser.add_argument("--output", type=Path, help="keep the rows so far here, too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(run_one(json.loads(args.one), args.profile, args.models)))
        return
    cells = quick_cells() if args.quick else [*cpu_cells(), *emulated_cells()]
    cells = [cell for cell in cells if args.cells is None or args.cells.search(cell.name)]
    if not cells:
        parser.error("no cell has that name; see --list")
    if args.list:
        print("\n".join(cell.name for cell in cells))
        return
    if (args.repeat is not None and args.repeat < 1) or args.calibrate < 0:
        parser.error("--repeat must be at least 1, --calibrate at least 0")
    if args.output is not None and not args.output.absolute().parent.is_dir():
        parser.error(f"--output: the folder of {args.output} is not there")
    with tempfile.TemporaryDirectory(prefix="hetero-bench-") as folder:
        bench = Bench(
            cells=cells,
            models=args.models or Path(folder, "models"),
            profile=args.profile or Path(folder, "profile.json"),
            caches=Path(folder),
            repeat=args.repeat or (1 if args.quick else 3),
        )
        print(json.dumps(report(bench, args), indent=2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What the processes of cells share: files, and how often each runs."""

    cells: Sequence[Cell]
    models: Path
    profile: Path
    caches: Path
    repeat: int


def report(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """All cells; with --calibrate the calibration runs, and all cells again."""
    learned = bench.caches / "learned"
    learned.mkdir()
    if args.profile is None:
        measure_profile(bench.profile, learned, quick=args.quick)
    for cell in bench.cells:
        make_model(bench.models / cell.folder, cell)
    profile = json.loads(bench.profile.read_text())
    document: dict[str, Any] = {
        "question": __doc__.partition("\n")[0],
        "environment": {
            "cpu": cpu_model(),
            "cores": available_cores(),
            "profile": {key: profile.get(key) for key in ("name", "measured_at", "notes")},
        },
        "command": ["python", "bench/bench_prediction.py", *without_folders(sys.argv[1:])],
        "rows": [],
        "refused": [],
        "summary": [],
    }
    run_round(bench, learned, document, 0, args.output)
    if args.calibrate:
        calibrate(bench, learned, args.calibrate)
        run_round(bench, learned, document, args.calibrate, args.output)
        show_change(*document["summary"])
    return document


def run_round(
    bench: Bench,
    learned: Path,
    document: dict[str, Any],
    num_calibration_runs: int,
    output: Path | None,
) -> None:
    """Every cell once; each begins with what was learned before the round, and with no more."""
    say(f"\nafter {num_calibration_runs} calibration runs")
    say(f"{'':56} {'predicted':>13} {'measured':>13}   error")
    for cell in bench.cells:
        with tempfile.TemporaryDirectory(dir=bench.caches) as cache:
            shutil.copytree(learned, cache, dirs_exist_ok=True)
            found = spawn(bench, cell, Path(cache), repeat=bench.repeat, is_warmed=True)
        if "refused" in found:
            document["refused"].append({"cell": cell.name, "reason": found["refused"]})
            say(f"{cell.name:56} refused: {found['refused'][:90]}")
            continue
        rows = rows_of(cell, found, num_calibration_runs)
        document["rows"] += rows
        tell(rows)
        write(document, output)
    ours = [row for row in document["rows"] if row["num_calibration_runs"] == num_calibration_runs]
    document["summary"].append(
        {"num_calibration_runs": num_calibration_runs, "num_cells": len(ours) // 2, **summary(ours)}
    )
    write(document, output)
    show_summary(document["summary"][-1])


def calibrate(bench: Bench, learned: Path, num_runs: int) -> None:
    """Generate as a user does, in processes that share what they learn."""
    before = contents(learned)
    for cell in calibration_cells(bench.cells, num_runs):
        say(f"calibration run: {cell.name}")
        found = spawn(bench, cell, learned, repeat=1, is_warmed=True)
        if "refused" in found:
            say(f"refused: {found['refused']}")
    if contents(learned) == before:
        say("warning: the calibration runs left nothing behind; the next round is the same again")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def measure_profile(file: Path, cache: Path, *, quick: bool) -> None:
    """In a fresh process, as a user does it."""
    command = [sys.executable, "-m", "hetero", "profile", "-o", str(file)]
    command += ["--quick"] if quick else []
    subprocess.run(command, check=True, env=environment(cache), stdout=sys.stderr)


def make_model(folder: Path, cell: Cell) -> None:
    if (folder / "config.json").exists():
        return
    config = json.dumps(SHAPES[cell.model] | {"num_hidden_layers": cell.num_layers})
    subprocess.run(
        [sys.executable, str(MAKE_MODEL), str(folder)], input=config, check=True, text=True
    )


def environment(cache: Path) -> dict[str, str]:
    """The own environment with another cache folder; compiled kernels stay where they are."""
    kernels = os.environ.get("HETERO_KERNEL_CACHE")
    if kernels is None:
        kernels = str(kernel_cache_dir(default_cache_dir(os.environ)))
    return {**os.environ, "HETERO_KERNEL_CACHE": kernels, "XDG_CACHE_HOME": str(cache)}


def spawn(bench: Bench, cell: Cell, cache: Path, *, repeat: int, is_warmed: bool) -> dict[str, Any]:
    """Run a cell in a process of its own: memory is given back, nothing is warm."""
    task = {"cell": asdict(cell), "repeat": repeat, "is_warmed": is_warmed}
    command = [sys.executable, __file__, "--one", json.dumps(task)]
    command += ["--profile", str(bench.profile), "--models", str(bench.models)]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment(cache), text=True)
    if done.returncode != 0:
        return {"refused": f"the process ended with {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_one(task: dict[str, Any], profile: Path, models: Path) -> dict[str, Any]:
    """Predict and measure one cell; in a child process."""
    import msgspec

    from hetero import LLM
    from hetero.errors import HeteroError
    from planner.cost_model import CostModel
    from planner.estimate import estimate
    from planner.workload import Workload

    cell = msgspec.convert(task["cell"], Cell)
    folder = models / cell.folder
    gpu_mem_gb, cpu_mem_gb = budgets_gb(cell, folder)
    quantization: Any = cell.format if cell.format in ("int8", "int4") else None
    try:
        with LLM(
            folder,
            profile=str(profile),
            accelerator=cell.accelerator,
            strategy=cell.strategy,
            dtype="float32" if cell.format == "float32" else "auto",
            quantization=quantization,
            gpu_mem_gb=gpu_mem_gb,
            cpu_mem_gb=cpu_mem_gb,
            workload=Workload(
                prompt_len=cell.prompt_len, output_len=cell.output_len, num_seqs=cell.num_seqs
            ),
        ) as llm:
            runs = measure(llm, cell, repeat=task["repeat"], is_warmed=task["is_warmed"])
            plan, placement = llm.plan, llm.plan.placement
            uncorrected = estimate(
                llm.spec,
                placement,
                CostModel(llm.hardware),
                plan.workload,
                num_concurrent=plan.estimate.num_concurrent_seqs,
            )
            return {
                "placement": placement.name,
                "cut": {"prefill": placement.prefill.cut, "decode": placement.decode.cut},
                "estimate": msgspec.to_builtins(plan.estimate),
                "uncorrected": {"ttft_s": uncorrected.ttft_s, "tpot_s": uncorrected.tpot_s},
                "runs": runs,
            }
    except HeteroError as error:
        return {"refused": str(error)}


def budgets_gb(cell: Cell, folder: Path) -> tuple[float | None, float | None]:
    """Memory of the accelerator and of the CPU; the files hold two bytes a weight."""
    if cell.shares is None:
        return None, None
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    num_bytes *= 2 if cell.format == "float32" else 1
    on_gpu, on_cpu = (share * num_bytes / 1e9 + HEADROOM_GB for share in cell.shares)
    return on_gpu, on_cpu


def measure(llm: LLM, cell: Cell, *, repeat: int, is_warmed: bool) -> list[dict[str, Any]]:
    """Times of some runs, each of other prompts, and their terms by phase."""
    from hetero import SamplingParams

    draw = random.Random(0)
    prompts = [
        [
            {"prompt_token_ids": draw.choices(range(3, llm.spec.vocab_size), k=cell.prompt_len)}
            for _ in range(cell.num_seqs)
        ]
        for _ in range(repeat + 1)
    ]
    if is_warmed:
        few = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        llm.generate(prompts[-1], few)  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=cell.output_len, temperature=0.0, ignore_eos=True)
    runs = []
    for run in prompts[:-1]:
        steps: list[tuple[float, GenerationStep]] = []
        begin_s = time.perf_counter()

        def observe(step: GenerationStep) -> None:
            steps.append((time.perf_counter(), step))  # noqa: B023

        llm.generate(run, params, observe=observe)  # type: ignore[arg-type]
        assert llm.measured is not None
        times = {"ttft_s": llm.measured.ttft_s, "tpot_s": llm.measured.tpot_s}
        runs.append({**times, "terms": terms_of(steps, begin_s)})
    return runs


def terms_of(
    steps: Sequence[tuple[float, GenerationStep]], begin_s: float
) -> dict[str, dict[str, float]]:
    """Seconds by term as an estimate has them: of all prefill steps, of a mean decode step.

    `host` is what a step takes beside its timeline.
    """
    terms: dict[str, dict[str, float]] = {"prefill": {}, "decode": {}}
    num_decode_steps = sum(step.result.batch.shape.phase == "decode" for _, step in steps)
    for end_s, step in steps:
        timeline, phase = step.result.timeline, step.result.batch.shape.phase
        seconds: dict[str, float] = {term: each for term, each in timeline.by_term().items()}
        seconds["host"] = max(0.0, end_s - begin_s - timeline.makespan_s)
        begin_s = end_s
        count = num_decode_steps if phase == "decode" else 1
        for term, taken in seconds.items():
            terms[phase][term] = terms[phase].get(term, 0.0) + taken / count
    return terms


def rows_of(cell: Cell, found: Mapping[str, Any], num_calibration_runs: int) -> list[Row]:
    """A row of the time to the first token, and one of the time between tokens."""
    estimate, runs = found["estimate"], found["runs"]
    rows = []
    for metric in METRICS:
        low_s, high_s = estimate["band_by_metric"].get(f"{metric}_s", (None, None))
        rows.append(
            {
                "cell": cell.name,
                "case": cell.case,
                "placement": found["placement"],
                "accelerator": cell.accelerator,
                "phase": metric,
                "predicted_s": estimate[f"{metric}_s"],
                "uncorrected_s": found["uncorrected"][f"{metric}_s"],
                "measured_s": statistics.median(run[f"{metric}_s"] for run in runs),
                "low_s": low_s,
                "high_s": high_s,
                "measured_runs_s": [run[f"{metric}_s"] for run in runs],
                "num_calibration_runs": num_calibration_runs,
                "calibrated_runs": estimate["calibrated_runs"],
                "model": cell.folder,
                "quantization": cell.format,
                "prompt_len": cell.prompt_len,
                "output_len": cell.output_len,
                "num_seqs": cell.num_seqs,
                "strategy": cell.strategy,
                "cut": found["cut"],
                "sources": estimate["source_by_phase"].get(PHASES[metric], {}),
                "terms": dict(both_terms(estimate, runs, PHASES[metric])),
            }
        )
    return rows


def both_terms(
    estimate: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], phase: str
) -> Iterator[tuple[str, dict[str, float]]]:
    """Predicted and measured seconds of every term that is not empty."""
    ours = estimate["terms_by_phase"][phase]
    theirs = [run["terms"][phase] for run in runs]
    for term in sorted({*ours, *theirs[0]}):
        predicted = ours.get(term, 0.0)
        measured = statistics.median(terms.get(term, 0.0) for terms in theirs)
        if predicted > 0 or measured > 0:
            yield term, {"predicted_s": predicted, "measured_s": measured}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One prediction and what came of it."""

    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        return abs(self.predicted_s - self.measured_s) / self.measured_s


def errors(pairs: Sequence[Pair]) -> dict[str, Any]:
    """How many, the median and the 90th percentile of the error, and the bias.

    The bias is the median logarithm of measured over predicted, where anything was predicted: above
    0, hetero promised too much. Percentiles lie between two values in proportion.
    """
    sizes = sorted(pair.error for pair in pairs)
    logs = [math.log(pair.measured_s / pair.predicted_s) for pair in pairs if pair.predicted_s > 0]
    at = 0.9 * (len(sizes) - 1)
    below = sizes[math.floor(at)]
    return {
        "n": len(sizes),
        "median_error": statistics.median(sizes),
        "p90_error": below + (at - math.floor(at)) * (sizes[math.ceil(at)] - below),
        "bias": statistics.median(logs) if logs else None,
    }


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Errors of each group by phase and by term, and how often the planner chose well."""
    document: dict[str, Any] = {"errors": {}, "terms": {}}
    for accelerator in TARGETS:
        mine = [row for row in rows if row["accelerator"] == accelerator]
        if not mine:
            continue
        found: dict[str, Any] = {}
        for phase in (*METRICS, "both"):
            those = [row for row in mine if phase in (row["phase"], "both")]
            plain = errors([pair_of(row, "uncorrected_s") for row in those])
            found[phase] = {
                **errors([pair_of(row) for row in those]),
                "uncorrected_median_error": plain["median_error"],
                **in_band(those),
            }
        document["errors"][accelerator] = found
        document["terms"][accelerator] = term_errors(mine)
    document["ranking"] = ranking(rows)
    return document


def pair_of(row: Mapping[str, Any], predicted: str = "predicted_s") -> Pair:
    return Pair(predicted_s=row[predicted], measured_s=row["measured_s"])


def in_band(rows: Sequence[Row]) -> dict[str, float]:
    """The share of rows whose measured time lies in the predicted band, where there are bands."""
    known = [row for row in rows if row["low_s"] is not None and row["high_s"] is not None]
    if not known:
        return {}
    hits = sum(row["low_s"] <= row["measured_s"] <= row["high_s"] for row in known)
    return {"share_in_band": hits / len(known)}


def term_errors(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Errors of `prefill experts` and so on, and the median share that the term has of its phase.

    Only where it takes a share that counts, and some time at all.
    """
    pairs: dict[str, list[Pair]] = {}
    shares: dict[str, list[float]] = {}
    for row in rows:
        whole_s = sum(term["measured_s"] for term in row["terms"].values())
        for name, term in row["terms"].items():
            seconds = max(term["measured_s"], term["predicted_s"])
            if term["measured_s"] > 0 and seconds >= MIN_TERM_SHARE * whole_s:
                key = f"{PHASES[row['phase']]} {name}"
                pairs.setdefault(key, []).append(pair_of(term))
                shares.setdefault(key, []).append(term["measured_s"] / whole_s)
    return {
        key: {**errors(pairs[key]), "median_share": statistics.median(shares[key])}
        for key in sorted(pairs, key=lambda key: -statistics.median(shares[key]))
    }


def ranking(rows: Sequence[Row]) -> dict[str, Any]:
    """Was the planner's choice the fastest placement, or within 5 % of it, by measured time?

    Cells of one case that ran one placement (the choice is often a named strategy) are one
    placement, measured several times: their median counts.
    """
    cases: dict[str, dict[str, list[float]]] = {}
    choices: dict[str, str] = {}
    for first, later in pairs_of_phases(rows):
        if first["accelerator"] == "none":
            continue
        placement = f"{first['placement']} {first['cut']['prefill']},{first['cut']['decode']}"
        e2e_s = first["measured_s"] + (first["output_len"] - 1) * later["measured_s"]
        cases.setdefault(first["case"], {}).setdefault(placement, []).append(e2e_s)
        if first["strategy"] is None:
            choices[first["case"]] = placement
    found: list[Row] = []
    for case, choice in choices.items():
        e2e_s_by_placement = {name: statistics.median(all_s) for name, all_s in cases[case].items()}
        fastest = min(e2e_s_by_placement, key=lambda name: e2e_s_by_placement[name])
        ratio = e2e_s_by_placement[choice] / e2e_s_by_placement[fastest]
        if len(e2e_s_by_placement) > 1:
            found.append({"case": case, "chosen": choice, "fastest": fastest, "ratio": ratio})
    share = sum(case["ratio"] <= AS_FAST for case in found) / len(found) if found else None
    return {"share_within": share, "cases": found}


def pairs_of_phases(rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """The two rows of every cell."""
    later = {row["cell"]: row for row in rows if row["phase"] == "tpot"}
    return ((row, later[row["cell"]]) for row in rows if row["phase"] == "ttft")


def tell(rows: Sequence[Row]) -> None:
    for row in rows:
        name = f"{row['cell']} {row['phase']}"
        say(
            f"{name:56} {1e3 * row['predicted_s']:10.2f} ms {1e3 * row['measured_s']:10.2f} ms "
            f"{pair_of(row).error:7.1%}"
        )


def show_summary(found: Mapping[str, Any]) -> None:
    """Errors beside their targets, then the terms, then the ranking."""
    say(f"\n{'':32} {'n':>3} {'median':>7} {'p90':>7} {'bias':>7}   target")
    for accelerator, by_phase in found["errors"].items():
        median, p90 = TARGETS[accelerator]
        for phase, each in by_phase.items():
            band = f"  {each['share_in_band']:.0%} in band" if "share_in_band" in each else ""
            say(
                f"{line_of(f'{group(accelerator)} {phase}', each)}   {median:.0%} / {p90:.0%}{band}"
            )
    for accelerator, by_term in found["terms"].items():
        for term, each in by_term.items():
            share = f"{each['median_share']:.0%} of the phase"
            say(f"{line_of(f'{group(accelerator)} {term}', each)}   {share}")
    for case in found["ranking"]["cases"]:
        say(
            f"{case['case']}: chose {case['chosen']}, fastest is {case['fastest']}, "
            f"{case['ratio']:.2f}x its time"
        )
    if found["ranking"]["share_within"] is not None:
        share = found["ranking"]["share_within"]
        say(f"the choice is within {AS_FAST - 1:.0%} of the fastest in {share:.0%} of the cases")


def show_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """The median error of each group and phase before the calibration runs, and after them.

    After them both ways: what the runs taught, and what it would have been without.
    """
    say(f"\nmedian error before and after {after['num_calibration_runs']} calibration runs")
    say(f"{'':32} {'before':>7} {'after':>7} {'after, not corrected':>21}")
    for accelerator, by_phase in before["errors"].items():
        for phase, each in by_phase.items():
            later = after["errors"].get(accelerator, {}).get(phase)
            changed = "nothing ran"
            if later is not None:
                plain = later["uncorrected_median_error"]
                changed = f"{later['median_error']:7.1%} {plain:21.1%}"
            say(f"{f'{group(accelerator)} {phase}':32} {each['median_error']:7.1%} {changed}")


def line_of(name: str, each: Mapping[str, Any]) -> str:
    bias = "never" if each["bias"] is None else f"{each['bias']:+.3f}"
    return f"{name:32} {each['n']:3} {each['median_error']:7.1%} {each['p90_error']:7.1%} {bias:>7}"


def group(accelerator: str) -> str:
    return "cpu" if accelerator == "none" else accelerator


def write(document: Mapping[str, Any], output: Path | None) -> None:
    """Keep what is there so far: a cut-off run loses one cell."""
    if output is not None:
        part = output.with_name(f"{output.name}.part")
        part.write_text(json.dumps(document, indent=2) + "\n")
        part.replace(output)


def without_folders(argv: Sequence[str]) -> list[str]:
    """The command with names only: where files lie on this machine is nobody's business."""
    parts = []
    for before, argument in pairwise(["", *argv]):
        option, equals, value = argument.partition("=")
        if before in PATH_OPTIONS:
            parts.append(Path(argument).name)
        elif equals and option in PATH_OPTIONS:
            parts.append(f"{option}={Path(value).name}")
        else:
            parts.append(argument)
    return parts


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
