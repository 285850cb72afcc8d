"Same seed, same run; interrupted and resumed, the same run; and what must stop"

import copy, json
from dataclasses import replace

import pytest
import torch

from rtdetr_kd.train.config import configure
from rtdetr_kd.learner import Learner, train
from rtdetr_kd.model.detector import RTDETR, Spec, top_detections
from rtdetr_kd.model.sizes import SIZES
from rtdetr_kd.train.run import read_log


def config(tiny, tmp_path, **kw):
    return configure(
        **dict(
            data=str(tiny),
            size="toy",
            image_size=64,
            batch=8,
            epochs=3,
            eval_every=1,
            warmup=2,
            name="run",
            runs=str(tmp_path),
            workers=0,
            keep_state=True,
        )
        | kw
    )


def weights(folder):
    return torch.load(folder / "run/last/state.pt", weights_only=True)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_killed_and_resumed_is_bit_identical(tiny, tmp_path):
    train(config(tiny, tmp_path / "whole"))

    class Killed(Exception):
        pass

    learner = Learner(config(tiny, tmp_path / "cut"))
    step, n = learner.one_step, [0]

    def dying(*a):
        n[0] += 1
        if n[0] == 5:
            raise Killed  # in the middle of the second epoch
        return step(*a)

    learner.one_step = dying
    with pytest.raises(Killed):
        learner.fit()
    assert not (tmp_path / "cut/run/metrics.json").exists()
    train(config(tiny, tmp_path / "cut"))
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for k in ("trained", "ema", "ema_n", "opt", "step", "best"):
        assert equal(a[k], b[k]), k


def test_workers_change_nothing(tiny, tmp_path):
    for w in (0, 2):
        train(config(tiny, tmp_path / str(w), epochs=2, workers=w))  # they stay from epoch to epoch
    assert equal(weights(tmp_path / "0")["trained"], weights(tmp_path / "2")["trained"])


def test_a_broken_checkpoint_falls_back_and_never_restarts(tiny, tmp_path, capsys):
    c = config(tiny, tmp_path)
    train(c)
    last = tmp_path / "run/last"
    (tmp_path / "run/metrics.json").unlink()
    (last / "state.pt").write_bytes((last / "state.pt").read_bytes()[:1000])
    train(c)
    assert "cannot be used" in capsys.readouterr().out
    (tmp_path / "run/metrics.json").unlink()
    for p in last.glob("*.pt"):
        p.write_bytes(b"gone")
    with pytest.raises(ValueError, match="no state .* can be read"):
        train(c)


def test_another_experiment_is_refused(tiny, tmp_path):
    train(config(tiny, tmp_path, epochs=1))
    with pytest.raises(ValueError, match="lr=0.001 .now 0.0005"):
        train(config(tiny, tmp_path, epochs=1, lr=5e-4))


def test_a_nan_stops_and_leaves_a_state(tiny, tmp_path):
    learner = Learner(config(tiny, tmp_path))
    losses = learner.losses
    learner.losses = lambda *a: losses(*a) | (dict(bad=torch.tensor(float("nan"))) if learner.step == 4 else {})
    with pytest.raises(FloatingPointError, match="lower lr"):
        learner.fit()
    assert weights(tmp_path)["step"] == 3


def test_images_without_boxes_train(tiny, tmp_path):
    learner = Learner(config(tiny, tmp_path))
    empty = [dict(labels=torch.zeros(0, dtype=torch.long), boxes=torch.zeros(0, 4))] * 2
    terms = learner.one_step([(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), empty)])
    assert all(v.isfinite() for v in terms.values())
    full = learner.one_step(
        [
            (
                torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
                [dict(labels=torch.tensor([1]), boxes=torch.full((1, 4), 0.5))] * 2,
            )
        ]
    )
    assert terms.keys() == full.keys()


