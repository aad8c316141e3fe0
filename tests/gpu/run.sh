#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one run of some minutes: build for the card present, the
# GPU tests, compute-sanitizer on small sizes, the benchmarks. Run by `make gpu`; steps can be named
# where a machine limits the time of a command (`bash tests/gpu/run.sh out build tests`; another
# `out` for the next ones).
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-out}
mkdir -p "$out"
# .venv where `make test` has set it up; a machine without network may have all it needs itself.
default=python3
[ -x .venv/bin/python ] && default=$PWD/.venv/bin/python
python=${KELIX_PYTHON:-$default}
PATH=$(dirname "$(command -v "$python")"):$PATH # its cmake and ninja
all=" build tests parity sanitizer benchmarks "
steps=" ${*:2} "
[ $# -gt 1 ] || steps=$all
for step in $steps; do
  [[ $all == *" $step "* ]] || { echo "make gpu: no step $step, only$all" >&2 && exit 2; }
done
failed=0

wanted() { [[ $steps == *" $1 "* ]]; }

verdict() { # name, ok or FAILED
  echo "$1: $2" >>"$out/summary"
  [ "$2" = ok ] || failed=1
}

run() { # name, command ...; the whole output is in gpu.log
  local name=$1
  shift
  printf '\n== %s\n' "$name" | tee -a "$out/gpu.log"
  if "$@" 2>&1 | tee -a "$out/gpu.log" | tail -n 25; then
    verdict "$name" ok
  else
    verdict "$name" FAILED
  fi
}

: >"$out/summary" && : >"$out/gpu.log"
$python -c 'import torch, diffusers, transformers, pytest_benchmark' || {
  echo "make gpu: $python lacks a package; run \`make test\` first, or set KELIX_PYTHON" >&2
  exit 1
}
capability=$($python -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || {
  echo "make gpu: torch sees no NVIDIA GPU" >&2
  exit 1
}
[ "$capability" = 90 ] && capability=90a # wgmma is in sm_90a, which plain sm_90 leaves out
export KELIX_CUDA=1 KELIX_CUDA_ARCHS="$capability-real"
wanted build && run build $python setup.py -q native
wanted tests && run tests $python -m pytest -m gpu tests
if wanted parity; then
  for dtype in float32 bfloat16; do
    run "parity-$dtype" $python -m kelix_rt.cli parity tests/golden --device cuda --dtype "$dtype"
  done
fi
if wanted sanitizer && ! command -v compute-sanitizer >/dev/null; then
  echo "make gpu: compute-sanitizer not found" >&2
  verdict sanitizer FAILED
elif wanted sanitizer; then
  for tool in memcheck racecheck; do
    run "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      $python -m tests.gpu.small_calls
  done
fi
wanted benchmarks && run benchmarks $python -m pytest benchmarks --benchmark-only \
  --benchmark-json="$out/benchmarks.json"
printf '\n== summary\n'
cat "$out/summary"
exit $failed
