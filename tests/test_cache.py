"Kept answers of the shipped teacher: another processor's rounding is accepted, another teacher is not"
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, scenes

from rtdetr_kd.data.dataset import Images, load_data
from rtdetr_kd.distill.cache import alike, arrays, cached_answers, gaps
from rtdetr_kd.distill.mixtures import make_method
from rtdetr_kd.distill.teacher import Teacher, surest
from rtdetr_kd.model import decoder
from rtdetr_kd.model.detector import RTDETR, Spec
from rtdetr_kd.model.sizes import SIZES
from rtdetr_kd.model.weights import load_model


@pytest.fixture(scope="module")
def wise() -> RTDETR:
    return load_model(str(ROOT / "weights/toy_teacher.safetensors")).eval()


@pytest.fixture
def asked(wise, tmp_path, monkeypatch):
    "Images, a method that keeps only scores and boxes, and what asks a model for its 20 surest questions"
    monkeypatch.setenv("RTDETR_KD_CACHE", str(tmp_path / "cache"))
    images = Images(load_data(str(scenes(tmp_path / "data", train=12, select=4, val=4)))["train"], wise.spec.image_size)
    student = RTDETR(Spec(wise.spec.names, **SIZES["toy"]))
    def of(model, bits=torch.float32):
        def ask(pixels):
            with torch.autocast("cpu", torch.bfloat16, enabled=bits == torch.bfloat16):
                return surest(Teacher(model)(pixels.float() / 255), 20)
        return ask
    return images, make_method("logit", student, wise), of


def one_further(f, rows):
    "Query selection in which, in those images, the last of the chosen cells gives way to the first that was not chosen"
    def select(dec, memory, shapes):
        q, out = f(dec, memory, shapes)
        dec.queries += 1
        more, _ = f(dec, memory, shapes)
        dec.queries -= 1
        def mixed(one, two):
            two = torch.cat([two[:, :-2], two[:, -1:]], 1)
            return torch.stack([two[i] if i in rows else one[i] for i in range(len(one))])
        names = ("content", "ref", "index", "logits", "boxes")
        return replace(q, **{k: mixed(getattr(q, k), getattr(more, k)) for k in names}), out
    return select


def test_another_cell_at_the_cut_of_query_selection_is_accepted(wise, asked, monkeypatch):
    images, method, of = asked
    kept = cached_answers(images, 1, of(wise), method, "wise")
    stored = arrays(kept.rows(range(12)), method)
    monkeypatch.setattr(decoder, "select", one_further(decoder.select, (0, 2, 10, 11)))
    live = arrays(of(wise)(torch.stack([images[k][0] for k in range(12)])), method)
    found = [gaps(*({k: v[i] for k, v in a.items()} for a in (live, stored))) for i in range(12)]
    assert {k for k, g in enumerate(found) if not alike(g, 20)} <= {0, 2, 10, 11}
    assert max(g.max() for g in found) > .05  # self-attention carries the exchange into other answers
    cached_answers(images, 1, of(wise), method, "wise")
    monkeypatch.setattr(decoder, "select", one_further(decoder.select, range(12)))
    with pytest.raises(ValueError, match="answers otherwise"):  # ties are rare
        cached_answers(images, 1, of(wise), method, "wise")


def test_another_batch_in_half_precision_is_accepted(wise, asked):
    images, method, of = asked
    ask = of(wise, torch.bfloat16)
    cached_answers(images, 1, ask, method, "half")
    alone = lambda pixels: joined([ask(p[None]) for p in pixels])
    cached_answers(images, 1, alone, method, "half")


def joined(outs):
    "Answers to single images as one answer"
    s = [o.signals for o in outs]
    per_layer = {k: torch.cat([getattr(v, k) for v in s], 1) for k in ("logits", "boxes")}
    signals = replace(s[0], index=torch.cat([v.index for v in s]), **per_layer)
    return replace(outs[0], signals=signals)


def test_another_teacher_is_refused(wise, asked):
    images, method, of = asked
    cached_answers(images, 1, of(wise), method, "wise")
    torch.manual_seed(0)
    fresh = RTDETR(wise.spec).eval()
    noisy = copy.deepcopy(wise)
    with torch.no_grad():
        for p in noisy.parameters(): p.mul_(1 + .02 * torch.randn_like(p))
    for other in (fresh, noisy):
        with pytest.raises(ValueError, match="answers otherwise"):
            cached_answers(images, 1, of(other), method, "wise")


@pytest.mark.parametrize("steps", [2, 20])
def test_a_fine_tuned_teacher_is_refused(wise, asked, steps):
    images, method, of = asked
    cached_answers(images, 1, of(wise), method, "wise")
    tuned = copy.deepcopy(wise).requires_grad_(True)
    opt = torch.optim.AdamW(tuned.parameters(), lr=1e-5)
    x = torch.stack([images[k][0] for k in range(4)]).float() / 255
    for _ in range(steps):
        out = tuned(x)
        loss = out.logits.sigmoid().mean() + .1 * out.boxes.mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    with pytest.raises(ValueError, match="answers otherwise"):
        cached_answers(images, 1, of(tuned.eval()), method, "wise")


@pytest.mark.parametrize("image", [0, 11])
def test_a_damaged_answer_is_refused(wise, asked, image):
    images, method, of = asked
    kept = cached_answers(images, 1, of(wise), method, "wise")
    file = np.load(kept.folder / "boxes.npy", mmap_mode="r+")
    file[image] += .1
    file.flush()
    with pytest.raises(ValueError, match=f"stored for image {image}"):
        cached_answers(images, 1, of(wise), method, "wise")


def test_a_fill_that_goes_on_in_other_batches_knows_its_batches(wise, asked):
    images, method, of = asked
    asked_for = []
    def dies(pixels):
        asked_for.append(len(pixels))
        if len(asked_for) == 4: raise KeyboardInterrupt
        return of(wise)(pixels)
    with pytest.MonkeyPatch.context() as m:
        minutes = iter(range(0, 10**6, 60))  # progress is written after each batch
        m.setattr("rtdetr_kd.distill.cache.time.time", minutes.__next__)
        with pytest.raises(KeyboardInterrupt):
            cached_answers(images, 1, dies, method, "cut", batch=3)
    kept = cached_answers(images, 1, of(wise), method, "cut", batch=5)
    assert kept.batches == [range(0, 3), range(3, 6), range(6, 11), range(11, 12)]
