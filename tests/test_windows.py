"A batch that is cut into parts teaches what the whole batch teaches"
from dataclasses import fields, replace

import pytest
import torch

from rtdetr_kd.distill.logits import match_queries
from rtdetr_kd.distill.mixtures import make_method
from rtdetr_kd.distill.teacher import Teacher, masses, random_questions
from rtdetr_kd.model.detector import Output
from rtdetr_kd.props import batch, overfit, tiny

KINDS = dict(
    query=("query", {}), last=("query", dict(layers="last", attention_loss="cosine")),
    index=("query", dict(alignment="index")), hungarian=("query", dict(alignment="hungarian")),
    both=("query", dict(points="both", lots=20)), random=("query", dict(points="random", lots=20)),
    logit=("logit", {}), boxes=("boxes", dict(least=.02)), softmax=("logit", dict(mode="softmax")),
    feature=("feature", {}), maps=("feature", dict(attention=0)),
    cwd=("cwd", {}), pkd=("pkd", {}), mgd=("mgd", {}), sum=("query+mgd", {}), stage=("stage", {}))


@pytest.fixture(scope="module")
def pair():
    "Eight scenes; a teacher that knows four of them, and a student with fewer queries"
    x, targets = batch(range(8))
    teacher = Teacher(overfit(tiny(queries=40, d=96), x[:4], targets[:4], 25))
    student = overfit(tiny(1, queries=30), x[:4], targets[:4], 10)
    return x, [t | dict(lot=(0, 5, k)) for k, t in enumerate(targets)], teacher, student


def only(value, keep):
    "The output of some images"
    def cut(k, v):
        if isinstance(v, list): return [m[keep] for m in v]
        return v if v is None or k == "shapes" else v[keep] if k == "index" else v[:, keep]
    of = lambda s: None if s is None else replace(s, **{f.name: cut(f.name, getattr(s, f.name)) for f in fields(s)})
    return Output(value.logits[keep], value.boxes[keep], signals=of(value.signals), shared=of(value.shared))


def leaves(value):
    "The same output as numbers that a gradient is wanted for, and a list of them"
    found = []
    def leaf(v):
        if isinstance(v, list): return [leaf(m) for m in v]
        if not isinstance(v, torch.Tensor) or not v.is_floating_point(): return v
        found.append(v.detach().requires_grad_())
        return found[-1]
    of = lambda s: None if s is None else replace(s, **{f.name: leaf(getattr(s, f.name)) for f in fields(s)})
    return Output(leaf(value.logits), leaf(value.boxes), signals=of(value.signals), shared=of(value.shared)), found


def said(pair, method):
    "What both networks say about all eight scenes; questions by lot are each image's own"
    x, targets, teacher, student = pair
    lots, shapes = [t["lot"] for t in targets], teacher(x[:1]).signals.shapes
    drawn = random_questions(8, method.lots, shapes, lots=lots) if method.lots else None
    t = teacher(x, drawn)
    own = [(t.signals.index, t.signals.reference[0])] if method.own else []
    points = tuple(torch.cat(v, 1) for v in zip(*own, *([drawn] if drawn else []))) if method.asks else None
    return t, student(x, capture=True, points=points)


def gradient(pair, method, sizes, window=True):
    "At student and adapters, of a batch in parts of these sizes; without `window` each part stands for itself"
    targets = [t if window else {k: v for k, v in t.items() if k != "lot"} for t in pair[1]]
    (t, out), cuts = said(pair, method), [slice(sum(sizes[:k]), sum(sizes[:k + 1])) for k in range(len(sizes))]
    (out, numbers), shares = leaves(out), [n / 8 for n in sizes]
    total = masses([method.weight(only(t, cut), out.logits.shape[1]) for cut in cuts], shares)
    method.zero_grad(set_to_none=True)
    for cut, share, mass in zip(cuts, shares, total):
        handed = dict(mass=mass) if window and method.weighs else {}
        terms = method(only(out, cut), only(t, cut), targets[cut], .3, **handed)
        (share * sum(terms.values())).backward()
    return torch.cat([p.grad.flatten() for p in (*numbers, *method.parameters()) if p.grad is not None])


def made(pair, kind):
    name, options = KINDS[kind]
    torch.manual_seed(0)
    return make_method(name, pair[3], pair[2].model, {name: options})


def apart(a, b): return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_of_a_batch_changes_nothing(pair, kind):
    method = made(pair, kind)
    whole = gradient(pair, method, [8])
    for sizes in ([4, 4], [2] * 4, [1] * 8, [3, 3, 2]): assert apart(gradient(pair, method, sizes), whole) < 1e-6, sizes


@pytest.mark.parametrize("kind", ["query", "logit", "mgd"])
def test_without_the_sum_of_the_batch_it_would(pair, kind):
    "The check above can fail: parts that stand for themselves teach something else"
    method, found = made(pair, kind), []
    for sizes in ([8], [1] * 8):
        torch.manual_seed(0)
        found.append(gradient(pair, method, sizes, window=False))
    assert apart(*found) > .02


def test_an_image_s_pairs_do_not_depend_on_the_others(pair):
    x, _, teacher, student = pair
    t, out = teacher(x), student(x, capture=True)
    strange = torch.cat([out.boxes[:1], torch.full_like(out.boxes[1:], 30.)])  # others that are far off
    pairs = match_queries(out.logits, out.boxes, t.logits, t.boxes)
    again = match_queries(out.logits, strange, t.logits, t.boxes)
    first = [p[pairs[0] == 0] for p in pairs], [p[again[0] == 0] for p in again]
    assert all(torch.equal(a, b) for a, b in zip(*first))
    for k in range(8):
        alone = match_queries(out.logits[k:k + 1], out.boxes[k:k + 1], t.logits[k:k + 1], t.boxes[k:k + 1])
        here = pairs[0] == k
        assert torch.equal(alone[1], pairs[1][here]) and torch.equal(alone[2], pairs[2][here])


def test_one_part_is_the_whole(pair):
    "Where the batch is not cut, the sum that is handed in is the one found without it, to the last bit"
    for kind in ("query", "index"):
        method = made(pair, kind)
        assert torch.equal(gradient(pair, method, [8]), gradient(pair, method, [8], window=False)), kind