@pytest.mark.parametrize("size", ["toy", "toy_quiet"])
def test_every_weight_is_trained(tiny, tmp_path, monkeypatch, size):
    monkeypatch.setitem(SIZES, "toy_quiet", SIZES["toy"] | dict(denoising=0))  # no noisy queries, no weights for them
    learner = Learner(config(tiny, tmp_path, size=size))
    images, targets = learner.images[0][0][None], [learner.images[0][1]]
    learner.one_step([(images, targets)])
    learner.opt.zero_grad(set_to_none=True)
    sum(learner.losses(images.float() / 255, targets).values()).backward()
    assert [n for n, p in learner.model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(lr="fast"), "lr='fast': must be a number"),
        (dict(resume="maybe"), "True or False"),
        (dict(batch=0), "batch=0"),
        (dict(epochs=1.5), "epochs=1.5"),
        (dict(size="r17"), "size='r17'"),
        (dict(teacher="no.safetensors"), "no such weights file"),
        (dict(seed=True), "seed=True"),
        (dict(lam=float("nan")), "lam='nan'"),
        (dict(method="query", data="."), "needs a teacher"),
    ],
)
def test_bad_settings(given, says):
    with pytest.raises(ValueError, match=says):
        configure(**given)


def test_explicit_wins_over_size_over_preset():
    assert configure().queries == 30 and configure(queries=7).queries == 7 and configure(size="r18").queries == 300
    assert configure(epochs="3").epochs == 3 and configure(resume="false").resume is False


def test_a_canonical_size_keeps_its_pixels(tiny):
    "On a folder, too, whose preset is for small networks; the guide prints the same numbers"
    from rtdetr_kd.model.sizes import SIZES

    for size in ("r18", "r34", "r50m", "r50", "r101"):
        assert configure(data=str(tiny), size=size).image_size == SIZES[size]["image_size"] == 640
        assert configure(data=str(tiny), size=size, image_size=256).image_size == 256
    assert configure(data=str(tiny), size="r50", init="official:r50").image_size == 640
    assert configure(data=str(tiny), size="r18", pretrained=True).image_size == 640
    assert configure(data=str(tiny)).image_size == SIZES["small"]["image_size"] == 256


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda d: d["images"][0].update(file_name=3), "'file_name' must be a text"),
        (lambda d: d["images"][0].update(id=[1]), "'id' must be a number or a text"),
        (lambda d: d["annotations"][0].update(category_id=[1]), "category"),
    ],
)
def test_annotations_of_another_shape(tiny, tmp_path, spoil, says):
    import shutil
    from rtdetr_kd.data.dataset import load_data

    shutil.copytree(tiny, tmp_path / "d")
    path = tmp_path / "d/annotations/instances_train.json"
    d = json.loads(path.read_text())
    spoil(d)
    path.write_text(json.dumps(d))
    with pytest.raises(ValueError, match=says):
        load_data(str(tmp_path / "d"))


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda d: d["annotations"].append("x"), "annotation of an image that is not listed: dropped"),
        (
            lambda d: d["images"][0].update(width="wide"),
            "image without width and height: taken from the file: repaired",
        ),
    ],
)
def test_what_is_harmless_is_counted_and_stops_a_strict_run(tiny, tmp_path, spoil, says):
    import shutil
    from rtdetr_kd.data.dataset import load_data

    shutil.copytree(tiny, tmp_path / "d")
    path = tmp_path / "d/annotations/instances_train.json"
    d = json.loads(path.read_text())
    spoil(d)
    path.write_text(json.dumps(d))
    assert load_data(str(tmp_path / "d"))["train"].notes[says] == 1
    with pytest.raises(ValueError, match=says.split(":")[0]):
        load_data(str(tmp_path / "d"), strict=True)


def test_numbers_as_texts_and_huge_ids_are_read(tiny, tmp_path):
    import shutil
    from rtdetr_kd.data.dataset import load_data
    from rtdetr_kd.data.split import ground_truth

    shutil.copytree(tiny, tmp_path / "d")
    path = tmp_path / "d/annotations/instances_train.json"
    d = json.loads(path.read_text())
    d["images"][0].update(width="64", id=10**25)
    path.write_text(json.dumps(d))
    train = load_data(str(tmp_path / "d"))["train"]
    assert train.sizes[0].tolist() == [64, 64] and ground_truth(train)["images"][0]["id"] == 10**25


