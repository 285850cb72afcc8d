"Two processes on one machine do what one does: the same images, the same loss, one AP, and nobody waits for ever"

import json, os, socket, subprocess, sys
from contextlib import contextmanager, nullcontext

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from rtdetr_kd.files import Stop
from rtdetr_kd.train.config import configure
from rtdetr_kd.data.dataset import loader
from rtdetr_kd.learner import Learner, train
from rtdetr_kd.model.sizes import SIZES
from rtdetr_kd.train.parallel import gathered

CASES = {  # settings of one process, of two; images whose noisy queries would differ have none
    "micro-batches": (dict(accumulate=2), dict(sync_norm=False)),
    "four parts": (dict(accumulate=4), dict(accumulate=2, sync_norm=False)),
    "shared norms, odd parts": (dict(batch=5, size="toy_quiet"), dict(batch=5, size="toy_quiet")),
    "distilled": (dict(accumulate=2, method="cwd"), dict(sync_norm=False, method="cwd")),
    "in pieces": (
        dict(batch=8, accumulate=4, method="cwd"),
        dict(batch=8, accumulate=2, sync_norm=False, method="cwd"),
    ),
}


def settings(data, runs, **kw):
    more = (
        dict(teacher="random:toy", lam="1", cache="none", teacher_min_ap=0)
        if kw.get("method", "none") != "none"
        else {}
    )
    return configure(
        **dict(
            data=str(data),
            size="toy",
            image_size=64,
            batch=6,
            epochs=2,
            eval_every=1,
            warmup=2,
            keep_state=True,
            runs=str(runs),
            workers=0,
            device="cpu",
            tracker="none",
        )
        | more
        | kw
    )


def curve(c, steps: int = 3) -> tuple:
    "Loss terms of the first steps, and the weights after them"
    learner, A, rows = Learner(c), c.accumulate, []
    if learner.cut:
        assert all(isinstance(p, DTensor) for p in learner.trained.parameters())
    batches = iter(loader(learner.images, learner.own_parts(learner.batches(0))))
    for _ in range(steps):
        window = [next(batches) for _ in range(A)]
        rows.append({k: float(v) for k, v in learner.one_step(window).items()})
    return rows, {k: gathered(v).detach().clone() for k, v in learner.model.named_parameters()}


def quiet():
    "A student without noisy queries: their noise belongs to a part of a batch"
    SIZES.setdefault("toy_quiet", SIZES["toy"] | dict(denoising=0))


@contextmanager
def in_pieces():
    "As accelerate launch --use_fsdp"
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    try:
        yield
    finally:
        del os.environ["ACCELERATE_USE_FSDP"]


def no_box_here(data, runs) -> dict:
    "The first process's images hold nothing; the step ends, and the weights stay the same on both"
    learner = Learner(settings(data, runs, method="logit"))
    images = torch.randint(
        0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(learner.rank)
    )
    n = 2 * learner.rank
    targets = [dict(labels=torch.zeros(n, dtype=torch.long), boxes=torch.full((n, 4), 0.3), row=0) for _ in range(3)]
    for _ in range(2):
        terms = learner.one_step([(images, targets)])
    mine = torch.cat([p.flatten() for p in learner.model.parameters()])
    other = mine.clone()
    torch.distributed.broadcast(other, 0)
    return dict(
        loss=float(sum(terms.values())), apart=float((mine - other).abs().max()), boxes=learner.in_sum(3 * n)[0]
    )


def one_ap(data, runs) -> dict:
    "AP of an untrained network on a split that two do not divide"
    learner = Learner(settings(data, runs))
    figures, found = learner.judged(learner.ema.model, "val")
    return dict(figures=figures, images=[f["image_id"] for f in found])


def two(data, runs, out):
    "What each of the two processes runs"
    quiet()
    torch.set_num_threads(1)
    said = {}
    for k, (_, two) in CASES.items():
        with in_pieces() if k == "in pieces" else nullcontext():
            said[k] = curve(settings(data, runs, **two))
    more = dict(no_box=no_box_here(data, runs), ap=one_ap(data, runs))
    if os.environ["RANK"] == "0":
        torch.save(dict(curves=said, **more), out)


def alone(data, runs):
    "Folders apart are refused; one run is whole; in another the second process dies in the middle of an epoch"
    quiet()
    torch.set_num_threads(1)
    Accelerator.end_training = lambda self: None  # it ends the group, and another run follows
    step = Learner.one_step
    try:
        train(settings(data, f"{runs}/{os.environ['RANK']}"))
    except Stop as e:
        print(f"apart: {e}", flush=True)
    train(settings(data, runs, name="whole"))

    def dying(self, *a):
        if self.step == 6 and self.rank:
            os.kill(os.getpid(), 9)
        return step(self, *a)

    with in_pieces():
        train(settings(data, runs, name="pieces", save_minutes=1e-9, method="query+cwd", lam="auto", pilot=3))
    Learner.one_step = dying
    try:
        train(settings(data, runs, name="cut", save_minutes=1e-9))
    except Stop as e:
        print(f"stopped: {e}", flush=True)


def go_on(data, runs):
    "The same command again"
    torch.set_num_threads(1)
    train(settings(data, runs, name="cut"))


