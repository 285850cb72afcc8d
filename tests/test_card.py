"What a card asks of the code, tried with real numbers on a CPU: half precision, checkpoints, states from elsewhere"

import json

import pytest
import torch

from rtdetr_kd.deploy.accept import scaled_on_cpu, tiny_config, Sheet, accept
from rtdetr_kd.distill.strength import gram
from rtdetr_kd.learner import Learner, train
from rtdetr_kd.train.config import configure
from rtdetr_kd.train.memory import GpuAutocast, predict
from rtdetr_kd.train.parallel import choose_dtype

METHODS = ("logit", "feature", "cwd", "mgd", "query", "stage")
PRECISIONS = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module")
def sheet(tmp_path_factory):
    "A place for tiny data and runs"
    s = Sheet(tmp_path_factory.mktemp("card") / "accept.json", short=True, device="cpu")
    s.work = tmp_path_factory.mktemp("card")
    return s


@pytest.mark.parametrize("lam", ["auto", "adaptive"])
@pytest.mark.parametrize("stages", ["all", pytest.param("encoder", marks=pytest.mark.slow)])
def test_lam_is_measured_where_stages_are_computed_again(sheet, own_cache, stages, lam):
    "Each term goes backward through the same checkpointed block; λ is what it is without checkpoints"
    run = lambda name, **kw: train(tiny_config(sheet, method="query+cwd", lam=lam, epochs=2, name=name, **kw))
    a = run(f"{lam}-{stages}", checkpoint=stages)
    b = run(f"{lam}-plain-{stages}")
    assert a["lam"] == b["lam"] and a["AP"] == b["AP"]


def test_pieces_measure_what_a_step_takes(sheet):
    "The matrix of a batch that is cut is the sum over its parts, each as large as a step's"
    a, b = (Learner(tiny_config(sheet, method="cwd", accumulate=n, freeze_norm=True)) for n in (1, 2))
    seen = []
    look = b.trained.look
    b.trained.look = lambda images, *more: seen.append(len(images)) or look(images, *more)
    whole, parts = (v.pulls(v.fixed_batches(1)) for v in (a, b))
    assert seen == [2, 2] and whole["names"] == parts["names"]
    w, p = (torch.tensor(v["gram"]) for v in (whole, parts))
    assert (p.diag().sqrt() / w.diag().sqrt()).log().abs().max() < 0.5  # statistics of norms are of a part


@pytest.mark.parametrize("method", METHODS)
def test_gram_in_half_precision(sheet, method):
    "Within 5 % of float32: no term's gradient is lost, none overflows"
    half, full = (Learner(tiny_config(sheet, method=method, precision=p)) for p in ("float16", "float32"))
    half.trained.load_state_dict(full.trained.state_dict())
    batch = full.fixed_batches(1)
    with GpuAutocast(): a = torch.tensor(half.pulls(batch)["gram"]).diag().sqrt()
    b = torch.tensor(full.pulls(batch)["gram"]).diag().sqrt()
    assert (a - b).abs().max() <= 0.05 * b.max()
    felt = b > 0.01 * b.max()  # below that the forward passes themselves differ by more
    assert ((a - b).abs() <= 0.05 * b)[felt].all(), (a, b)


def test_small_gradients_are_not_lost():
    "A mean over many numbers has gradients that float16 does not know"
    x = torch.ones(1, 1, 4, 4, dtype=torch.float16, requires_grad=True)
    G = gram(dict(a=(x.float() * 1e-9).sum(), b=(x.float() * 3e4).sum()), [x])
    assert G[0, 0].sqrt().item() == pytest.approx(4e-9, rel=1e-2)
    assert G[1, 1].sqrt().item() == pytest.approx(1.2e5, rel=1e-2)


@pytest.mark.parametrize("first", PRECISIONS)
def test_a_state_goes_on_in_any_precision(sheet, first):
    "Begun with or without a gradient scaler, on with or without one"
    of = lambda p: Learner(tiny_config(sheet, method="none", precision=p, name=f"from-{first}"))
    scaled = lambda p: scaled_on_cpu(of(p)) if p == "float16" else of(p)
    a = scaled(first)
    a.one_step(next(a.updates()))
    a.save()
    for p in PRECISIONS:
        b = scaled(p)
        assert b.restore() and b.step == 1, p
        assert all(torch.equal(v, a.trained.state_dict()[k]) for k, v in b.trained.state_dict().items())
        b.one_step(next(b.updates(1)))


def test_overflow_is_counted_and_stops_the_run(sheet):
    "Nothing of what is tested is replaced: a real scaler, gradients that overflow"
    learner = scaled_on_cpu(Learner(tiny_config(sheet, method="none", epochs=90)))
    parts = next(learner.updates())
    learner.one_step(parts)
    assert learner.skipped == 0 and learner.ema.n == 1
    next(learner.model.parameters()).register_hook(lambda g: g * float("inf"))
    before = [p.detach().clone() for p in learner.model.parameters()]
    with pytest.raises(FloatingPointError, match="updates were left out because their gradients overflow"):
        for _ in range(250): learner.one_step(parts)
    assert learner.skipped == 101 and learner.ema.n == 1
    assert all(map(torch.equal, before, learner.model.parameters()))


def test_emulated_bfloat16_is_not_chosen(monkeypatch):
    "T4, GTX 16xx, RTX 20xx: torch says yes to bfloat16, and means emulation"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert choose_dtype("auto", cpu=False) == torch.float16


def test_a_timm_backbone_is_predicted():
    c = configure(data="coco", size="resnet18", method="none", image_size=64, batch=2, precision="float16")
    assert predict(c, 5, 3)["total"] > 600


def test_denoising_stays_within_its_budget():
    "Seven hundred boxes: a hundred of them, twice"
    from rtdetr_kd.model.decoder import denoising
    from rtdetr_kd.model.detector import RTDETR, Spec
    from rtdetr_kd.model.losses import detection_losses
    from rtdetr_kd.model.sizes import SIZES

    torch.manual_seed(0)
    m = RTDETR(Spec(["a", "b"], **SIZES["toy"]))
    crowd = dict(labels=torch.randint(0, 2, (700,)), boxes=torch.rand(700, 4) * 0.3 + 0.3)
    few = dict(labels=torch.tensor([1]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
    q, positive, g = denoising(m.decoder, [crowd, few])
    budget = m.decoder.denoising
    assert (q.content.shape[1], g) == (2 * budget, 1) and positive.sum(1).tolist() == [budget, 1]
    losses = detection_losses(m(torch.rand(2, 3, 64, 64), [crowd, few]), [crowd, few])
    assert all(v.isfinite() for v in losses.values())


def test_acceptance_in_its_short_form(tmp_path):
    "The checks that a CPU can do in seconds, and one sheet"
    found = accept(tmp_path / "accept.json", short=True, where="cpu",
                   only=("device", "methods", "speed", "overflow", "training", "exchange", "tensorrt"))
    assert all(c["holds"] for c in found["checks"].values())
    assert json.loads((tmp_path / "accept.json").read_text()) == found and found["short"] and found["device"] == "cpu"
