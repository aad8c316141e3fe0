#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one run of a few minutes: build for the card present, the
# GPU tests, compute-sanitizer on small sizes, the benchmarks. Run by `make gpu`.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-out}
mkdir -p "$out"
python=${KELIX_PYTHON:-python3}
failed=0

run() { # name, command ...
  local name=$1
  shift
  printf '\n== %s\n' "$name"
  if "$@" 2>&1 | tee "$out/$name.log" | tail -n 25; then
    echo "$name: ok" >>"$out/summary"
  else
    echo "$name: FAILED" >>"$out/summary"
    failed=1
  fi
}

: >"$out/summary"
capability=$($python -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || {
  echo "make gpu: torch sees no NVIDIA GPU" >&2
  exit 1
}
[ "$capability" = 90 ] && capability=90a # wgmma is in sm_90a, which plain sm_90 leaves out
export KELIX_CUDA=1 KELIX_CUDA_ARCHS="$capability-real"
run build $python setup.py -q native
run tests $python -m pytest -m gpu tests
for dtype in float32 bfloat16; do
  run "parity-$dtype" $python -m kelix_rt.cli parity tests/golden --device cuda --dtype "$dtype"
done
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    run "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      $python -m tests.gpu.small_calls
  done
else
  echo "sanitizer: FAILED (compute-sanitizer not found)" >>"$out/summary"
  failed=1
fi
run benchmarks $python -m pytest benchmarks --benchmark-only \
  --benchmark-json="$out/benchmarks.json"
printf '\n== summary\n'
cat "$out/summary"
exit $failed
