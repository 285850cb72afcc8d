"""The price of each way to teach a student, in steps of training without a teacher

python bench/kd_cost.py [out.json] [rounds] [arm …]

On the embedded data with its defaults, one thread. Every arm's step is timed in turns with a step of `none`, in
processor time, which other programs on the machine disturb little. What comes before training is timed as well: the
start that is cut and healed, the pilot (its steps and its measurements) and the teacher's answers to all images. A
run's price is their sum; `equal` says how many steps of `none` that buys."""

import json, math, os, statistics, sys, time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from rtdetr_kd.data.dataset import loader
from rtdetr_kd.distill.distillation import as_fractions
from rtdetr_kd.files import machine, write_json
from rtdetr_kd.learner import Learner
from rtdetr_kd.train.config import configure
from rtdetr_kd.train.pilot import Beside, pilot_settings

METHODS = ("logit", "feature", "cwd", "mgd", "query", "query+cwd")
ARMS = {"none": {}, "inherit": dict(inherit="teacher"),
        "inherit strongest": dict(inherit="teacher", inherit_how="strongest"),
        "inherit fit": dict(inherit="teacher", inherit_how="fit")}
ARMS |= {m: dict(method=m) for m in METHODS}
STRONGEST = dict(inherit="teacher", inherit_how="strongest")
ARMS |= {f"inherit strongest, {m}": STRONGEST | dict(method=m) for m in ("query", "cwd")}
LENGTHS = dict(short=1000, middle=2000)
STEPS = 4  # of each arm in a round


def seconds(f, n: int = 1) -> float:
    "Processor time of a call, the mean of n"
    start = time.process_time()
    for _ in range(n): f()
    return (time.process_time() - start) / n


def learner_of(settings: dict, splits: dict | None) -> tuple:
    "An arm's learner, ready to step, and what its start took"
    start = time.process_time()
    learner = Learner(configure(**settings, lam="1", tracker="none"), splits)
    took = time.process_time() - start
    if learner.method is not None: learner.open_cache()
    return learner, took


def batches_of(learner: Learner, n: int) -> list:
    "The first batches of an epoch"
    return list(loader(learner.images, learner.batches(0)[:n]))


def before_training(learner: Learner, images: list) -> dict:
    "Seconds of the pilot and of the teacher's answers"
    if learner.method is None: return dict(pilot=0., cache=0.)
    d, n = learner.distillation, len(learner.images)
    with torch.no_grad(): ask = lambda: [d.live(as_fractions(x, learner.device)) for x, _ in images]
    with torch.no_grad(): answers = seconds(ask, 2) * n / sum(len(x) for x, _ in images)
    pilot = Learner(pilot_settings(learner.c), learner.splits, Beside)
    pilot.distillation.answers = d.answers
    pilot.one_step([images[0]])
    step = seconds(lambda: [pilot.one_step([b]) for b in images])  / len(images)
    pulls = seconds(lambda: pilot.pulls(pilot.fixed_batches()))
    return dict(pilot=min(learner.c.pilot, learner.total) * step + 3 * pulls, cache=answers)


def main(out: Path, rounds: int, arms: dict):
    "Time these arms in turns, and write the table"
    none, bare = learner_of({}, None)
    learners = {"none": (none, 0.)}
    for name, settings in arms.items():
        if name == "none": continue
        learner, took = learner_of(settings, none.splits)
        learners[name] = learner, max(took - bare, 0.) if settings.get("inherit") else 0.
        print(f"{name}: ready after {took:.1f} s", flush=True)
    images = batches_of(none, STEPS)
    before = {name: before_training(learner, images) | dict(start=took) for name, (learner, took) in learners.items()}
    times = {name: [] for name in arms}
    for r in range(rounds + 1):  # the first round warms up
        for name, (learner, _) in learners.items():
            took = seconds(lambda: [learner.one_step([b]) for b in images]) / STEPS
            if r: times[name].append(took)
        print(f"round {r}/{rounds}", flush=True)
    step = statistics.median(times["none"])
    rows = {}
    for name in arms:
        ratio = statistics.median(a / b for a, b in zip(times[name], times["none"]))
        extra = {k: v / step for k, v in before[name].items()}
        rows[name] = dict(step=ratio, **extra, equal={k: math.ceil(n * ratio + sum(extra.values()))
                                                      for k, n in LENGTHS.items()})
        told = "  ".join(f"{k} {v:.0f}" for k, v in extra.items())
        print(f"{name:18} step {ratio:.2f}  {told}", rows[name]["equal"])
    write_json(out, dict(unit="steps of none", seconds_of_a_step=step, rounds=rounds, machine=machine(1), arms=rows))


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else root / "runs/published/price.json",
         int(sys.argv[2]) if len(sys.argv) > 2 else 8,
         {k: v for k, v in ARMS.items() if k in ("none", *sys.argv[3:])} if len(sys.argv) > 3 else ARMS)
