#!/usr/bin/env bash
# Everything that only a GPU machine can tell, in under ten minutes:
#   bash bench/run_on_gpu.sh RESULTS_FOLDER
# writes there: facts of the machine, its full profile, the gpu tests, and what plans, strategies and
# accelerate reach under small GPU budgets. The profile belongs in profiles/machines/.
set -uo pipefail
out=${1:?usage: bash bench/run_on_gpu.sh RESULTS_FOLDER}
cd "$(dirname "$0")/.."
mkdir -p "$out"
export PYTHONPATH=. PYTHONUNBUFFERED=1 XDG_CACHE_HOME=${XDG_CACHE_HOME:-/tmp/hetero-cache}

{
    lscpu
    grep -o -w -E 'amx[^ ]*|avx512[^ ]*' /proc/cpuinfo | sort | uniq -c
    nvidia-smi
    nvidia-smi --query-gpu=name,pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current --format=csv
    python3 -m hetero doctor
} >"$out/machine.txt" 2>&1

timeout 120 python3 -m hetero profile -o "$out/profile.json" >"$out/profile.txt" 2>&1
timeout 200 python3 -m pytest -q -m gpu --timeout 150 >"$out/pytest_gpu.txt" 2>&1
timeout 260 python3 bench/bench_hybrid.py --accelerator cuda --minutes 4 \
    --profile "$out/profile.json" --output "$out/hybrid.json" >/dev/null 2>"$out/hybrid.txt"
tail -n 3 "$out"/*.txt