def test_a_full_disk_stops_with_a_sentence_and_leaves_a_state(tiny, tmp_path, monkeypatch):
    learner = Learner(config(tiny, tmp_path))
    save, n = torch.save, [0]

    def full(state, f):
        n[0] += 1
        if n[0] > 1:
            raise OSError(28, "No space left on device")
        save(state, f)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="is the disk full"):
        learner.fit()
    monkeypatch.undo()
    assert weights(tmp_path)["step"] == 3 and not list((tmp_path / "run/last").glob("*.part"))
    train(config(tiny, tmp_path))
    train(config(tiny, tmp_path / "whole"))
    assert equal(weights(tmp_path)["trained"], weights(tmp_path / "whole")["trained"])


def test_twenty_kills(tiny, tmp_path):
    "kill -9 at any moment, and the same command again: bit for bit the undisturbed run"
    import multiprocessing, random, time

    c = lambda where: config(tiny, tmp_path / where, epochs=8, save_minutes=1e-6)  # a state after each step
    start = time.time()
    train(c("whole"))
    whole, rng, kills = time.time() - start, random.Random(0), 0
    context = multiprocessing.get_context("fork")
    while not (tmp_path / "cut/run/metrics.json").exists():
        p = context.Process(target=train, args=(c("cut"),))
        p.start()
        p.join(timeout=rng.uniform(0.02, 0.12 * whole) if kills < 20 else None)
        if p.is_alive():
            p.kill()
            kills += 1
        else:
            assert p.exitcode == 0
        p.join()
    assert kills == 20, kills
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for k in ("trained", "ema", "ema_n", "opt", "step", "best"):
        assert equal(a[k], b[k]), k
    rows = [
        [json.loads(r) for r in (tmp_path / w / "run/log.jsonl").read_text().splitlines()] for w in ("whole", "cut")
    ]
    for x, y in zip(*rows, strict=True):
        assert x["loss"] == y["loss"] and x["select_AP"] == y["select_AP"]


def test_a_damaged_state_is_not_half_used(tiny, tmp_path, capsys):
    "A state that lacks a part falls back to the one before, and two of them stop the run"
    c = config(tiny, tmp_path)
    learner = Learner(c)
    learner.folder.mkdir(parents=True)
    learner.one_step([(torch.zeros(8, 3, 64, 64, dtype=torch.uint8), [learner.images[k][1] for k in range(8)])])
    learner.save()
    learner.save()
    s = weights(tmp_path)
    del s["opt"]["state"][0]["exp_avg"], s["ema_n"]
    torch.save(s, learner.folder / "last/state.pt")
    other = Learner(c)
    assert other.restore() and other.ema.n == 1 and "cannot be used" in capsys.readouterr().out
    torch.save(s, learner.folder / "last/previous.pt")
    with pytest.raises(ValueError, match="no state in"):
        Learner(c).restore()


def test_resumed_schedule_and_average_go_on(tiny, tmp_path):
    "Learning rates and the average's counter after a resume are those of a run that never stopped"
    a = Learner(config(tiny, tmp_path, warmup=6))
    a.folder.mkdir(parents=True)
    batch = torch.zeros(8, 3, 64, 64, dtype=torch.uint8), [a.images[k][1] for k in range(8)]
    rate = lambda l: (l.one_step([batch]), l.opt.param_groups[0]["lr"], l.ema.n)[1:]
    for _ in range(3):
        rate(a)
    a.save()
    b = Learner(config(tiny, tmp_path, warmup=6))
    b.restore()
    assert [rate(a) for _ in range(4)] == [rate(b) for _ in range(4)]


