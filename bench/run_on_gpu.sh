#!/usr/bin/env bash
# Everything that only a GPU machine can tell, in under ten minutes:
#   bash bench/run_on_gpu.sh RESULTS_FOLDER
# writes there: facts of the machine, its full profile, the gpu tests, every strategy at 25, 50 and
# 100% of a 1 B model, and decode attention. The profile belongs in profiles/machines/.
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
model=$(mktemp -d)
timeout 60 python3 bench/bench_vs_transformers.py --folder "$model" --make-only
timeout 200 python3 bench/bench_strategies.py --model "$model" --accelerator cuda \
    >"$out/strategies.json" 2>"$out/strategies.txt"
rm -rf "$model"
tail -n 3 "$out"/*.txt
