"""What the tuning runs reached on `select`, as one file; val, which their metrics have as well, is left out

python bench/tuning.py FOLDER_OF_RUNS [out.jsonl]"""

import json, sys
from pathlib import Path

SEEDS = (100, 101)  # of tuning, and of nothing else: paper/PLAN.md
KEPT = ("select_AP", "best_epoch", "steps", "seed", "lam", "machine", "cost", "commit", "date")


def tuning_runs(folder: Path) -> list:
    "Name, settings and what select said, of every finished run with a tuning seed"
    rows = []
    for path in sorted(folder.glob("*/metrics.json")):
        m = json.loads(path.read_text(encoding="utf-8"))
        if m["seed"] in SEEDS:
            config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
            config.pop("runs")  # a folder of one machine
            rows.append(dict(run=path.parent.name, config=config, **{k: m[k] for k in KEPT if k in m}))
    return rows


if __name__ == "__main__":
    rows = tuning_runs(Path(sys.argv[1]))
    published = Path(__file__).resolve().parents[1] / "runs/published"
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else published / "tuning.jsonl"
    out.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    print(f"{len(rows)} runs")
