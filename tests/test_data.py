"A real data set, and the embedded one as files"
import json

import numpy as np

from rtdetr_kd.data import load_data, summary
from rtdetr_kd.evaluate import coco_ap, ground_truth
from conftest import shared


def test_a_real_data_set():
    splits = load_data(str(shared("data", "bccd")))
    assert [len(s) for s in splits.values()] == [185, 20, 87] and splits["val"].category_ids == [1, 2, 3]
    raw = json.loads(shared("data", "bccd", "annotations", "instances_train.json").read_text())
    flat = sum(a["bbox"][2] <= 0 or a["bbox"][3] <= 0 for a in raw["annotations"])
    text = summary(splits)
    assert flat and f"{flat}× box without area: dropped" in text, text  # counted, and said
    assert len(splits["train"].boxes) + len(splits["select"].boxes) == len(raw["annotations"]) - flat
    assert not set(splits["train"].files) & set(splits["select"].files)


def test_perfect_predictions_are_perfect():
    val = load_data(str(shared("data", "bccd")))["val"]
    found = [dict(image_id=a["image_id"], category_id=a["category_id"], bbox=a["bbox"], score=1.) for a in ground_truth(val)["annotations"]]
    assert abs(coco_ap(ground_truth(val), found)["AP"] - 1) < 1e-6
    assert np.isfinite(val.boxes).all()
