#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one run of some minutes: build for the card present, the
# GPU tests (`ops` those of the operators, `tests` all others), compute-sanitizer on small sizes, the
# kernels that the card's own build leaves out, the benchmarks. Run by `make gpu`; steps can be named
# where a machine limits the time of a command (`bash tests/gpu/run.sh out build ops`; another `out`
# for the next ones) or lacks a package.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-out}
mkdir -p "$out"
# .venv where `make test` has set it up; a machine without network may have all it needs itself.
default=python3
[ -x .venv/bin/python ] && default=$PWD/.venv/bin/python
python=${KELIX_PYTHON:-$default}
[[ $python == */* && $python != /* ]] && python=$PWD/$python
PATH=$(dirname "$(command -v "$python")"):$PATH # its cmake and ninja
all=" build ops tests parity sanitizer portable benchmarks "
steps=" ${*:2} "
[ $# -gt 1 ] || steps=$all
for step in $steps; do
  [[ $all == *" $step "* ]] || { echo "make gpu: no step $step, only$all" >&2 && exit 2; }
done
failed=0

wanted() { [[ $steps == *" $1 "* ]]; }

packages() { # of a step, beside torch
  case $1 in
    ops | portable) echo pytest hypothesis ;;
    tests) echo pytest hypothesis diffusers transformers ;;
    parity) echo typer diffusers ;;
    benchmarks) echo pytest_benchmark diffusers transformers ;;
  esac
}

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
absent='import sys, importlib.util as u; print(*(n for n in sys.argv[1:] if not u.find_spec(n)))'
for step in $steps; do
  missing=$($python -c "$absent" torch $(packages "$step")) || exit 1
  [ -z "$missing" ] || {
    echo "make gpu: step $step needs $missing, not found by $python; run \`make test\` first, set" \
      "KELIX_PYTHON, or name the steps to run:$all" >&2
    exit 1
  }
done
capability=$($python -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || {
  echo "make gpu: torch sees no NVIDIA GPU" >&2
  exit 1
}
[ "$capability" = 90 ] && capability=90a # wgmma is in sm_90a, which plain sm_90 leaves out
export KELIX_CUDA=1 KELIX_CUDA_ARCHS="$capability-real"
wanted build && run build $python setup.py -q native
wanted ops && run ops $python -m pytest -m gpu tests/ops
wanted tests && run tests $python -m pytest -m gpu tests --ignore=tests/ops --ignore=tests/serve
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

# A card of 9.0 takes nearest_codes by wgmma wherever the build has it, so mma.sync runs on a copy of
# the tree that is built without. Elsewhere `ops` and `sanitizer` have run it.
portable() (
  copy=$PWD/build/portable
  rm -rf "$copy" && mkdir -p "$copy" &&
    cp -r CMakeLists.txt setup.py pyproject.toml csrc kelix_rt tests "$copy" && cd "$copy" &&
    KELIX_CUDA_ARCHS=90-real $python setup.py -q native &&
    $python -c 'import torch, kelix_rt.ops; info = torch.ops.kelix.build_info()
assert "cuda=90-real" in info, info' &&
    $python -m pytest -m gpu tests/ops/test_codes.py &&
    compute-sanitizer --tool racecheck --error-exitcode 1 $python -m tests.gpu.small_calls codes
)
if wanted portable && [ "$capability" = 90a ]; then
  run portable portable
elif wanted portable; then
  echo "make gpu: portable is for cards of 9.0, nothing to do" | tee -a "$out/gpu.log"
fi
wanted benchmarks && run benchmarks $python -m pytest benchmarks --benchmark-only \
  --benchmark-json="$out/benchmarks.json"
printf '\n== summary\n'
cat "$out/summary"
exit $failed
