"A student cut out of its teacher: what is exact, what is cut, and that the cuts agree"
import copy

import pytest
import torch
from conftest import ROOT

from rtdetr_kd.distill.inherit import anatomy, by_level, cut_student, evenly, inherit, measure_norms, scramble, streams
from rtdetr_kd.model.detector import RTDETR, Spec
from rtdetr_kd.model.losses import detection_losses
from rtdetr_kd.model.sizes import SIZES
from rtdetr_kd.model.weights import load_model, save_model
from rtdetr_kd.props import NAMES, batch

COCO = [f"class {k}" for k in range(80)]


def made(size, seed=0, names=NAMES, **changes):
    torch.manual_seed(seed)
    return RTDETR(Spec(names, **SIZES[size] | changes)).eval()


@pytest.fixture(scope="module")
def shipped():
    return load_model(str(ROOT / "weights/toy_teacher.safetensors")).eval()


@pytest.mark.parametrize("size", ["toy", "toy_teacher", "lite"])
@pytest.mark.parametrize("attention", ["deformable", "dense"])
def test_of_its_own_size_the_student_is_the_teacher(size, attention):
    teacher, student = (made(size, seed, attention=attention) for seed in (0, 1))
    report = inherit(student, teacher)
    assert set(report.kinds.values()) == {"exact"} and not report.said
    for k, v in student.state_dict().items(): assert torch.equal(v, teacher.state_dict()[k]), k
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad(): a, b = student(x), teacher(x)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.boxes, b.boxes)


def test_r18_of_r34_has_every_tensor_of_it():
    "The official layout: three of four decoder layers, two of three to six blocks"
    teacher, student = made("r34", names=COCO), made("r18", 1, names=COCO)
    report = inherit(student, teacher)
    assert set(report.kinds.values()) == {"exact"}
    T = teacher.state_dict()
    for k, v in student.state_dict().items(): assert torch.equal(v, T[report.sources[k]]), k


def test_r18_of_r50_has_its_decoder():
    teacher, student = made("r50", names=COCO), made("r18", 1, names=COCO)
    before = copy.deepcopy(student.backbone.state_dict())
    report = inherit(student, teacher)
    for k, kind in report.kinds.items():
        v = student.state_dict()[k]
        if k.startswith("decoder."): assert kind == "exact" and torch.equal(v, teacher.state_dict()[k]), k
        if k.startswith("backbone."): assert kind == "new" and torch.equal(v, before[k[9:]]), k
    own = {k for k, kind in report.kinds.items() if kind == "new" and k.startswith("encoder.")}
    assert own == {f"encoder.input_proj.{i}.0.weight" for i in range(3)}  # they read the backbone
    assert len(report.said) == 2 and "resnet18vd" in report.said[0] and "encoder.input_proj" in report.said[1]


@pytest.mark.parametrize("how", ["even", "strongest"])
@pytest.mark.parametrize("s, t", [("toy", "toy_teacher"), ("toy", "small"), ("lite", "r18"), ("small", "r18"),
                                  ("toy", "r50"), ("small", "toy"), ("r18", "toy_teacher")])
def test_any_pair_of_our_sizes(s, t, how):
    "Also where the teacher is the smaller one: then the student's numbers stay, and it is said"
    student, teacher = made(s), made(t, 1)
    report = inherit(student, teacher, how)
    shares = report.shares()["all"]
    assert sum(shares.values()) == sum(v.numel() for v in student.state_dict().values())
    assert bool(report.said) == bool(shares.get("new"))
    with torch.no_grad(): assert student(torch.rand(1, 3, 64, 64)).boxes.isfinite().all()


def test_one_index_set_for_each_stream(shipped):
    "Every tensor of the student is the teacher's at the index sets of its streams"
    for how in ("even", "strongest"):
        student = made("toy")
        report, net = cut_student(student, shipped, how, scale="none"), anatomy(made("toy"))
        for k, v in student.state_dict().items():
            if not v.dim(): continue
            w = shipped.state_dict()[report.sources[k]]
            for d, s in enumerate(streams(by_level(k, net.levels), net, v.dim())):
                w = w.index_select(d, report.cut(s, w.shape[d], v.shape[d]))
            assert torch.equal(v, w), (how, k)


def test_classes_go_by_name(shipped):
    student = made("toy", names=["Seven", "cat", "one"])
    own = student.decoder.dec_score_head[0].bias.clone()
    inherit(student, shipped)
    theirs, ours = shipped.decoder.dec_score_head[0].bias, student.decoder.dec_score_head[0].bias
    assert torch.equal(ours, torch.stack([theirs[7], own[1], theirs[1]]))
    embedded = student.decoder.denoising_class_embed.weight
    assert torch.equal(embedded[3], shipped.decoder.denoising_class_embed.weight[10][evenly(128, 64)])  # "none" is last


