#!/usr/bin/env bash
# tests/processors.sh BIN [SETTING …]: what depends on numbers, with the kernels of other processors.
# A setting is an environment variable with its value; without one: all of them. Bits are compared inside
# one setting only. PARTS="nbs/distill tests/test_cache.py" runs those alone. Prints a table.
set -uo pipefail
bin=$1; shift
export PATH="$(cd "$bin" && pwd):$PATH" MPLBACKEND=agg OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
root=$(cd "$(dirname "$0")/.." && pwd); cd "$root"
settings=("$@")
[ $# -gt 0 ] || settings=(
  ATEN_CPU_CAPABILITY=default     # torch's own kernels, without vector instructions
  ATEN_CPU_CAPABILITY=avx2
  ONEDNN_MAX_CPU_ISA=AVX2         # convolutions and their like
  ONEDNN_MAX_CPU_ISA=AVX512_CORE
  OMP_NUM_THREADS=1
  OMP_NUM_THREADS=2
  PYTHONPATH=tests/rounding       # no processor's: an image alone is rounded otherwise than in a batch
)
parts=(${PARTS:-nbs/model nbs/distill nbs/train nbs/study/04_matches.ipynb nbs/study/08_attention_maps.ipynb
  nbs/study/09_attention_study.ipynb nbs/deploy/00_graph.ipynb nbs/deploy/02_export.ipynb nbs/deploy/03_verify.ipynb
  nbs/deploy/04_calibrate.ipynb nbs/deploy/05_quantize.ipynb nbs/deploy/06_engine.ipynb
  tests/test_attention.py tests/test_cache.py tests/test_classes.py tests/test_distributed.py tests/test_edges.py
  tests/test_export.py tests/test_memory.py tests/test_methods.py tests/test_reference.py tests/test_training.py
  tests/test_transformers.py})
logs=$(mktemp -d); trap 'rm -rf "$logs"' EXIT
echo "setting | part | result | seconds" > "$logs/table"
failed=0

run() { # PART: a notebook, a room of notebooks, or a file of tests
  [[ -e $1 ]] || { echo "there is no $1"; return 1; }  # nbdev_test says that all is well
  if [[ $1 == tests/* ]]; then pytest -q -p no:cacheprovider "$1"; else nbdev_test --n_workers 1 --path "$1"; fi
}

one() { # SETTING PART: run it, and add a line to the table
  local said=passed log="$logs/log" start=$SECONDS value=${1#*=}
  [[ $1 != PYTHONPATH=* ]] || value=$root/$value${PYTHONPATH:+:$PYTHONPATH}
  (export "${1%%=*}=$value"; run "$2") > "$log" 2>&1 || said=FAILED
  [[ $said == passed ]] || { failed=1; echo "--- $1 $2" >&2; tail -60 "$log" >&2; }
  [[ $2 != tests/* ]] || said="$said: $(tail -1 "$log" | sed 's/ in .*//')"
  echo "$1 | $2 | $said | $((SECONDS - start))" | tee -a "$logs/table"
}

for setting in "${settings[@]}"; do
  before=$SECONDS
  for part in "${parts[@]}"; do one "$setting" "$part"; done
  echo "$setting | all | | $((SECONDS - before))" >> "$logs/table"
done
echo
column -t -s '|' < "$logs/table"
exit $failed