def test_an_overflowing_update_moves_neither_schedule_nor_average(tiny, tmp_path, monkeypatch):
    l = Learner(config(tiny, tmp_path, warmup=100))
    batch = torch.zeros(8, 3, 64, 64, dtype=torch.uint8), [l.images[k][1] for k in range(8)]
    rates = []
    for skipped in (True, True, True, False, False):
        monkeypatch.setattr(Learner, "clip", lambda self: skipped)  # what finds an overflow is in test_card
        l.one_step([batch])
        rates.append(l.opt.param_groups[0]["lr"])
    assert (l.step, l.skipped, l.ema.n) == (5, 3, 2) and len({*rates[:4]}) == 1 and rates[4] > rates[3]
    l.step, l.skipped = 150, 101
    with pytest.raises(FloatingPointError, match="101 of 150 updates were left out.*precision='bfloat16'"):
        l.one_step([batch])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_helps_and_leaves_a_state(tiny, tmp_path, error):
    l, n = Learner(config(tiny, tmp_path, save_minutes=1e-9)), [0]
    real = l.losses

    def greedy(*a):
        n[0] += 1
        if n[0] == 3:
            raise error
        return real(*a)

    l.losses = greedy
    with pytest.raises(MemoryError, match="checkpoint='all'.*accumulate=2"):
        l.fit()
    assert weights(tmp_path)["step"] == 2
    train(config(tiny, tmp_path, checkpoint="all"))  # the remedy goes on from there


def altered(tiny, to, change):
    "The tiny set with its annotations changed"
    import shutil

    shutil.copytree(tiny, to)
    for p in to.rglob("instances_*.json"):
        d = json.loads(p.read_text())
        change(d)
        p.write_text(json.dumps(d))
    return to


def one_class(d):
    d["categories"] = d["categories"][:1]
    for a in d["annotations"]:
        a["category_id"] = d["categories"][0]["id"]


def single_pixels(d):
    for a in d["annotations"]:
        a["bbox"][2:], a["area"] = [1, 1], 1


def crowded(d):
    a = d["annotations"][0]
    d["annotations"] += [a | dict(id=10**6 + k, bbox=[k, k, 9, 9]) for k in range(40)]


@pytest.mark.parametrize(
    "given, change, says",
    [
        (dict(batch=1), None, ""),
        (dict(batch=7), None, ""),
        (dict(batch=5, accumulate=5), None, ""),
        (dict(method="query", teacher="random:toy", lam="1", cache="none", batch=1), None, ""),
        ({}, one_class, ""),
        ({}, single_pixels, ""),
        (dict(queries=30), crowded, "30 queries find no more"),
    ],
)
def test_small_and_odd_data_train(tiny, tmp_path, capsys, given, change, says):
    data = altered(tiny, tmp_path / "data", change) if change else tiny
    m = train(config(data, tmp_path, max_steps=2, **given))
    assert m["steps"] == 2 and says in capsys.readouterr().out


def test_low_scores_are_pointed_out(tiny, tmp_path, capsys):
    l = Learner(config(tiny, tmp_path))
    l.step, l.store.log = 50, [dict(loss=9.0), dict(loss=5.0)]
    l.tell_of_scores(0.3)
    assert not capsys.readouterr().out
    l.tell_of_scores(0.05)
    assert "halve it" in capsys.readouterr().out


def test_a_full_disk_while_the_best_weights_are_written(tiny, tmp_path, monkeypatch):
    import rtdetr_kd.train.store as L
    from safetensors import SafetensorError

    def full(*a, **kw):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(L, "save_model", full)
    with pytest.raises(OSError, match="is full: make room and start the same command again"):
        Learner(config(tiny, tmp_path, save_minutes=1e-9)).fit()
    monkeypatch.undo()
    assert weights(tmp_path)["step"] == 2  # the epoch's last step is done again
    train(config(tiny, tmp_path))
    train(config(tiny, tmp_path / "whole"))
    assert equal(weights(tmp_path)["trained"], weights(tmp_path / "whole")["trained"])


def test_best_stays_best_after_a_resume(tiny, tmp_path, monkeypatch):
    "The best score is part of the state: a worse epoch after a resume does not take the file"
    a = Learner(config(tiny, tmp_path))
    a.folder.mkdir(parents=True)
    judge = lambda ap: lambda self, model, name: (dict.fromkeys(("AP", "AP50", "AP75"), ap), [])
    monkeypatch.setattr(Learner, "judged", judge(0.5))
    a.assess()
    a.save()
    file = tmp_path / "run/best.safetensors"
    before = file.read_bytes()
    b = Learner(config(tiny, tmp_path))
    b.restore()
    monkeypatch.setattr(Learner, "judged", judge(0.31))
    assert b.assess()["select_AP"] == 0.31 and b.store.best == dict(AP=0.5, epoch=0) and file.read_bytes() == before


