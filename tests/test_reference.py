"Our model against what the reference implementation computed (skipped where that material is absent)"

import importlib.util, json

import numpy as np
import pytest
import torch

from rtdetr_kd.model.losses import detection_losses
from rtdetr_kd.model.losses import match
from rtdetr_kd.model.weights import load_model
from conftest import shared

FILES = dict(
    r18="rtdetr_r18vd_6x_coco",
    r34="rtdetr_r34vd_6x_coco",
    r50="rtdetr_r50vd_6x_coco",
    v2_r18="rtdetrv2_r18vd_120e_coco",
)


@pytest.mark.parametrize("size", FILES)
def test_equals_the_reference(size, tmp_path):
    path = shared("oracle", "seeded_weights.py")
    module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("seeded_weights", path))
    spec.loader.exec_module(module)
    keys, golden = (
        json.loads(shared("oracle", f"{FILES[size]}_keys.json").read_text()),
        np.load(shared("oracle", f"{FILES[size]}.npz")),
    )
    state = {k: torch.from_numpy(np.asarray(module.seeded_tensor(k, tuple(s)))) for k, s in keys.items()}
    torch.save({"ema": {"module": state, "updates": 1}, "last_epoch": 71}, tmp_path / "official.pth")
    model = load_model(tmp_path / "official.pth")
    with torch.no_grad():
        out = model(torch.from_numpy(module.seeded_image()), capture=True)
    for level, m in enumerate(out.signals.memory):
        g = golden[f"encoder_{level}_mean"]
        assert np.abs(m.mean((2, 3)).numpy() - g).max() < 1e-3 * np.abs(g).max()
    ours, theirs = (
        torch.cat([out.logits, out.boxes], -1)[0],
        torch.from_numpy(np.concatenate([golden["pred_logits"], golden["pred_boxes"]], -1))[0],
    )
    gap = (ours[:, None] - theirs[None]).abs().amax(-1)  # as sets: ties of the top-k may change places
    assert gap.min(0).values.max() < 1e-3 and (gap.argmin(0) != torch.arange(len(theirs))).sum() <= 4
    targets = [
        dict(labels=torch.from_numpy(golden["target_labels"]), boxes=torch.from_numpy(golden["target_boxes"]))
    ]
    out.logits, out.boxes, out.aux = (
        torch.from_numpy(golden["pred_logits"]),
        torch.from_numpy(golden["pred_boxes"]),
        [],
    )
    _, _, q, o = match(out.logits[None], out.boxes[None], targets)
    assert dict(zip(o.tolist(), q.tolist())) == dict(
        zip(golden["match_target"].tolist(), golden["match_query"].tolist())
    )
    losses = detection_losses(out, targets)
    for ours, theirs in dict(vfl="vfl", l1="bbox", giou="giou").items():
        assert losses[ours].item() == pytest.approx(float(golden[f"loss/loss_{theirs}"]), rel=1e-4)
