"Every method trains, and moves what it should: the student and its own adapters, never the teacher"
import pytest
import torch

from rtdetr_kd.config import configure
from rtdetr_kd.kd_schedules import METHODS
from rtdetr_kd.learner import Learner
from rtdetr_kd.model import RTDETR, SIZES, Spec
from rtdetr_kd.weights import save_model, weights_mark

NAMES = "zero one two three four five six seven eight nine".split()
TEACHERS = dict(same=SIZES["toy"], wider_and_deeper=SIZES["toy_teacher"] | dict(queries=60, layers=4, width=16), dense=SIZES["toy"] | dict(attention="dense"))


@pytest.fixture(scope="module", params=TEACHERS)
def teacher(request, tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("teacher") / f"{request.param}.safetensors"
    save_model(RTDETR(Spec(NAMES, **TEACHERS[request.param] | dict(image_size=64))), path)
    return path


@pytest.mark.parametrize("method", [m for m in METHODS if m != "none"])
def test_two_steps(tiny, teacher, tmp_path, method):
    l = Learner(configure(data=str(tiny), size="toy", method=method, teacher=str(teacher), image_size=64, batch=4, kd_points=20, workers=0, runs=str(tmp_path)))
    mark, before = weights_mark(l.teacher.model), {k: v.clone() for k, v in l.trained.named_parameters()}
    images, targets = zip(*(l.images[k] for k in range(4)))
    for _ in range(2): terms = l.one_step(torch.stack(images), list(targets))
    kd = {k: v for k, v in terms.items() if k.startswith("kd_")}
    assert kd and all(v.isfinite() for v in kd.values()) and sum(kd.values()) > 0
    moved = [k for k, v in l.trained.named_parameters() if not torch.equal(v, before[k])]
    assert any(k.startswith("model.encoder") for k in moved) and weights_mark(l.teacher.model) == mark and not l.teacher.model.training
    l.opt.zero_grad(set_to_none=True)  # the distillation terms alone reach the student
    torch.manual_seed(0)
    terms = l.losses(torch.stack(images).float() / 255, list(targets))
    sum(v for k, v in terms.items() if k.startswith("kd_")).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in l.model.parameters())
    assert all(p.grad is None for p in l.teacher.model.parameters())
    empty = [dict(labels=torch.zeros(0, dtype=torch.long), boxes=torch.zeros(0, 4))] * 4
    assert all(v.isfinite() for v in l.one_step(torch.stack(images), empty).values())  # a batch without boxes


@pytest.mark.parametrize("settings", [dict(size="lite"), dict(size="lite", attention="dense"), dict(size="lite", attention="discrete"), dict(size="r18"), dict(size="resnet10t")],
                         ids=lambda s: "-".join(s.values()))
def test_other_students(tiny, teacher, tmp_path, capsys, settings):
    "Two levels, dense and discrete attention, a canonical R18, a timm backbone: each learns from the teacher's questions, and what is left out is said"
    l = Learner(configure(data=str(tiny), method="query", teacher=str(teacher), image_size=64, batch=2, kd_points=10, workers=0, runs=str(tmp_path), **settings))
    images, targets = zip(*(l.images[k] for k in range(2)))
    terms = l.one_step(torch.stack(images), list(targets))
    assert all(v.isfinite() for v in terms.values()) and terms["kd_query"] > 0  # boxes of two untrained nets are the same anchors
    assert ("kd_attention" in terms) != ("leaves its attention term out" in capsys.readouterr().out)
