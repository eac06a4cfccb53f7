#!/usr/bin/env bash
# Builds medmoco, checks its CUDA kernels on a GPU, and times them and the training step:
#
#   benchmarks/gpu_check.sh [FOLDER [PART...]]
#
# FOLDER, new or empty, takes a log of each step, the figures as JSON and CSV, and summary.txt;
# default: build/gpu_check-<time>. Parts, of at most 9 minutes each and by default all:
#   kernels  tests, compute-sanitizer, repeats, streams and graphs, more than 2^31 elements
#   ops      each operator beside its peers
#   train    the pretraining step with our operators and with eager ones
# A step that fails does not stop the next. Exit status: 0; 1 if a step failed; 2 if nothing can be
# checked here. Needs a GPU, nvcc, compute-sanitizer (part of the CUDA toolkit) and a Python that
# holds torch, torchvision, numpy, scipy, nibabel, pytest, tqdm, matplotlib and what the build needs;
# PYTHON names it, default: python3. Nothing is downloaded, and no setting of the GPU changed.
set -uo pipefail

readonly DEADLINE=540 # seconds for a part; each step has a limit of its own, too
end=$DEADLINE         # of the part that is running

refuse() {
  echo "gpu_check: $1" >&2
  exit 2
}

# find_tool NAME: where a program of the CUDA toolkit is, if anywhere.
find_tool() {
  local home
  command -v "$1" && return
  for home in "${CUDA_HOME:-}" /usr/local/cuda; do
    [ -n "$home" ] && [ -x "$home/bin/$1" ] && echo "$home/bin/$1" && return
  done
  return 1
}

# step NAME LIMIT TEXT COMMAND...: runs a command for LIMIT seconds at most, its output in NAME.log.
# Where TEXT is not empty, the output has to hold it.
step() {
  local name=$1 limit=$2 text=$3 start=$SECONDS result=ok status=0
  shift 3
  : >"$folder/$name.log"
  ((end - SECONDS < limit)) && limit=$((end - SECONDS))
  if ((limit <= 0)); then
    result="FAILED: no time left"
  else
    timeout --kill-after=5 "$limit" "$@" >"$folder/$name.log" 2>&1 || status=$?
    if ((status == 124 || status == 137)); then
      result="FAILED: stopped after $limit s"
    elif ((status != 0)); then
      result="FAILED: exit status $status"
    elif [ -n "$text" ] && ! grep -qF -- "$text" "$folder/$name.log"; then
      result="FAILED: its output lacks '$text'"
    fi
  fi
  printf '%-22s %4d s  %s\n' "$name" $((SECONDS - start)) "$result" | tee -a "$folder/steps.txt"
}

# sanitize TOOL TEXT: the small shapes under a tool of compute-sanitizer. Each tensor is allocated by
# itself, so that reading beyond it shows.
sanitize() {
  step "$1" 200 "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    "${sanitizer:-compute-sanitizer}" --tool "$1" --error-exitcode 9 --report-api-errors no \
    --launch-timeout 0 "$python" benchmarks/smoke.py --part shapes
}

# pytest_cuda NAME MODULE...: the CUDA cases of test modules.
pytest_cuda() {
  local name=$1
  shift
  step "$name" 120 "" "$python" -m pytest -q -p no:cacheprovider -k cuda "${@/#/tests/test_}"
}

# bench SCRIPT NAME FLAG...: figures, whose table goes into the summary.
tables=()
bench() {
  local script=$1 name=$2
  shift 2
  tables+=("$name")
  step "$name" 200 "" "$python" "benchmarks/$script.py" --device cuda \
    --json "$folder/$name.json" --csv "$folder/$name.csv" "$@"
}

# --- what is needed

for part in "${@:2}"; do
  [[ $part =~ ^(kernels|ops|train)$ ]] || refuse "expected the parts kernels, ops, train; got $part"
