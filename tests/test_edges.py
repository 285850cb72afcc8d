"The network and its losses at their edges: other number types, other sizes, boxes without extent, too many objects"

from copy import deepcopy

import pytest
import torch

from rtdetr_kd.model.decoder import anchors, logit
from rtdetr_kd.model.losses import detection_losses, layer_losses
from rtdetr_kd.model.losses import costs, match
from rtdetr_kd.model.detector import RTDETR, Spec
from rtdetr_kd.model.sizes import SIZES
from rtdetr_kd.model.weights import load_model, save_model

EMPTY = dict(labels=torch.zeros(0, dtype=torch.long), boxes=torch.zeros(0, 4))
ONE = dict(labels=torch.tensor([1]), boxes=torch.tensor([[0.5, 0.5, 0.3, 0.2]]))


def small(**kw):
    torch.manual_seed(0)
    m = RTDETR(Spec(["a", "b"], **SIZES["toy"] | kw)).eval()
    for head in m.decoder.dec_bbox_head:
        torch.nn.init.normal_(head.layers[-1].weight, std=0.05)
    return m


@pytest.mark.parametrize(
    "kw", [dict(), dict(attention="dense"), dict(attention="discrete"), dict(backbone="resnet10t")]
)
@torch.no_grad()
def test_every_number_type(kw):
    "half(), bfloat16() and double() leave nothing behind, and double says what float32 says"
    m, x = small(**kw), torch.rand(2, 3, 64, 96)
    m.decoder.queries = 400  # every cell is a query: rounding cannot choose others

    def answer(t):
        n = deepcopy(m).to(t)
        assert {v.dtype for v in [*n.parameters(), *n.buffers()] if v.is_floating_point()} == {t}
        assert not [k for k in n.modules() for v in vars(k).values() if isinstance(v, torch.Tensor)]
        o = n(x.to(t), [ONE, EMPTY], capture=True)
        order = o.signals.index.argsort(1)[..., None]  # by cell
        return o, *(v.gather(1, order.expand_as(v)) for v in (o.logits, o.boxes))

    _, scores, boxes = answer(torch.float32)
    o, s, b = answer(torch.float64)
    if kw.get("attention") != "discrete":  # there a rounded place may be the next cell
        torch.testing.assert_close(s.float(), scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(b, boxes, rtol=0, atol=1e-4)
    for t in (torch.bfloat16, torch.float16):
        o, s, b = answer(t)
        assert s.dtype == t and b.dtype == torch.float32 and s.isfinite().all() and b.isfinite().all()
        if kw.get("attention") != "discrete":
            torch.testing.assert_close(b, boxes, rtol=0, atol=0.15)
        assert all(v.isfinite() for v in detection_losses(o, [ONE, EMPTY]).values())


def test_no_boxes_at_all_with_and_without_denoising():
    "Keys are those of any batch, values finite; without denoising its weights do not exist, and the file loads"
    for n in (100, 0):
        m = small(denoising=n).train()
        none, some = (detection_losses(m(torch.rand(2, 3, 64, 64), t), t) for t in ([EMPTY, EMPTY], [ONE, EMPTY]))
        assert none.keys() == some.keys() and all(v.isfinite() for v in none.values())
        assert any("_dn" in k for k in none) == any("denoising" in k for k, _ in m.named_parameters()) == bool(n)
        sum(none.values()).backward()
        assert [k for k, p in m.named_parameters() if p.grad is None] == []  # no weight that is never trained


def test_weights_without_denoising_load(tmp_path):
    m = small(denoising=0)
    save_model(m, tmp_path / "w.safetensors")
    assert load_model(tmp_path / "w.safetensors").state_dict().keys() == m.state_dict().keys()


def test_450_objects_for_300_queries():
    crowd = dict(labels=torch.zeros(450, dtype=torch.long), boxes=torch.rand(450, 4) * 0.5 + 0.2)
    l, i, q, o = match(torch.randn(1, 1, 300, 2), torch.rand(1, 1, 300, 4) * 0.5 + 0.2, [crowd])
    assert len(set(q.tolist())) == len(set(o.tolist())) == len(q) == 300


def test_half_precision_at_the_limits():
    "Logits of ±60000 and fractions of exactly 0 and 1, in float16: costs and losses are finite float32"
    s = torch.tensor([[60000.0, -60000.0], [-60000.0, 60000.0]]).half()[None, None]  # (l,b,q,c)
    b = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1]]).half()[None, None]
    two = dict(labels=torch.tensor([0, 0]), boxes=torch.tensor([[0.0, 0, 0, 0], [0.5, 0.5, 1, 1]]))
    C = costs(s, b, two["labels"], two["boxes"])
    terms = layer_losses(s, b, match(s, b, [two]), two["labels"], two["boxes"], 2)
    for v in (C, logit(b), *terms.values()):
        assert v.dtype == torch.float32 and v.isfinite().all()


