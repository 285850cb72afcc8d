#!/usr/bin/env bash
# tests/all.sh BIN: the package equals the notebooks, the notebooks run, and beside them what a notebook cell cannot hold
set -euo pipefail
bin=$1
export PATH="$(cd "$bin" && pwd):$PATH" MPLBACKEND=agg OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
sum() { find rtdetr_kd -name "*.py" | LC_ALL=C sort | xargs cat | sha256sum; }
before=$(sum)
nbdev_export
after=$(sum)
if [ "$before" != "$after" ]; then
  echo "rtdetr_kd/ was not what the notebooks export: nbdev_export has changed it. Edit notebooks, run nbdev_export, commit both." >&2
  git --no-pager diff --stat -- rtdetr_kd >&2 || true
  exit 1
fi
workers=${TEST_WORKERS:-2}  # processes; each takes up to 3 GB
said=0
nbdev_test --n_workers "$workers" --timing || said=$?
pytest -q -n "$workers" --dist loadfile --no-loadscope-reorder --durations 15 "${@:2}" || said=$?
exit $said