done
(($# > 1)) && parts=("${@:2}") || parts=(kernels ops train)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:-$root/build/gpu_check-$(date +%Y%m%d-%H%M%S)}
[ ! -e "$folder" ] || [ -d "$folder" ] || refuse "$folder is no folder"
[ -z "$(ls -A "$folder" 2>/dev/null)" ] || refuse "$folder is not empty"
python=${PYTHON:-python3}
python=$(command -v "$python") || refuse "found no ${PYTHON:-python3}; PYTHON names an interpreter"
packages=(matplotlib numpy pytest torch tqdm)
[[ " ${parts[*]} " != *" train "* ]] || packages+=(nibabel scipy torchvision)
lacking='import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])'
missing=$("$python" -c "$lacking" "${packages[@]}") || refuse "$python cannot be run"
[ -z "$missing" ] || refuse "$python lacks packages: $missing"
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null) ||
  refuse "torch sees no GPU: nothing can be checked here"
find_tool nvcc >/dev/null || refuse "found no nvcc on the PATH, in CUDA_HOME or in /usr/local/cuda"
sanitizer=$(find_tool compute-sanitizer) ||
  echo "gpu_check: found no compute-sanitizer; its four steps will fail" >&2

mkdir -p "$folder" || refuse "cannot make $folder"
folder=$(cd "$folder" && pwd)
cd "$root" || exit 2
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Whatever plugins there are, their warnings would be failures.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
export MEDMOCO_UNVERIFIED=1 MEDMOCO_REQUIRE_CUDA=1 MEDMOCO_REQUIRE_CUDA_BUILD=1

# --- the steps

check_kernels() {
  step resources 60 "" "$python" -m pytest -q -p no:cacheprovider tests/test_cuda_resources.py
  step shapes 60 "all ok" "$python" benchmarks/smoke.py --part shapes
  pytest_cuda tests queue_info_nce.py dense_match.py covariance_loss.py zca_whiten.py \
    iternorm_whiten.py
  sanitize memcheck "ERROR SUMMARY: 0 errors" &
  sanitize racecheck "(0 errors, 0 warnings)" &
  sanitize initcheck "ERROR SUMMARY: 0 errors" &
  sanitize synccheck "ERROR SUMMARY: 0 errors" &
  wait
  step behaviour 150 "all ok" "$python" benchmarks/smoke.py --part behaviour
  step large 120 "all ok" "$python" benchmarks/smoke.py --part large
}

time_ops() {
  bench bench_loss info_nce --op queue_info_nce --dtype bfloat16 float32 --peers eager 'attention*'
  bench bench_loss info_nce_graph --op queue_info_nce --dtype bfloat16 float32 \
    --peers eager 'attention*' --graph --sizes N=256,K=65536,C=128
  bench bench_loss match --op dense_match --dtype bfloat16
  bench bench_loss features --op covariance_loss zca_whiten --dtype float32
  bench bench_loss features_graph --op covariance_loss --dtype float32 --graph \
    --sizes N=256,D=2048 N=256,D=8192
  bench bench_loss many_features --op covariance_loss --dtype bfloat16 --sizes N=12544,D=2048
}

time_training() {
  bench bench_train train
  # Finer local maps, where the logits of eager grow with the cells: 28 x 28, 56 x 56.
  bench bench_train train_28 --methods densecl medmoco --output-stride 8 --batch-size 64
  bench bench_train train_56 --methods densecl medmoco --output-stride 4 --batch-size 32
}

: >"$folder/steps.txt"
step build 300 "" "$python" -m pip install --no-build-isolation --no-deps -e .
for part in "${parts[@]}"; do # the build counts as the first one's
  case $part in
    kernels) check_kernels ;;
    ops) time_ops ;;
    train) time_training ;;
  esac
  end=$((SECONDS + DEADLINE))
done

# --- what came out

failed=$(grep -c FAILED "$folder/steps.txt")
{
  echo "gpu_check of medmoco at $(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)"
  echo "$device, $("$python" -c 'import torch; print("torch", torch.__version__)')"
  for name in ${tables[@]+"${tables[@]}"}; do
    printf '\n%s:\n' "$name"
    # The table after the last case: all from its heading on.
    sed -n '/^ *medmoco ms /,$p' "$folder/$name.log" 2>/dev/null
  done
  printf '\n'
  cat "$folder/steps.txt"
  echo "$failed steps FAILED, $SECONDS s; logs and figures: $folder"
} >"$folder/summary.txt"
sed -n 's/^\(\w*\) .*FAILED.*/\1/p' "$folder/steps.txt" | while read -r name; do
  printf '\n--- the end of %s.log\n' "$name"
  tail -n 15 "$folder/$name.log"
done
rm "$folder/steps.txt"
printf '\n'
cat "$folder/summary.txt"
((failed == 0))
