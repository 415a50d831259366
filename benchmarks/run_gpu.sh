#!/usr/bin/env bash
# One command on a GPU machine: tests, certificate and speed grid, in less than nine minutes.
#
#   benchmarks/run_gpu.sh --out DIR
#
# Needs the repository, torch, triton, transformers, numpy, pytest and hypothesis. Each stage has a
# time limit; one that fails is recorded in DIR/stages.tsv and the next one runs. Exits 1 if any
# failed. DIR gets six files. STAGES="tests certificate grid" chooses some of the stages, PYTHON
# names the interpreter.
set -uo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }

out=
while (($#)); do
  case $1 in
    --out) out=${2:?--out needs a folder}; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "unknown argument $1: the only one is --out DIR" >&2; exit 2 ;;
  esac
done
[[ $out ]] || { echo "--out is missing: name a folder for the results" >&2; exit 2; }
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0
: > "$out/run.log"
printf 'stage\texit\tseconds\n' > "$out/stages.tsv"

# stage NAME LIMIT_S COMMAND...
stage() {
  local name=$1 limit=$2 code started=$SECONDS
  shift 2
  [[ " ${STAGES:-environment tests certificate grid} " == *" $name "* ]] || return 0
  echo "== $name" | tee -a "$out/run.log"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$out/run.log"
  code=${PIPESTATUS[0]}
  printf '%s\t%d\t%d\n' "$name" "$code" "$((SECONDS - started))" >> "$out/stages.tsv"
  ((code == 0)) || failed=1
}

stage environment 30 "$python" -c '
import json, sys
from benchmarks.results import describe_environment
record = json.dumps(describe_environment("cuda"), indent=1)
open(sys.argv[1], "w").write(record + "\n")
' "$out/environment.json"

# compiling kernels for every shape takes most of the time: one process per file shares the cores
run_tests() {
  local file pid pids=() code=0
  for file in tests/test_gpu_*.py tests/test_kernels_*.py tests/test_moe_dispatch.py; do
    "$python" -m pytest -q --maxfail=10 -p no:cacheprovider "$file" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=1; done
  return "$code"
}
export -f run_tests
export python
stage tests 200 bash -c run_tests

stage certificate 150 "$python" -m moe_emergence.verify \
  --device cuda --dtype fp32 bf16 fp16 --json "$out/certificate.json"

stage grid 155 "$python" -m benchmarks.grid --device cuda --out "$out" --time-limit 130

cat "$out/stages.tsv"
exit "$failed"