def call(f: str, *args) -> list:
    "The words after `python` that call a function of this file"
    return [
        "-c",
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); from test_distributed import {f}; "
        f"{f}(*{[str(a) for a in args]!r})",
    ]


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def pair(words: list, limit: float = 300, dies: bool = False) -> list:
    "The same command as two processes of one group; what they say"
    env = os.environ | dict(
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=free_port(),
        ACCELERATE_USE_CPU="true",
        OMP_NUM_THREADS="1",
        PYTHONFAULTHANDLER="1",  # a fault in native code says where
    )
    ps = [
        subprocess.Popen(
            [sys.executable, *words],
            env=env | dict(RANK=str(r), LOCAL_RANK=str(r)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(2)
    ]
    try:
        said = [p.communicate(timeout=limit)[0] for p in ps]
    finally:
        [p.kill() for p in ps]
    assert [p.returncode for p in ps] == [0, -9 if dies else 0], "\n".join(said)[-3000:]
    return said


@pytest.fixture(scope="module")
def both(tiny_odd, tmp_path_factory):
    quiet()
    d = tmp_path_factory.mktemp("two")
    pair(call("two", tiny_odd, d, d / "out.pt"))
    said = pair(call("alone", tiny_odd, d), dies=True)
    return tiny_odd, d, torch.load(d / "out.pt", weights_only=True), said


@pytest.mark.parametrize("case", CASES)
def test_the_same_loss_curve(both, case):
    data, d, said, _ = both
    mine, weights = curve(settings(data, d, **CASES[case][0]))
    theirs, other = said["curves"][case]
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for k in a:
            assert a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-5), k
    far = max((weights[k] - other[k]).abs().max().item() for k in weights)
    assert far < 1e-3  # three steps of AdamW at this rate move a weight by up to 6e-3


def test_a_process_without_a_box(both):
    said = both[2]["no_box"]
    assert 0 < said["loss"] < 1e4 and said["apart"] == 0 and said["boxes"] == 6


def test_one_ap_and_no_image_twice(both):
    data, d, said, _ = both
    mine = one_ap(data, d)
    assert said["ap"]["images"] == mine["images"]  # in the same order, each as often
    assert said["ap"]["figures"] == pytest.approx(mine["figures"], abs=1e-9)


def test_the_command_with_two_processes(tiny_odd, tmp_path):
    "accelerate launch: a whole run, and again: it has ended"
    words = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        free_port(),
        "-m",
        "rtdetr_kd.train_cli",
        "--data",
        str(tiny_odd),
        "--size",
        "toy",
        "--image_size",
        "64",
        "--batch",
        "5",
        "--epochs",
        "3",
        "--max-steps",
        "5",
        "--warmup",
        "2",
        "--workers",
        "0",
        "--runs",
        str(tmp_path),
        "--name",
        "cli",
    ]
    go = lambda: subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
    )
    p = go()
    assert p.returncode == 0, (p.stdout + p.stderr)[-3000:]
    m = json.loads((tmp_path / "cli/metrics.json").read_text())
    assert (m["steps"], m["machine"]["processes"]) == (5, 2)
    assert p.stdout.count("val: AP") == 1 and "2 processes" in p.stdout  # only the first one speaks
    assert list((tmp_path / "cli/tensorboard").glob("events*"))
    assert "has ended before" in go().stdout


def test_half_a_launcher_is_refused(monkeypatch, tiny_odd, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="no launcher says which"):
        train(settings(tiny_odd, tmp_path))


def test_a_process_that_dies(both):
    "The other one says so and stops; the same command goes on, bit for bit as if nothing had happened"
    data, d, _, (first, second) = both
    assert (
        "apart: not every process sees the folder" in first
        and "stopped: another process of this run has ended" in first
    )
    assert "apart: not every process" in second and "stopped:" not in second
    read = lambda name: torch.load(d / name / "last/state.pt", weights_only=True)
    assert read("cut")["step"] in (5, 6)
    assert "resumed after epoch 1" in pair(call("go_on", data, d))[0]
    a, b = read("cut"), read("whole")
    assert (a["step"], a["ema_n"], a["best"]) == (b["step"], b["ema_n"], b["best"]) == (8, 8, b["best"])
    for part in ("trained", "ema"):
        assert all(torch.equal(v, b[part][k]) for k, v in a[part].items()), part


def test_a_run_in_pieces_goes_on_in_one(both):
    "The state of a run whose weights were cut (FSDP) is whole: another number of processes takes it"
    data, d, _, (first, _) = both
    assert "cut over 2 processes" in first and json.loads((d / "pieces/metrics.json").read_text())["steps"] == 8
    one = Learner(settings(data, d, name="pieces", method="query+cwd", lam="auto", pilot=3))
    assert one.restore() and one.step == 8 and not one.cut
    state = torch.load(d / "pieces/last/state.pt", weights_only=True)
    assert all(torch.equal(v, state["trained"][k]) for k, v in one.trained.state_dict().items())
    moments = [v for kept in one.opt.state_dict()["state"].values() for v in kept.values() if v.dim()]
    assert moments and all(
        p.shape == k["exp_avg"].shape
        for p, k in zip((p for g in one.opt.param_groups for p in g["params"]), one.opt.state_dict()["state"].values())
    )


def test_pieces_of_one_process_are_refused(monkeypatch, tiny_odd, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="this is the only one"):
        train(settings(tiny_odd, tmp_path))
