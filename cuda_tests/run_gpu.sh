#!/usr/bin/env bash
# Runs everything that needs a GPU in less than ten minutes: build, conformance of the emulator, tests,
# compute-sanitizer, benchmarks.
#
#     cuda_tests/run_gpu.sh [FOLDER]      # default: $OUT, or benchmarks/results
#
# Appends to FOLDER/gpu.log while it runs and writes gpu.md and gpu.json at the end, both or neither. Needs nvcc,
# CMake >= 3.18, a C++20 compiler, and a Python (PYTHON=python3) with torch and pytest. Installs nothing and does
# not use the network.
# Exit code: 0 success, 1 failure, 77 no GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

PYTHON=$(command -v "${PYTHON:-python3}") || { echo "no ${PYTHON:-python3} on PATH" && exit 1; }
SECONDS=0
readonly LIMIT=520           # seconds in total
readonly FOR_BENCHMARKS=150  # reserved, of these
readonly FOR_THE_PAGE=10
folder=${1:-${OUT:-benchmarks/results}}

# ---- stages: each runs in a shell of its own. The last line of its output is its summary. Exit code 77: skipped,
# for the reason in the last line.

build() {
  local capability arch generator=()
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
  case $capability in 9.0) arch=sm_90a ;; *) arch=sm_80 ;; esac # other newer GPUs compile the PTX
  command -v ninja && generator=(-G Ninja)
  export NVCC_APPEND_FLAGS="--threads 4" # compiles for several architectures in parallel
  cmake -S . -B "$GPU_BUILD" "${generator[@]}" -DPYTHON="$PYTHON" -DSTATECORE_CUDA=ON \
    -DSTATECORE_CUDA_ARCHITECTURES="$arch"
  cmake --build "$GPU_BUILD" --parallel "$(nproc)" --target statecore
  cmake --install "$GPU_BUILD" --prefix statecore
  "$PYTHON" -c "from statecore import ops; print(ops.build_info()['cuda_architectures'])"
}

# The same program compiled for the GPU and for the emulator must write the same bytes.
conformance() {
  local nvcc at=$GPU_BUILD/cuda_tests bytes
  nvcc=$(sed -n 's/^set(CMAKE_CUDA_COMPILER "\(.*\)")/\1/p' "$GPU_BUILD"/CMakeFiles/*/CMakeCUDACompiler.cmake)
  "$nvcc" -std=c++17 -O3 --expt-relaxed-constexpr --threads 4 -Icsrc -Icuda_tests \
    -gencode=arch=compute_80,code={sm_80,compute_80} -gencode=arch=compute_90a,code=sm_90a \
    cuda_tests/conformance.cu -o "$at/conformance_gpu"
  cmake --build "$GPU_BUILD" --parallel "$(nproc)" --target conformance_plain
  "$at/conformance_gpu" "$at/on_gpu.bin"
  "$at/conformance_plain" "$at/emulated.bin"
  bytes=$(stat -c %s "$at/on_gpu.bin")
  cmp -n "$bytes" "$at/on_gpu.bin" "$at/emulated.bin" # fewer on GPUs without sm_90a instructions
  echo "$bytes bytes agree with the emulator, which wrote $(stat -c %s "$at/emulated.bin")"
}

# Tests of operators on CUDA, selected by words in their names.
tests_on_cuda() {
  STATECORE_REQUIRE_CUDA=1 OMP_NUM_THREADS=2 "$PYTHON" -m pytest -q --tb=short --maxfail=20 -p no:cacheprovider \
    -k "cuda and not emulated and not checked and not cpu and ($1)" "${@:2}" \
    python_tests/test_{linear,step_linear,segment,mixed}_attention.py python_tests/test_state_update.py
}
operators() { # reference values are computed on the CPU, so run tests in parallel if pytest-xdist is installed
  local parallel=()
  "$PYTHON" -c "import xdist" 2> /dev/null && parallel=(-n 8)
  tests_on_cuda "not graph and not bits" "${parallel[@]}"
}
cuda_graphs() { tests_on_cuda "graph"; }
same_bits() { tests_on_cuda "bits"; } # 200 times

# Without the caching allocator, so that every tensor is an allocation of its own and overruns are detected.
sanitized() {
  command -v compute-sanitizer > /dev/null || { echo "no compute-sanitizer on PATH"; return 77; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --kernel-name kns=statecore --error-exitcode 1 \
    "$PYTHON" cuda_tests/every_operator.py
}
memcheck() { sanitized memcheck; }
racecheck() { sanitized racecheck; }
synccheck() { sanitized synccheck; }

benchmarks() { # the budget leaves time for a benchmark that is already running when it is spent
  "$PYTHON" -m benchmarks.gpu --out "$GPU_WORK/benchmarks" --budget "$((GPU_SECONDS - 20))"
  echo "$(grep -c '"kind"' "$GPU_WORK/benchmarks/gpu.json") rows"
}

# ---- running the stages
say() { printf '%-12s %-8s %4s s  %s\n' "$@"; }

# stage NAME SECONDS: runs a stage for at most SECONDS, less if that would use time reserved for later stages.
stage() {
  local name=$1 seconds=$2 left=$((LIMIT - FOR_THE_PAGE - SECONDS)) start=$SECONDS code verdict last
  local log=$GPU_WORK/$name.log
  [[ $name == benchmarks ]] || ((left -= FOR_BENCHMARKS))
  ((seconds < left)) || seconds=$left
  if ((seconds < 5)); then
    code=124 && echo "not started: no time left" > "$log"
  else
    GPU_SECONDS=$seconds timeout --kill-after=5 "$seconds" bash -euo pipefail -c "$name" > "$log" 2>&1
    code=$?
  fi
  case $code in 0) verdict=ok ;; 77) verdict=skipped ;; 124 | 137) verdict=late ;; *) verdict=FAILED ;; esac
  last=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | tr '\t' ' ')
  printf '%s\t%s\t%d\t%s\n' "$name" "$verdict" $((SECONDS - start)) "$last" >> "$GPU_WORK/stages.tsv"
  { echo "==== $name"; cat "$log"; } >> "$folder/gpu.log"
  [[ $verdict == ok || $verdict == skipped ]] || { failed=1 && tail -n 40 "$log"; }
  say "$name" "$verdict" $((SECONDS - start)) "$last"
  [[ $verdict == ok ]]
}

if ! command -v nvidia-smi > /dev/null || ! nvidia-smi -L 2> /dev/null | grep -q '^GPU '; then
  echo "no NVIDIA GPU here: nothing was run, and nothing is known about the kernels on one"
  exit 77
fi

GPU_WORK=$(mktemp -d)
trap 'rm -rf "$GPU_WORK"' EXIT
PYTHON=$(realpath -s "$PYTHON")
export PYTHON GPU_WORK GPU_BUILD=$PWD/build/gpu PYTHONPATH=$PWD PYTHONUNBUFFERED=1
export -f build conformance tests_on_cuda operators cuda_graphs same_bits sanitized memcheck racecheck synccheck benchmarks
mkdir -p "$folder"
: > "$folder/gpu.log"
failed=0
stage build 200 || exit 1 # the other stages need it
stage conformance 90
stage operators 120
stage cuda_graphs 30
stage same_bits 60
stage memcheck 60
stage racecheck 60
stage synccheck 60
stage benchmarks "$LIMIT" # all remaining time
"$PYTHON" -m benchmarks.gpu --checks "$GPU_WORK" --out "$folder" || failed=1
exit "$failed"
