"A teacher of other classes: refused, mapped by name, or its scores left out"

import pytest
import torch

from rtdetr_kd.train.config import configure
from rtdetr_kd.learner import Learner
from rtdetr_kd.model.detector import RTDETR, Spec
from rtdetr_kd.model.sizes import SIZES
from rtdetr_kd.model.weights import save_model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    "Untrained, of three classes: two of the data's in another order, and one of its own"
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "t.safetensors"
    save_model(RTDETR(Spec(["Three", "cat", "one"], **SIZES["toy"] | dict(image_size=64))), path)
    return path


def learner(tiny, teacher, tmp_path, **kw):
    return Learner(
        configure(
            data=str(tiny),
            size="toy",
            image_size=64,
            batch=8,
            teacher=str(teacher),
            kd_points=10,
            lam=1,
            workers=0,
            runs=str(tmp_path),
            **kw,
        )
    )


def terms(l):
    images, targets = zip(*(l.images[k] for k in range(4)))
    return l.losses(torch.stack(images).float() / 255, list(targets))


def test_logits_of_other_classes_are_refused(tiny, teacher, tmp_path):
    with pytest.raises(ValueError, match="teacher_classes='by_name'"):
        learner(tiny, teacher, tmp_path, method="logit")


def test_queries_leave_the_scores_out(tiny, teacher, tmp_path, capsys):
    out = terms(learner(tiny, teacher, tmp_path, method="query"))
    assert "kd_box" in out and "kd_score" not in out and "leaves its score term out" in capsys.readouterr().out


@pytest.mark.parametrize("method, term", [("logit", "kd_logit"), ("query", "kd_score")])
def test_by_name_compares_the_common_classes(tiny, teacher, tmp_path, method, term):
    l = learner(tiny, teacher, tmp_path, method=method, teacher_classes="by_name")
    assert l.distillation.columns == ([2, 0], [1, 3])  # data: zero one two three ...
    loss = terms(l)[term]
    assert loss.isfinite() and loss > 0
    loss.backward()
    rows = l.model.decoder.dec_score_head[-1].weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert rows == [1, 3]  # no other class is pushed


def test_no_class_in_common(tiny, tmp_path):
    path = tmp_path / "t.safetensors"
    save_model(RTDETR(Spec(["cat"], **SIZES["toy"] | dict(image_size=64))), path)
    with pytest.raises(ValueError, match="no name is in both"):
        learner(tiny, path, tmp_path, method="logit", teacher_classes="by_name")
    assert learner(tiny, path, tmp_path, method="query").teacher_about["select_AP"] is None
    with pytest.raises(ValueError, match="cannot be measured"):
        learner(tiny, path, tmp_path, method="query", teacher_min_ap=0.1)


def test_a_teacher_below_the_gate_stops_the_run(tiny, teacher, tmp_path):
    with pytest.raises(ValueError, match="below teacher_min_ap=0.3"):
        learner(tiny, teacher, tmp_path, method="query", teacher_min_ap=0.3)
