"Every method on every pair of architectures: each term is finite and moves what it should, and only the student's"

import json

import pytest
import torch

from rtdetr_kd.train.config import configure
from rtdetr_kd.distill.mixtures import METHODS
from rtdetr_kd.learner import Learner, train
from rtdetr_kd.model.detector import RTDETR, Spec
from rtdetr_kd.model.sizes import SIZES
from rtdetr_kd.model.weights import read_file, save_model, weights_mark

NAMES = "zero one two three four five six seven eight nine".split()
TEACHERS = dict(
    toy=SIZES["toy"],
    wider=SIZES["toy_teacher"] | dict(queries=60, layers=4, width=16),
    r50=SIZES["r50"],
    three=SIZES["toy"] | dict(queries=300),
    dense=SIZES["toy"] | dict(attention="dense"),
)
PAIRS = dict(  # the student's settings, a teacher
    same=(dict(size="toy"), "toy"),
    r18_from_r50=(dict(size="r18"), "r50"),
    widths_and_layers=(dict(size="toy"), "wider"),
    queries_100_from_300=(dict(size="toy", queries=100, image_size=128), "three"),
    dense_from_deformable=(dict(size="toy", attention="dense"), "toy"),
    deformable_from_dense=(dict(size="toy"), "dense"),
)
KINDS = {m: dict(method=m) for m in METHODS if m != "none"} | dict(
    softmax=dict(method="logit", logit_mode="softmax"),
    stage=dict(method="stage"),
    sum=dict(method="query+logit"),
    index=dict(method="query", alignment="index"),
    hungarian=dict(method="query", alignment="hungarian"),
    random=dict(method="query", query_points="random"),
    both=dict(method="query", query_points="both"),
    last=dict(method="query", kd_layers="last", attention_loss="cosine"),
    kl=dict(method="query", attention_loss="kl"),
)
LOOK = ("cross_attn.sampling_offsets", "cross_attn.attn")
MOVES = dict(  # what a term teaches, beside the student's encoder
    kd_logit=("dec_score_head",),
    kd_labels=("dec_score_head",),
    kd_boxes=("dec_bbox_head",),
    kd_score=("dec_score_head",),
    kd_box=("dec_bbox_head",),
    kd_feature=("method",),
    kd_cwd=("method",),
    kd_mgd=("method",),
    kd_pkd=("method",),
    kd_query=("method",),
    kd_attention_map=LOOK,
    kd_attention=LOOK,
)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for name, spec in TEACHERS.items():
        torch.manual_seed(1)
        model = RTDETR(Spec(NAMES, **spec | dict(image_size=128 if name == "three" else 64)))
        save_model(model, folder / f"{name}.safetensors")
    return folder


def learner(tiny, teachers, tmp_path, pair, **kw):
    student, teacher = PAIRS[pair]
    usual = dict(
        data=str(tiny),
        teacher=str(teachers / f"{teacher}.safetensors"),
        image_size=64,
        batch=2,
        kd_points=20,
        lam=1,
        workers=0,
        runs=str(tmp_path),
    )
    return Learner(configure(**usual | student | kw))


