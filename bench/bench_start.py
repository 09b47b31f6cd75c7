"""How long does a process take until its first product, cold (nothing compiled) and warm?

Every time is of fresh processes, the median of five. Imports: what a module takes, and whether it
brings numba or torch with it. Kernels: one linear, one experts and one attention call, first with
an empty folder of object code, then with what that process left there. Runs: `hetero run` of the
demo model for one token, beside `import torch`, which it cannot do without. What would change our
mind about object code on disk: a warm process that imports numba, or whose first calls take more
than a tenth of a second.

    python bench/bench_start.py [--quick] [--repetitions 5]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER_VARIABLE = "HETERO_KERNEL_CACHE"
# The first is what any process takes; numpy and llvmlite are parts of those below them.
MODULES = (
    "sys",
    "numpy",
    "llvmlite.binding",
    "cpu_kernels.formats",
    "cpu_kernels.compiling",
    "cpu_kernels.calls",
    "cpu_kernels.linear",
    "cpu_kernels.experts",
    "cpu_kernels.attention",
    "cpu_kernels.elementwise",
    "cpu_kernels.memory_read",
    "planner",
    "hetero",
    "numba",
    "torch",
)
QUICK_MODULES = ("sys", "numpy", "cpu_kernels.linear", "numba")
CALLS = ("linear", "experts", "attention")
IMPORT = """
import sys, time
begin = time.perf_counter()
import {module}
print(time.perf_counter() - begin, "numba" in sys.modules, "torch" in sys.modules)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few modules, one repetition")
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--call-kernels", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call_kernels:
        print(json.dumps(call_kernels()))
        return
    repetitions = args.repetitions or (1 if args.quick else 5)
    with tempfile.TemporaryDirectory(prefix="hetero-bench-") as folder:  # of mode 0700
        rows = kernel_rows(Path(folder), repetitions)
    for module in QUICK_MODULES if args.quick else MODULES:
        rows.append(import_row(module, repetitions))
    rows += run_rows(repetitions)
    document = {
        "question": __doc__.partition("\n")[0],
        "environment": environment(),
        "command": ["python", "bench/bench_start.py", *sys.argv[1:]],
        "rows": rows,
    }
    print(json.dumps(document, indent=2))


def kernel_rows(folder: Path, repetitions: int) -> list[dict[str, Any]]:
    """The first calls with an empty folder, then with one that is filled."""
    cold: list[dict[str, Any]] = []
    warm: list[dict[str, Any]] = []
    for number in range(repetitions):
        kernels = folder / str(number)
        kernels.mkdir(mode=0o700)
        for found in (cold, warm):
            seconds, printed = timed(
                [sys.executable, __file__, "--call-kernels"], {FOLDER_VARIABLE: str(kernels)}
            )
            found.append({"process_s": seconds, **json.loads(printed)})
    rows = []
    for name, runs in (("kernels, empty folder", cold), ("kernels, filled folder", warm)):
        row: dict[str, Any] = {"what": name}
        for key in runs[0]:
            values = [run[key] for run in runs]
            row[key] = values[0] if isinstance(values[0], bool) else statistics.median(values)
        rows.append(row)
        say(row)
    return rows


def import_row(module: str, repetitions: int) -> dict[str, Any]:
    """A module in processes that have imported nothing else."""
    process_s, import_s, brought = [], [], ["", ""]
    for _ in range(repetitions):
        seconds, printed = timed([sys.executable, "-c", IMPORT.format(module=module)], {})
        first, *brought = printed.split()
        process_s.append(seconds)
        import_s.append(float(first))
    row = {
        "what": f"import {module}",
        "process_s": statistics.median(process_s),
        "import_s": statistics.median(import_s),
        "imports_numba": brought[0] == "True",
        "imports_torch": brought[1] == "True",
    }
    say(row)
    return row