def test_other_levels_and_other_backbones(shipped):
    two = made("toy", levels=2)
    assert set(inherit(two, shipped, "even").kinds.values()) <= {"cut", "exact"}
    coarse, theirs = two.encoder.input_proj[1][0].weight, shipped.encoder.input_proj[2][0].weight
    assert torch.equal(coarse, theirs[evenly(128, 64)][:, evenly(256, 128)])
    timm = made("toy", backbone="resnet10t")
    assert "resnet10t" in inherit(timm, shipped).said[0]
    again = made("toy", 1, backbone="resnet10t")
    assert set(inherit(again, timm).kinds.values()) == {"exact"}  # one and the same network


def test_parts(shipped):
    student, before = made("toy"), made("toy").state_dict()
    report = inherit(student, shipped, parts="decoder")
    assert set(report.shares()["encoder"]) == {"new"} and not report.said
    changed = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith("decoder.") for k in changed)
    assert not [k for k in changed if report.kinds[k] == "new"]


def test_a_file_of_it_is_it(shipped, tmp_path):
    student = made("toy")
    inherit(student, shipped)
    save_model(student, tmp_path / "s.safetensors")
    x = torch.rand(1, 3, 128, 128)
    with torch.no_grad(): a, b = student(x), load_model(str(tmp_path / "s.safetensors")).eval()(x)
    assert torch.equal(a.logits, b.logits)


# --- what it is worth ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def scenes():
    return batch(range(40, 72), 128)


def loss_of(model, scenes):
    "The detector's loss in training mode, of the same denoising queries"
    x, targets = scenes
    torch.manual_seed(0)
    with torch.no_grad(): out = copy.deepcopy(model).train()(x, targets)
    return sum(v.item() for v in detection_losses(out, targets).values())


def trained(model, scenes, steps=30):
    "The mean loss of the last five steps"
    x, targets = scenes
    torch.manual_seed(0)
    opt, log = torch.optim.AdamW(model.parameters(), 1e-3), []
    for k in range(steps):
        part = slice(k % 2 * 16, k % 2 * 16 + 16)
        loss = sum(detection_losses(model.train()(x[part], targets[part]), targets[part]).values())
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), .5)
        opt.step()
        log.append(loss.item())
    return sum(log[-5:]) / 5


def test_an_aligned_cut_learns_faster_than_a_scrambled_one_and_than_none(shipped, scenes):
    aligned = made("toy")
    inherit(aligned, shipped)
    scrambled = scramble(copy.deepcopy(aligned))
    for (k, v), w in zip(aligned.state_dict().items(), scrambled.state_dict().values()):
        assert torch.equal(v.flatten().sort().values, w.flatten().sort().values), k  # the same numbers
    loss = {k: trained(m, scenes) for k, m in dict(aligned=aligned, scrambled=scrambled, none=made("toy")).items()}
    assert loss["aligned"] < loss["scrambled"] - 1 and loss["aligned"] < loss["none"] - 1, loss


def test_a_healed_cut_answers_before_any_training(shipped, scenes):
    "Its loss is far below an untrained student's, and its maps are the teacher's on the channels that were kept"
    healed, even = made("toy"), made("toy")
    inherit(healed, shipped, "fit", images=list(scenes[0].split(16)))
    inherit(even, shipped, "even")
    loss = {k: loss_of(m, scenes) for k, m in dict(healed=healed, none=made("toy")).items()}
    assert loss["healed"] < loss["none"] - 2, loss

    def likeness(model):
        with torch.no_grad(): a, b = (m.encoder(m.backbone(scenes[0]))[2] for m in (model, shipped))
        a, b = (v.transpose(0, 1).flatten(1) for v in (a, b[:, evenly(128, 64)]))
        return torch.stack([torch.corrcoef(torch.stack(p))[0, 1] for p in zip(a, b)]).nan_to_num().mean().item()
    assert likeness(healed) > likeness(scramble(copy.deepcopy(even))) + .3


def test_norms_are_measured_on_the_images_that_are_given(shipped, scenes):
    student = made("toy")
    inherit(student, shipped)
    measured = measure_norms(copy.deepcopy(student), [scenes[0]])
    got = []
    first = measured.backbone.conv1[0]
    first.norm.register_forward_pre_hook(lambda m, a: got.append(a[0]))
    with torch.no_grad(): measured(scenes[0])
    assert torch.allclose(first.norm.running_mean, got[0].mean((0, 2, 3)), atol=1e-4)
    for k, v in student.named_parameters(): assert torch.equal(v, dict(measured.named_parameters())[k])