def test_boxes_without_extent_have_finite_losses_and_gradients():
    s, b = torch.zeros(1, 1, 1, 1, requires_grad=True), torch.tensor([0.5, 0.5, 0, 0]).view(1, 1, 1, 4).requires_grad_()
    point = dict(labels=torch.tensor([0]), boxes=torch.tensor([[0.5, 0.5, 0, 0]]))
    terms = layer_losses(s, b, match(s, b, [point]), point["labels"], point["boxes"], 1)
    sum(v.sum() for v in terms.values()).backward()
    assert all(v.isfinite().all() for v in (*terms.values(), s.grad, b.grad))


@torch.no_grad()
def test_trained_at_one_size_run_at_others(tmp_path):
    "No tensor of the file knows an image size; anchors are those of the maps that arrive"
    torch.manual_seed(0)
    m = RTDETR(Spec(["a"], **SIZES["toy"] | dict(image_size=640, queries=20)))  # untrained boxes are anchors
    save_model(m, tmp_path / "w.safetensors")
    m = load_model(tmp_path / "w.safetensors")
    for h, w in ((320, 320), (288, 512)):
        o = m(torch.rand(1, 3, h, w), capture=True)
        own = anchors(tuple((h // s, w // s) for s in (8, 16, 32)))[0].sigmoid()[0]
        torch.testing.assert_close(o.boxes[0], own[o.signals.index[0]], rtol=0, atol=1e-4)


@pytest.mark.parametrize("size, side, training", [("toy", 96, True), ("toy", 96, False), ("r18", 64, True)])
def test_the_gradient_of_one_image(size, side, training):
    "A loop of one's own, one image in rows: torch's batch norm would be wrong by as much as the gradient is long"
    target = dict(labels=torch.tensor([1, 0]), boxes=torch.tensor([[0.3, 0.3, 0.2, 0.3], [0.6, 0.6, 0.3, 0.2]]))

    def gradient(dtype, layout):
        torch.manual_seed(0)
        m = RTDETR(Spec(["a", "b"], **SIZES[size] | dict(denoising=0, queries=20))).train(training)
        m = m.to(dtype, memory_format=layout)
        torch.manual_seed(1)
        x = torch.rand(1, 3, side, side).to(dtype).contiguous(memory_format=layout)
        o = m(x, [{k: v.to(dtype) if v.is_floating_point() else v for k, v in target.items()}])
        torch.manual_seed(2)
        pairs = [(o.logits, o.boxes), *o.aux, o.encoder]
        sum((v * torch.randn(v.shape).to(dtype)).sum() for pair in pairs for v in pair).backward()
        return torch.cat([p.grad.double().flatten() for p in m.parameters() if p.grad is not None])

    right = gradient(torch.float64, torch.channels_last)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert (gradient(torch.float32, layout) - right).norm() < 0.01 * right.norm()