def test_a_resume_with_another_setting_is_one_sentence(tiny, tmp_path):
    from rtdetr_kd.train.command import main

    words = [
        f"--{k}={v}"
        for k, v in dict(
            data=tiny,
            size="toy",
            image_size=64,
            batch=8,
            max_steps=1,
            workers=0,
            tracker="none",
            runs=tmp_path,
            name="run",
        ).items()
    ]
    main(words)
    with pytest.raises(SystemExit, match=r"Stopped: .* holds a run with lr=0.001 \(now 0.002\)"):
        main([*words, "--lr=2e-3"])


def test_a_script_without_a_main_guard(tiny, tmp_path):
    "Where processes start anew, as on Windows, each loader process would run the script again"
    import os, subprocess, sys

    script = tmp_path / "go.py"
    script.write_text(
        "import multiprocessing\nmultiprocessing.set_start_method('spawn')\n"
        "from rtdetr_kd.train.config import configure\nfrom rtdetr_kd.train.run import train\n"
        f"train(configure(data={str(tiny)!r}, size='toy', image_size=64, batch=8, max_steps=2, workers=2, "
        f"tracker='none', runs={str(tmp_path)!r}, name='run'))\n"
    )
    p = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
    )
    assert p.returncode == 0, p.stderr[-2000:]
    assert p.stdout.count("go.py has no line if __name__") == 1 and p.stdout.count("val: AP") == 1


def test_predictions_that_are_not_finite_are_not_matched():
    from rtdetr_kd.model.losses import match

    logits, boxes = torch.zeros(1, 1, 4, 2), torch.full((1, 1, 4, 4), 0.5)
    target = [dict(labels=torch.tensor([1]), boxes=torch.full((1, 4), 0.5))]
    assert len(match(logits, boxes, target)[0]) == 1
    for spoilt in (logits, boxes):
        spoilt[0, 0, 2, 1] = float("nan")  # at the class that is looked for
        with pytest.raises(FloatingPointError, match="predictions are not finite"):
            match(logits, boxes, target)
        spoilt[0, 0, 2, 1] = 0.5