def run_rows(repetitions: int) -> list[dict[str, Any]]:
    """`hetero run` for one token once everything is compiled and measured, and `import torch`."""
    python = sys.executable
    hetero_run = [
        python,
        "-m",
        "hetero",
        "run",
        "-p",
        "x",
        "--max-tokens",
        "1",
        "--progress",
        "none",
    ]
    commands = {"hetero run, one token": hetero_run, "import torch": [python, "-c", "import torch"]}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(repetitions + 1):
        for name, command in commands.items():
            process_s, _ = timed(command, {})
            if number:  # the first one may have measured the machine
                seconds[name].append(process_s)
    rows = [
        {"what": name, "process_s": statistics.median(times)} for name, times in seconds.items()
    ]
    for row in rows:
        say(row)
    return rows


def call_kernels() -> dict[str, Any]:
    """Import and call each kernel once: seconds of each, and what was compiled."""
    begin = time.perf_counter()
    import numpy as np

    from cpu_kernels.attention import decode_attention
    from cpu_kernels.compiling import listening
    from cpu_kernels.experts import PackedExperts, run_experts
    from cpu_kernels.formats import WeightFormat, pack
    from cpu_kernels.linear import PackedMatrix, linear
    from cpu_kernels.microkernels import fastest_compute
    from cpu_kernels.scratch import Scratch
    from cpu_kernels.threads import available_cores

    imported = time.perf_counter()
    num_threads, scratch = available_cores(), Scratch()
    weight_format = WeightFormat(kind="int8", group_size=128)
    compute = fastest_compute(weight_format)
    compiled: list[str] = []
    times = []
    with listening(compiled.append):
        blob = pack(np.ones((256, 256), np.float32), weight_format)
        x, y = np.ones((1, 256), np.float32), np.empty((1, 256), np.float32)
        times.append(time.perf_counter())
        matrix = PackedMatrix(blob=blob, weight_format=weight_format, num_rows=256, num_columns=256)
        linear(x, matrix, compute=compute, num_threads=num_threads, scratch=scratch, out=y)
        times.append(time.perf_counter())
        experts = PackedExperts(
            blob=np.tile(blob, 3 * 4),
            weight_format=weight_format,
            num_experts=4,
            hidden=256,
            width=256,
        )
        run_experts(
            x,
            experts,
            np.array([[1, 3]], np.int64),
            np.ones((1, 2), np.float32),
            compute=compute,
            num_threads=num_threads,
            scratch=scratch,
            out=y,
        )
        times.append(time.perf_counter())
        cache = np.zeros((2, 1, 16, 64), np.uint16)
        q = np.zeros((1, 4, 64), np.float32)
        decode_attention(
            q,
            cache,
            cache,
            np.zeros((1, 1), np.int32),
            np.full(1, 16, np.int32),
            scale=1.0,
            window=None,
            num_threads=num_threads,
            out=np.empty_like(q),
            lse=np.empty((1, 4), np.float32),
            scratch=scratch,
        )
        times.append(time.perf_counter())
    calls = zip(CALLS, times, times[1:], strict=False)
    return {
        "import_s": imported - begin,
        "pack_s": times[0] - imported,
        **{f"{name}_s": end - start for name, start, end in calls},
        "num_compiled": len(compiled),
        "imports_numba": "numba" in sys.modules,
        "imports_torch": "torch" in sys.modules,
    }


def timed(command: Sequence[str], variables: dict[str, str]) -> tuple[float, str]:
    """Seconds of a whole process, from the repository's root, and what it printed."""
    begin = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
    )
    seconds = time.perf_counter() - begin
    if done.returncode != 0:
        last = "\n".join(done.stderr.splitlines()[-5:])
        sys.exit(f"{' '.join(Path(part).name for part in command[:4])} failed:\n{last}")
    return seconds, done.stdout


def environment() -> dict[str, Any]:
    from cpu_kernels.threads import available_cores
    from hetero.measure.fingerprint import cpu_model

    packages = {name: version(name) for name in ("torch", "numba", "llvmlite", "numpy")}
    return {
        "cpu": cpu_model(),
        "cores": available_cores(),
        "python": platform.python_version(),
        **packages,
    }


def say(row: dict[str, Any]) -> None:
    facts = (
        f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if key != "what"
    )
    print(f"{row['what']:30} {', '.join(facts)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
