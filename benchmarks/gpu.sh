#!/usr/bin/env bash
# What only a GPU can tell: tests of the code that runs on it, the paper's run of addition whole, its study, and
# projections beside other libraries at the paper's size. A part that fails, or takes too long, leaves its log, and the
# next one goes on. The targets are three minutes for the basis, and three for the projections.
#
#   benchmarks/gpu.sh OUT                           on a GPU
#   PARTS="tests run" benchmarks/gpu.sh OUT         some parts; a run goes on where it was if POLCA_RUNS names its folder
#   DEVICE=cpu PRESET=smoke benchmarks/gpu.sh OUT   a rehearsal, in two minutes
#
# Without `make .venv/.peers` before, other libraries are left out. OUT gets a log of each part, seconds.csv, the tables
# of the study, and the records of the benchmark: a few MB.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?name a folder for what comes out}")
device=${DEVICE:-cuda} preset=${PRESET:-paper} parts=${PARTS:-tests run study projections}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
export POLCA_DEVICE=$device POLCA_STUDIES=$out/studies POLCA_RUNS=${POLCA_RUNS:-$(mktemp -d)}
settings=(--preset "$preset" --device "$device" --set projection.curvature=False --set projection.precision=bfloat16
          --set clustering.order=first --set basis.tolerance=0.001)
[ -e "$out/seconds.csv" ] || echo "part,limit_s,seconds,exit" > "$out/seconds.csv"
failed=0

part() {  # name, limit in seconds, command
  local name=$1 limit=$2 began=$SECONDS code=0
  [[ " $parts " = *" $name "* ]] || return 0
  shift 2
  timeout "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
  echo "$name,$limit,$((SECONDS - began)),$code" | tee -a "$out/seconds.csv"
  [ "$code" = 0 ] || { failed=1; tail -n 5 "$out/$name.log"; }
}

part tests 60 "$python" -m pytest -n 0 tests/derivatives/test_device.py
part run 600 "$python" -m polca_lib.analysis.cli paper run "${settings[@]}"
part study 240 "$python" -m polca_lib.analysis.cli paper study "${settings[@]}" \
  --name gpu --bases hessian --ablation-curvature 0 --no-variants
part projections 120 "$python" benchmarks/projections.py \
  --sizes "$preset" --repeats 3 --device "$device" --out "$out/benchmarks"
exit $failed