def test_a_state_of_another_optimiser_variant_goes_on(tiny, tmp_path):
    "Plain AdamW's state, as an earlier version may have written it, resumed by the fused one: the same step"
    a = Learner(config(tiny, tmp_path))
    a.folder.mkdir(parents=True)
    batch = torch.zeros(8, 3, 64, 64, dtype=torch.uint8), [a.images[k][1] for k in range(8)]
    a.one_step([batch])
    a.save()
    s = weights(tmp_path)
    for g in s["opt"]["param_groups"]:
        g["fused"] = False
    b = Learner(config(tiny, tmp_path))
    b.load_state(s)
    a.one_step([batch])
    b.one_step([batch])
    for p, q in zip(a.model.parameters(), b.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_one_model_any_size():
    "Nothing of an image's size is stored; one class and few cells give fewer detections"
    m = RTDETR(Spec(["a"], **SIZES["toy"] | dict(queries=100))).eval()
    with torch.no_grad():
        for h, w, n in ((32, 32, 21), (64, 64, 84), (96, 160, 100)):
            out = m(torch.rand(1, 3, h, w))
            assert [v.shape[1] for v in top_detections(out.logits, out.boxes, 300)] == [n] * 3


def test_a_line_from_time_to_time(tiny, tmp_path, capsys):
    "G06: where no terminal is, too, and also while it evaluates"
    from rtdetr_kd.model.evaluate import predict

    learner = Learner(config(tiny, tmp_path))
    capsys.readouterr()
    learner.one_epoch(every=-1)
    assert len([l for l in capsys.readouterr().out.splitlines() if l.startswith("epoch 1/3 step")]) == learner.steps
    predict(learner.model, learner.splits["val"], batch=4, every=-1)
    assert capsys.readouterr().out.splitlines() == ["  val: 4 of 8 images looked at", "  val: 8 of 8 images looked at"]


def test_the_gradient_of_one_image_is_right(tiny, tmp_path):
    "In torch 2.14 on a CPU a batch norm's gradient is wrong for one image in some layouts; ours is not among them"
    l = Learner(config(tiny, tmp_path))
    images, targets = l.on_device(*l.fixed_batches(1)[0])

    def gradient(model, x):
        model.train().zero_grad()
        torch.manual_seed(0)
        maps = model.encoder(model.backbone(x))
        cells = torch.cat(
            [proj(m).flatten(2).transpose(1, 2) for proj, m in zip(model.decoder.input_proj, maps)], 1
        )  # (1,cells,d), as the decoder does
        (cells * torch.linspace(-1, 1, cells.numel(), dtype=cells.dtype).view_as(cells)).sum().backward()
        return torch.cat([p.grad.flatten().double() for p in model.backbone.parameters()])

    ours = gradient(l.model, images[:1])
    exact = gradient(copy.deepcopy(l.model).double(), images[:1].double().contiguous())
    assert (ours - exact).norm() < 1e-2 * exact.norm()


def test_the_parameters_cell_is_written_by_config():
    "Each setting has one description: the comment in `Config`"
    from pathlib import Path

    from rtdetr_kd.train.config import parameters_cell

    nb = json.loads((Path(__file__).resolve().parent.parent / "nbs/train.ipynb").read_text(encoding="utf-8"))
    cell = next(c for c in nb["cells"] if c["metadata"].get("tags") == ["parameters"])
    assert "".join(cell["source"]) == parameters_cell(), "print(parameters_cell()) says what the cell should be"


@pytest.mark.parametrize(
    "code", ["import rtdetr_kd.config", "from rtdetr_kd.config import configure; configure(method='query')"]
)
def test_settings_load_nothing_heavy(code):
    import subprocess, sys

    p = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, timeout=120)
    assert p.returncode == 0, p.stderr[-500:]
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in p.stderr.splitlines() if "|" in line}
    assert "dataclasses" in loaded  # the list is there at all
    assert not loaded & {"torch", "pandas", "sklearn", "matplotlib", "transformers", "timm"}


def test_a_state_has_these_parts(tiny, tmp_path):
    "Other versions read them"
    parts = "trained ema ema_n opt scaler epoch step skipped best log lam sums seconds".split()
    assert sorted(Learner(config(tiny, tmp_path)).state()) == sorted(parts)


def test_two_parts_of_a_batch_give_the_gradient_of_one(tiny, tmp_path, monkeypatch):
    "Whatever boxes the parts have; noisy queries and batch norms, which see a part only, are set aside"
    monkeypatch.setitem(SIZES, "toy_quiet", SIZES["toy"] | dict(denoising=0))
    l = Learner(config(tiny, tmp_path, size="toy_quiet"))
    l.trained.eval()
    images = torch.stack([l.images[k][0] for k in range(4)])
    targets = [l.images[k][1] for k in range(4)]

    def gradient(*cuts):
        l.opt.zero_grad(set_to_none=True)
        l.backward([(images[a:z], targets[a:z]) for a, z in cuts])
        return torch.cat([p.grad.flatten() for p in l.model.encoder.parameters()])

    one = gradient((0, 4))
    for cuts in (((0, 1), (1, 4)), ((0, 2), (2, 4)), ((0, 1), (1, 2), (2, 3), (3, 4))):
        assert (gradient(*cuts) - one).norm() < 1e-4 * one.norm()


@pytest.mark.slow
def test_compiled_steps_are_the_same_steps(tiny, tmp_path):
    "Through the compiler, with the kernels it writes here: minutes"
    usual = dict(method="query+cwd", epochs=1, max_steps=2, teacher="random:toy", teacher_min_ap=0, rho=0.3, pilot=3)
    logs = []
    for compiled in (False, True):
        train(config(tiny, tmp_path / str(compiled), compile=compiled, **usual))
        logs.append(read_log(tmp_path / str(compiled) / "run")[0])
    for k in ("loss", "lam", "kd_share"):
        assert logs[1][k] == pytest.approx(logs[0][k], rel=1e-3), k