def every_kind_of_every_pair():
    "The large pair has each method; its variants, which differ in a line that the small pairs run, are slow"
    for kind in KINDS:
        for pair in PAIRS:
            slow = pair == "r18_from_r50" and kind not in (*METHODS, "sum")
            yield pytest.param(kind, pair, id=f"{kind}-{pair}", marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize("kind, pair", [*every_kind_of_every_pair()])
def test_two_steps(tiny, teachers, tmp_path, kind, pair):
    l = learner(tiny, teachers, tmp_path, pair, **KINDS[kind])
    if kind == "boxes": l.distillation.method.least = 0.  # an untrained teacher is sure of nothing
    mark, before = weights_mark(l.distillation.teacher.model), {k: v.clone() for k, v in l.trained.named_parameters()}
    images, targets = zip(*(l.images[k] for k in range(2)))
    for _ in range(2):
        terms = l.one_step([(torch.stack(images), list(targets))])
    kd = {k: v for k, v in terms.items() if k.startswith("kd_")}
    assert kd and all(v.isfinite() for v in kd.values())
    moved = [k for k, v in l.trained.named_parameters() if not torch.equal(v, before[k])]
    assert any(k.startswith("model.encoder") for k in moved)
    torch.manual_seed(0)
    terms = l.losses(torch.stack(images).float() / 255, list(targets))
    for k in kd:  # each term alone
        l.opt.zero_grad(set_to_none=True)
        terms[k].backward(retain_graph=True)
        moved = [n for n, p in l.trained.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        deep = any(n.startswith(("model.encoder", "model.backbone")) for n in moved)
        assert deep or (k == "kd_attention" and kind == "index"), k
        assert any(part in n for n in moved for part in MOVES[k]), (k, moved[:5])
    assert all(p.grad is None for p in l.distillation.teacher.model.parameters())
    assert weights_mark(l.distillation.teacher.model) == mark and not l.distillation.teacher.model.training
    empty = [dict(labels=torch.zeros(0, dtype=torch.long), boxes=torch.zeros(0, 4))] * 2
    assert all(v.isfinite() for v in l.one_step([(torch.stack(images), empty)]).values())  # a batch without boxes


OTHERS = [
    dict(size="lite"),
    dict(size="lite", attention="dense"),
    dict(size="lite", attention="discrete"),
    dict(size="resnet10t"),
]


@pytest.mark.parametrize("settings", OTHERS, ids=lambda s: "-".join(s.values()))
def test_other_students(tiny, teachers, tmp_path, settings):
    "Two levels, dense and discrete attention, a timm backbone: each learns from the teacher's questions"
    l = learner(tiny, teachers, tmp_path, "widths_and_layers", method="query", **settings)
    images, targets = zip(*(l.images[k] for k in range(2)))
    terms = l.one_step([(torch.stack(images), list(targets))])
    assert all(v.isfinite() for v in terms.values()) and terms["kd_query"] > 0 and terms["kd_attention"] > 0


def test_attention_is_captured_only_for_who_compares_it(tiny, teachers, tmp_path):
    for method, looks in (("logit", False), ("cwd", False), ("query", True), ("feature", True)):
        l = learner(tiny, teachers, tmp_path, "deformable_from_dense", method=method)
        asked = []
        seen = lambda m, a, kw: asked.append(kw["need_weights"])
        for layer in l.distillation.teacher.model.decoder.decoder.layers:
            layer.cross_attn.attn.register_forward_pre_hook(seen, with_kwargs=True)
        l.losses(torch.rand(2, 3, 64, 64), [l.images[k][1] for k in range(2)])
        assert asked == [looks] * 3, method


def test_questions_by_lot_change_each_step_and_follow_the_seed(tiny, teachers, tmp_path):
    l = learner(tiny, teachers, tmp_path, "same", method="query", query_points="both")
    images, targets = zip(*(l.images[k] for k in range(2)))
    again = learner(tiny, teachers, tmp_path, "same", method="query", query_points="both")
    seen = {l: [], again: []}
    for one, cells in seen.items():
        drawn = one.distillation.drawn
        one.distillation.drawn = lambda *batch, drawn=drawn, cells=cells: cells.append(drawn(*batch)) or cells[-1]
    for one in (l, l, again):
        one.one_step([(torch.stack(images), list(targets))])
    first, second = (cells for cells, _ in seen[l])
    assert not torch.equal(first, second)
    assert torch.equal(seen[again][0][0], first)


def settings(tiny, teachers, tmp_path, **kw):
    usual = dict(
        data=str(tiny),
        size="toy",
        teacher=str(teachers / "wider.safetensors"),
        method="query",
        image_size=64,
        batch=8,
        epochs=2,
        eval_every=1,
        warmup=2,
        pilot=6,
        kd_points=10,
        workers=0,
        runs=str(tmp_path),
    )
    usual |= dict(keep_state=True)
    return configure(**usual | kw)


def test_the_default_sets_lam_by_the_share_of_the_gradient(tiny, teachers, tmp_path, monkeypatch):
    monkeypatch.setenv("RTDETR_KD_CACHE", str(tmp_path / "cache"))
    metrics = train(settings(tiny, teachers, tmp_path, name="a"))
    stages = metrics["strength"]["stages"]
    assert metrics["lam"] > 0 and [s["step"] for s in stages] == [2, 4, 6]
    assert sorted(s["share"] for s in stages)[1] == pytest.approx(0.2)
    other = train(settings(tiny, teachers, tmp_path, name="b", seed=1))
    assert other["lam"] == metrics["lam"]  # seeds share one λ
    weights = [read_file(tmp_path / run / "best.safetensors")[0] for run in "ab"]
    assert any(not torch.equal(v, weights[1][k]) for k, v in weights[0].items())  # and nothing else
    half = train(settings(tiny, teachers, tmp_path, name="c", rho=0.5))
    assert half["lam"] == pytest.approx(4 * metrics["lam"])  # ρ/(1-ρ): from 1/4 to 1; the pilot is not run again
    log = [json.loads(r) for r in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert all(r["lam"] == metrics["lam"] for r in log)


@pytest.mark.parametrize("kw", [dict(lam="adaptive"), dict(method="stage"), dict(method="query+cwd", lam="2")])
def test_resume_with_adapters_and_a_moving_lam(tiny, teachers, tmp_path, monkeypatch, kw):
    "Interrupted in the second of three epochs: λ, scales and adapters go on as they were"
    monkeypatch.setenv("RTDETR_KD_CACHE", str(tmp_path / "cache"))
    c = lambda where: settings(tiny, teachers, tmp_path / where, name="run", epochs=3, **kw)
    train(c("whole"))

    class Killed(Exception):
        pass

    l = Learner(c("cut"))
    step, n = l.one_step, [0]

    def dying(*a):
        n[0] += 1
        if n[0] == 5:
            raise Killed
        return step(*a)

    l.one_step = dying
    with pytest.raises(Killed):
        l.fit()
    train(c("cut"))
    a, b = (torch.load(tmp_path / w / "run/last/state.pt", weights_only=True) for w in ("whole", "cut"))
    assert a["lam"] == b["lam"] and all(torch.equal(v, b["trained"][k]) for k, v in a["trained"].items())
    assert any(k.startswith("method.") for k in a["trained"])
    log = [json.loads(r) for r in (tmp_path / "cut/run/log.jsonl").read_text().splitlines()]
    assert (len({r["lam"] for r in log}) > 1) == (kw.get("lam") == "adaptive")
    kept = read_file(tmp_path / "cut/run/best.safetensors")[0]
    assert not any(k.startswith(("method", "teacher")) for k in kept)  # the student alone


def test_cached_answers_are_the_live_ones(tiny, teachers, tmp_path, monkeypatch):
    monkeypatch.setenv("RTDETR_KD_CACHE", str(tmp_path / "cache"))
    for method in ("query", "logit", "feature", "query+mgd"):
        kw = dict(method=method, lam=1, photometric=0.5, hflip=0.5, zoom_out=0.5, iou_crop=0.5)
        live, kept = (Learner(settings(tiny, teachers, tmp_path, cache=c, **kw)) for c in ("none", "disk"))
        kept.open_cache()
        kept.epoch = 6  # the third of four views
        images, targets = zip(
            *(kept.images[(2, k)] for k in range(8))
        )  # a batch of eight, as they were asked: in another, rounding may choose another query
        terms = []
        for l in (live, kept):
            torch.manual_seed(0)
            terms.append(l.losses(torch.stack(images).float() / 255, list(targets)))
        for k, v in terms[0].items():
            assert v.item() == pytest.approx(terms[1][k].item(), rel=5e-3, abs=1e-3), (method, k)


def test_a_control_has_lambda_and_scales_of_its_run(tiny, teachers, tmp_path):
    "With another teacher nothing is measured anew: the terms are weighted as in the run that is controlled"
    kw = dict(method="query+cwd", lam=0.7, scales="query=3.7,cwd=30.7")
    for teacher in (str(teachers / "wider.safetensors"), "random:toy_teacher"):
        l = Learner(settings(tiny, teachers, tmp_path, **kw | dict(teacher=teacher)))
        l.weigh()
        assert (l.distillation.lam, l.method.scale) == (0.7, dict(query=3.7, cwd=30.7))
        assert not (l.folder / "strength.json").exists()


def test_an_untrained_teacher_is_a_control(tiny, tmp_path):
    l = Learner(
        configure(
            data=str(tiny),
            size="toy",
            method="query",
            teacher="random:toy",
            image_size=64,
            batch=8,
            lam=1,
            runs=str(tmp_path),
        )
    )
    assert l.teacher_about["select_AP"] < 0.05
    with pytest.raises(ValueError, match="random:toyy.*did you mean"):
        configure(method="query", teacher="random:toyy")


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(method="query+none"), "a sum of different ones"),
        (dict(method="logit+logit"), "a sum of different ones"),
        (dict(lam="-1"), "lam='-1': must be auto, adaptive"),
        (dict(lam="much"), "must be auto, adaptive"),
        (dict(method="query", alignment="indx"), "did you mean 'index'"),
        (dict(method="stage", stage_shape="cos"), "cosine_inverse"),
        (dict(method="query", alignment="index", query_points="both", cache="none"), "only shared queries"),
        (dict(method="query", query_points="both"), "need a live teacher"),
        (dict(logit_mode="soft"), "binary, softmax"),
        (dict(rho=1), "rho=1"),
    ],
)
def test_settings_of_distillation_that_cannot_work(given, says):
    with pytest.raises(ValueError, match=says):
        configure(**given)
