"Data sets, however dirty: real, written for one fault each, or drawn at random"

import contextlib, copy, io, json, math, shutil, unicodedata

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from PIL import Image

from conftest import CATS, ann, folder_of, image, read, shared, write
from rtdetr_kd.data.augment import augmentation
from rtdetr_kd.data.coco import read_coco
from rtdetr_kd.data.dataset import Images, in_order, load_data, loader, order, summary
from rtdetr_kd.data.report import check
from rtdetr_kd.data.split import ground_truth, pack_split
from rtdetr_kd.model.evaluate import coco_ap


pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_real_data_set():
    splits = load_data(str(shared("data", "bccd")))
    assert [len(s) for s in splits.values()] == [185, 20, 87] and splits["val"].category_ids == [1, 2, 3]
    raw = json.loads(shared("data", "bccd", "annotations", "instances_train.json").read_text())
    flat = sum(a["bbox"][2] <= 0 or a["bbox"][3] <= 0 for a in raw["annotations"])
    text = summary(splits)
    assert flat and f"{flat}× box without area: dropped" in text, text  # counted, and said
    assert len(splits["train"].boxes) + len(splits["select"].boxes) == len(raw["annotations"]) - flat
    assert not set(splits["train"].files) & set(splits["select"].files)
    with pytest.raises(ValueError, match="box without area"):
        load_data(str(shared("data", "bccd")), strict=True)


def test_perfect_predictions_are_perfect():
    val = load_data(str(shared("data", "bccd")))["val"]
    found = [
        dict(image_id=a["image_id"], category_id=a["category_id"], bbox=a["bbox"], score=1.0)
        for a in ground_truth(val)["annotations"]
    ]
    assert abs(coco_ap(ground_truth(val), found)["AP"] - 1) < 1e-6
    assert np.isfinite(val.boxes).all()


# --- one fault each -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[3, 7, 90], [0, 1, 2], [90, 3, 7], ["b", "a", "c"], [5, "x", 2.5]])
def test_category_ids_of_any_kind(tmp_path, ids):
    s = read(tmp_path, cats=[dict(id=i, name=f"n{i}") for i in ids], anns=[ann(k, c=i) for k, i in enumerate(ids)])
    assert sorted(s.labels) == [0, 1, 2]
    assert [s.category_ids[c] for c in s.labels] == ids and [s.names[c] for c in s.labels] == [f"n{i}" for i in ids]
    assert [type(s.category_ids[c]) for c in s.labels] == [type(i) for i in ids]


FAULTS = dict(
    no_iscrowd=(
        dict(anns=[{k: v for k, v in ann(1).items() if k != "iscrowd"}]),
        "annotation without iscrowd: one object: repaired",
        1,
    ),
    no_area=(dict(anns=[ann(1, area=None)]), "annotation without area: width × height taken: repaired", 1),
    no_id=(dict(anns=[ann(None), ann(None, 2)]), "annotation without id: numbered: repaired", 2),
    same_id=(dict(anns=[ann(1), ann(1, 2)]), "annotation id used twice: both boxes are kept: repaired", 2),
    texts=(
        dict(anns=[ann("1", "1", "1", ["10", "10", "20", "20"], area="400")]),
        "number written as a text: read as a number: repaired",
        1,
    ),
    flat=(dict(anns=[ann(1), ann(2, box=(50, 60, 12, 0))]), "box without area: dropped", 1),
    negative=(dict(anns=[ann(1), ann(2, box=(30, 30, -5, 10))]), "box without area: dropped", 1),
    outside=(dict(anns=[ann(1), ann(2, 2), ann(3, box=(300, 30, 5, 10))]), "box outside its image: dropped", 2),
    partly=(
        dict(anns=[ann(1), ann(2, 2), ann(3, box=(-2, -1, 60, 30))]),
        "box partly outside its image: clipped: repaired",
        3,
    ),
    far_out=(
        dict(anns=[ann(1), ann(2, 2), ann(3, box=(-20, -5, 60, 30))]),
        "box more than a few pixels outside its image: clipped: look",
        3,
    ),
    endless=(
        dict(anns=[ann(1), ann(2, 2), ann(3, box=(-1e9, -1e9, 2e9, 2e9))]),
        "box outside its image: dropped",
        2,
    ),
    twice=(dict(anns=[ann(1), ann(2), ann(3, c=2)]), "object listed twice: counted once: repaired", 2),
    nan=(dict(anns=[ann(1), ann(2, box=(math.nan, 1, 2, 3))]), "box that is no four numbers: dropped", 1),
    null=(dict(anns=[ann(1), ann(2) | dict(bbox=None)]), "box that is no four numbers: dropped", 1),
    three=(dict(anns=[ann(1), ann(2, box=(1, 2, 3))]), "box that is no four numbers: dropped", 1),
    words=(dict(anns=[ann(1), ann(2, box=("a", 1, 2, 3))]), "box that is no four numbers: dropped", 1),
    stray=(dict(anns=[ann(1), ann(2, 99)]), "annotation of an image that is not listed: dropped", 1),
    unused_placeholder=(dict(cats=[dict(id=0, name="objects"), *CATS]), "", 1),
    two_names=(
        dict(cats=[*CATS, dict(id=5, name="cat")]),
        "several categories of one name: they stay different classes: look",
        1,
    ),
    cat_twice=(dict(cats=[*CATS, CATS[0]]), "categories listed twice: counted once: repaired", 1),
    image_twice=(dict(images=[image(1), image(1), image(2)]), "images listed twice: counted once: repaired", 1),
    file_twice=(
        dict(images=[image(1, "a.png"), image(2, "a.png")]),
        "file listed under several image ids: each knows only its own boxes: look",
        1,
    ),
    no_size=(
        dict(images=[{k: v for k, v in image(1).items() if k in ("id", "file_name")}]),
        "image without width and height: taken from the file: repaired",
        1,
    ),
    size_text=(dict(images=[image(1, w="100", h="80")]), "", 1),
    bom=(dict(text=lambda d: b"\xef\xbb\xbf" + json.dumps(d).encode()), "", 1),
    utf16=(dict(text=lambda d: json.dumps(d).encode("utf-16")), "", 1),
)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_counted_and_named(tmp_path, name):
    k, says, boxes = FAULTS[name]
    s = read(tmp_path, **k)
    assert list(s.notes) == ([says] if says else []) and len(s.boxes) == boxes
    assert all(p.where for p in s.problems)
    assert s.boxes.size == 0 or (s.boxes[:, 2:] > s.boxes[:, :2]).all()
    if says:  # strict stops at each of them
        with pytest.raises(ValueError, match="strict"):
            read_coco(
                tmp_path / "d/annotations/instances_train.json", tmp_path / "d/images/train", "train", strict=True
            )


STOPS = dict(
    unknown_category=(dict(anns=[ann(1), ann(2, c=9)]), "category that is not listed.*annotation 2"),
    ambiguous_image=(
        dict(images=[image(1, "a.png"), image("1", "b.png")]),
        "stands for two entries.*a.png and b.png",
    ),
    ambiguous_category=(dict(cats=[*CATS, dict(id=1, name="cow")]), "stands for two entries.*cat and cow"),
    lost_class=(dict(anns=[ann(1), ann(2, c=2, box=(1, 1, 0, 5))]), "category that lost all its boxes.*dog"),
    no_category=(dict(cats=[]), "names no category"),
    no_name=(dict(images=[dict(id=1)]), "has no 'file_name'"),
    broken=(dict(text=lambda d: json.dumps(d).encode()[:-30]), "not readable JSON"),
    no_list=(dict(text=lambda d: b'{"images": []}'), "no list 'annotations'"),
)


@pytest.mark.parametrize("name", STOPS)
def test_what_would_corrupt_the_result_stops(tmp_path, name):
    k, says = STOPS[name]
    with pytest.raises(ValueError, match=says):
        read(tmp_path, **k, draw=name != "no_name")
    write(tmp_path / "d", split="val")
    report = check(tmp_path / "d", progress=False)  # and the report lists it instead of stopping
    assert not report.ok and "stop" in set(report.faults().done)


def test_corners_and_fractions_are_suspected(tmp_path):
    rng = np.random.default_rng(0)
    lo, size = rng.uniform(0, [60, 50], (30, 2)), rng.uniform(10, 30, (30, 2))
    right = [ann(k, box=b) for k, b in enumerate(np.concatenate([lo, size], 1).tolist())]
    corners = [ann(k, box=b) for k, b in enumerate(np.concatenate([lo, lo + size], 1).tolist())]
    fractions = [ann(k, box=(np.array(a["bbox"]) / 100).tolist()) for k, a in enumerate(right)]
    assert not [p for p in read(tmp_path, anns=right).problems if p.done != "repaired"]  # areas of 400 are wrong
    for anns, word in ((corners, "xyxy"), (fractions, "fractions")):
        with pytest.raises(ValueError, match=f"give boxes='{word}'"):
            read(tmp_path, anns=anns)


def test_mixed_ids_come_back_as_they_were(tmp_path):
    s = read(
        tmp_path, images=[image(1), image("img_b"), image("3")], anns=[ann(1, "1"), ann(2, "img_b"), ann(3, 3)]
    )
    assert s.ids.tolist() == [1, "img_b", "3"] and s.start.tolist() == [0, 1, 2, 3]
    gt = ground_truth(s)
    found = [dict(image_id=i, category_id=1, bbox=[10, 10, 20, 20], score=0.9) for i in (1, "img_b", "3")]
    assert coco_ap(gt, found)["AP"] == pytest.approx(1)


def test_crowds_and_negatives(tmp_path):
    rle = dict(size=[80, 100], counts=[0, 8000])
    f = folder_of(
        tmp_path,
        images=[image(1), image(2), image(3)],
        anns=[ann(1), ann(2, 2, iscrowd=1, segmentation=rle), ann(3, 2, box=(50, 9, 9, 9), iscrowd=1)],
    )
    s = load_data(str(f))["train"]
    assert len(s) == 3 and s.crowd.tolist() == [False, True, True]
    for augment in (None, augmentation()):
        _, targets = next(iter(loader(Images(s, 64, augment), [[(0, 0), (0, 1), (0, 2)]])))
        assert [len(t["labels"]) for t in targets][1:] == [0, 0] and targets[1]["boxes"].shape == (0, 4)
        assert targets[2]["labels"].dtype == torch.int64 and targets[2]["boxes"].dtype == torch.float32


# --- files ----------------------------------------------------------------------------------------------------


def test_names_of_every_kind(tmp_path):
    names = ["with space.png", "ünï/cödé 日本.png", "deep/er/x.png", "UPPER.PNG"]
    f = folder_of(tmp_path, images=[image(k, n) for k, n in enumerate(names)], anns=[ann(1, 0)])
    p = f / "annotations/instances_train.json"
    d = json.loads(p.read_text())
    for im, n in zip(
        d["images"], [names[0], unicodedata.normalize("NFD", names[1]), "C:\\x\\er\\x.png", "upper.png"]
    ):
        im["file_name"] = n
    d["images"][2]["file_name"] = "er\\x.png"
    p.write_text(json.dumps(d))
    s = load_data(str(f))["train"]
    assert s.files == names and sum(s.notes.values()) == 3
    assert len(list(loader(Images(s, 32), in_order(4, 2)))) == 2


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "text", "folder"])
def test_unreadable_images(tmp_path, how):
    f = folder_of(
        tmp_path, images=[image(k, f"{k}.jpg") for k in range(1, 9)], anns=[ann(k, k) for k in range(1, 9)]
    )

    def spoil(k, split="train"):
        p = f / f"images/{split}/{k}"
        whole = p.read_bytes()
        p.unlink()
        if how == "folder":
            p.mkdir()
        elif how != "missing":
            p.write_bytes(dict(empty=b"", cut=whole[: len(whole) // 2], text=b"<html>404</html>")[how])

    for k in (2, 5):
        spoil(f"{k}.jpg")
    s = load_data(str(f))["train"]  # a few are dropped and said
    assert (
        s.ids.tolist() == [1, 3, 4, 6, 7, 8]
        and len(s.boxes) == 6
        and s.notes["image that cannot be read: dropped"] == 2
    )
    assert "2.jpg" in summary(dict(train=s))
    with pytest.raises(ValueError, match="2.jpg"):
        load_data(str(f), strict=True)
    for k in (1, 3):
        spoil(f"{k}.jpg")
    with pytest.raises(ValueError, match=r"cannot be read: 50% of 8 are more than the limit images=0.01.*\(4×"):
        load_data(str(f))  # many are no accident
    shutil.rmtree(f)
    f = folder_of(tmp_path)
    spoil("2.png", "val")
    with pytest.raises(ValueError, match="2.png"):
        load_data(str(f))  # AP over other images is another number


def test_files_that_break_during_an_epoch(tmp_path, capsys):
    f = folder_of(tmp_path, images=[image(k) for k in range(1, 21)], anns=[ann(k, k) for k in range(1, 21)])
    data = Images(load_data(str(f))["train"], 32, augmentation())
    (f / "images/train/4.png").write_bytes(b"gone bad")
    for workers in (0, 2):
        assert [len(x) for x, _ in loader(data, order(20, 5, 0, workers), workers)] == [5] * 4
    said = capsys.readouterr().out
    assert said.count("4.png") == 1 and "1 of at most 3" in said
    for k in (8, 12, 16):
        (f / f"images/train/{k}.png").unlink()
    with pytest.raises(ValueError, match="4 images could not be read"):
        list(loader(data, order(20, 5, 0, 0)))


def test_sizes_and_exif(tmp_path):
    f = folder_of(tmp_path, images=[image(1, "seen.jpg", 80, 100), image(2, "stored.jpg", 100, 80)])
    exif = Image.Exif()
    exif[0x0112] = 6
    for n in ("seen", "stored"):
        Image.new("RGB", (100, 80)).save(f / f"images/train/{n}.jpg", exif=exif)
    s = load_data(str(f))["train"]
    assert [Images(s, 32).read(k).shape[1:] for k in (0, 1)] == [
        (100, 80),
        (80, 100),
    ]  # auto: by the annotated size
    assert "photograph labelled as stored: its EXIF turn is left out: repaired" in s.notes
    with pytest.raises(ValueError, match="stored.jpg is 100×80, annotated 100×80|stored.jpg"):
        load_data(str(f), exif="apply")
    with pytest.raises(ValueError, match="seen.jpg"):
        load_data(str(f), exif="ignore")
    with pytest.raises(ValueError, match="auto, apply or ignore"):
        load_data(str(f), exif="maybe")
    Image.new("RGB", (50, 40)).save(f / "images/train/stored.jpg")
    with pytest.raises(ValueError, match="stored.jpg is 50×40, annotated 100×80"):
        load_data(str(f))


def test_formats_and_shapes_of_images(tmp_path):
    made = {
        "1bit.png": Image.new("1", (30, 20)),
        "grey.png": Image.new("L", (30, 20)),
        "la.png": Image.new("LA", (30, 20)),
        "p.png": Image.new("P", (30, 20)),
        "rgba.png": Image.new("RGBA", (30, 20)),
        "cmyk.jpg": Image.new("CMYK", (30, 20)),
        "16.png": Image.fromarray(np.full((20, 30), 30000, np.uint16)),
        "16.tif": Image.fromarray(np.full((20, 30), 30000, np.uint16)),
        "w.webp": Image.new("RGB", (30, 20)),
        "b.bmp": Image.new("RGB", (30, 20)),
        "g.gif": Image.new("P", (30, 20)),
        "dot.png": Image.new("RGB", (1, 1)),
        "line.png": Image.new("RGB", (3000, 1)),
        "pillar.jpg": Image.new("L", (2, 900)),
    }
    f = folder_of(
        tmp_path,
        images=[image(n, n, *im.size) for n, im in made.items()],
        draw=False,
        anns=[ann(k, n, box=(0, 0, *im.size)) for k, (n, im) in enumerate(made.items())],
    )
    for n, im in made.items():
        im.save(f / "images/train" / n)
    s = load_data(str(f))["train"]
    for augment in (None, augmentation(mosaic=0.3)):
        x, targets = next(iter(loader(Images(s, 48, augment), [[(3, k) for k in range(len(s))]])))
        assert x.shape == (len(made), 3, 48, 48) and x.dtype == torch.uint8
        assert all(
            t["boxes"].isfinite().all() and (t["boxes"] >= 0).all() and (t["boxes"] <= 1).all() for t in targets
        )


def test_a_panorama(tmp_path):
    Image.new("1", (20000, 9000)).save(tmp_path / "wide.png")
    s = pack_split(
        "train",
        tmp_path,
        [image(1, "wide.png", 20000, 9000)],
        [(0, 5000, 1000, 7000, 2000, 0, 0, 2e6)],
        [(1, "cat")],
    )
    x, t = Images(s, 64)[0]
    assert x.shape == (3, 64, 64) and np.allclose(t["boxes"], [[0.3, 1 / 6, 0.1, 1 / 9]])


def test_many_boxes_one_class_one_image(tmp_path):
    f = folder_of(
        tmp_path,
        images=[image(1)],
        cats=CATS[:1],
        anns=[ann(k, box=(k % 40 * 2, k // 40 * 5, 6, 5)) for k in range(500)],
    )
    for split in ("val", "select"):
        write(f, split=split, cats=CATS[:1], anns=[ann(1)])
    (f / "annotations/instances_select.json").unlink()
    splits = load_data(str(f))
    assert splits["train"].names == ["cat"] and len(splits["train"]) == len(splits["select"]) == 1
    assert "the images of train are also the ones to choose by" in summary(splits)
    assert len(Images(splits["train"], 64, augmentation())[0][1]["labels"]) <= 500


def test_splits_that_do_not_fit(tmp_path):
    f = folder_of(tmp_path, anns=[ann(1), ann(2, c=2)])
    write(f, split="val", images=[], anns=[])
    with pytest.raises(ValueError, match="'val' has no image"):
        load_data(str(f))
    write(f, split="val", cats=[dict(id=5, name="dog")], anns=[ann(1, c=5)])
    s = load_data(str(f))["val"]
    assert (
        s.names == ["cat", "dog"] and s.labels.tolist() == [1] and s.category_ids[1] == 5
    )  # by name, with its own id
    write(f, split="val", cats=[dict(id=1, name="yak")])
    with pytest.raises(ValueError, match="other classes than train"):
        load_data(str(f))
    write(f, split="val")
    shutil.copy(f / "images/train/1.png", f / "images/val/2.png")
    assert "image that is also in train" in summary(load_data(str(f)))
    Image.new("RGB", (9, 9)).save(f / "images/train/not_listed.png")
    assert "not_listed.png" in summary(load_data(str(f)))


def test_a_repaired_copy(tmp_path):
    f = folder_of(
        tmp_path,
        images=[image(1, "a.png"), image(1, "b.png"), image(2), image(3), image(4)],
        anns=[ann(1), ann(2, 2, box=(-5, -5, 20, 20)), ann(3, 3, c=9), ann(4, 4, box=(0, 0, 0, 9)), ann(5, 4, c=2)],
    )
    Image.new("RGB", (200, 160)).save(f / "images/train/2.png")
    before = {p: p.read_bytes() for p in f.rglob("*") if p.is_file()}
    assert not check(f, progress=False).ok
    check(f, fix=tmp_path / "fixed", progress=False)
    s = load_data(str(tmp_path / "fixed"), strict=True)["train"]  # nothing at all is left to say
    assert s.ids.tolist() == [2, 4] and s.boxes.tolist()[0] == [0, 0, 30, 30] and s.labels.tolist() == [0, 1]
    assert {p: p.read_bytes() for p in f.rglob("*") if p.is_file()} == before


def test_yolo_and_voc_folders(tmp_path):
    y, v = tmp_path / "yolo", tmp_path / "voc"
    (v / "ImageSets/Main").mkdir(parents=True)
    (v / "Annotations").mkdir()
    for split in ("train", "val"):
        for d in (y / f"{split}/images", y / f"{split}/labels", v / "JPEGImages"):
            d.mkdir(parents=True, exist_ok=True)
        for k in range(4):
            for p in (y / f"{split}/images/{k}.jpg", v / f"JPEGImages/{split}{k}.jpg"):
                Image.new("RGB", (100, 80), (60 * k, 9, len(split))).save(p)
            (y / f"{split}/labels/{k}.txt").write_text("1 .2 .25 .2 .25\n" if k else "")
            box = (
                "<object><name>dog</name><bndbox><xmin>11</xmin><ymin>11</ymin>"
                "<xmax>30</xmax><ymax>30</ymax></bndbox></object>"
                * bool(k)
            )
            (v / f"Annotations/{split}{k}.xml").write_text(
                f"<annotation><size><width>100</width><height>80</height></size>{box}</annotation>"
            )
        (v / f"ImageSets/Main/{split}.txt").write_text("\n".join(f"{split}{k}" for k in range(4)))
    (y / "data.yaml").write_text("train: ../train/images\nval: ../val/images\nnc: 2\nnames: ['cat', 'dog']\n")
    for f, at in ((y, 1), (v, 0), (y / "data.yaml", 1)):
        splits = load_data(str(f))
        assert [len(s) for s in splits.values()] == [2, 2, 4] and splits["val"].labels.tolist() == [at] * 3
        assert np.allclose(splits["val"].boxes, [[10, 10, 30, 30]] * 3)
        assert len(list(loader(Images(splits["train"], 32, augmentation()), order(2, 2, 0, 0)))) == 1
    (y / "train/labels/1.txt").write_text("2 .2 .25 .2 .25\n")
    with pytest.raises(ValueError, match="1.txt line 1"):
        load_data(str(y))


def test_the_check_is_remembered(tmp_path, monkeypatch):
    import rtdetr_kd.data.audit

    f, seen = folder_of(tmp_path), []
    real = rtdetr_kd.data.audit.look
    monkeypatch.setattr(rtdetr_kd.data.audit, "look", lambda p: seen.append(p) or real(p))
    load_data(str(f))
    n = len(seen)
    load_data(str(f))
    assert n == 5 and len(seen) == n
    Image.new("RGB", (100, 80), "red").save(f / "images/train/1.png")
    load_data(str(f))
    assert len(seen) == n + 2  # that split is looked at again


# --- augmentation and evaluation, at random -------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@example(135, 16, [(0.0, 0.5, 0.0078125, 0.0)], 0, 96)  # .7 pixels wide: its edges are at half of a lower peak
@given(
    st.integers(16, 300),
    st.integers(16, 300),
    st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=3),
    st.integers(0, 10**6),
    st.sampled_from([96, 160]),
)
def test_painted_boxes_stay_true(w, h, fractions, seed, side):
    "Each box has a colour of its own; where that colour is, the box is"
    channels, boxes = [], []
    for x1, y1, x2, y2 in fractions:
        x1, x2 = sorted((round(x1 * w), round(x2 * w)))
        y1, y2 = sorted((round(y1 * h), round(y2 * h)))
        if x1 < x2 and y1 < y2:
            boxes.append((x1, y1, x2, y2))
            channels.append(len(boxes) - 1)
    canvas = torch.zeros(h, w, 3, dtype=torch.uint8)
    for c, (x1, y1, x2, y2) in zip(channels, boxes):
        canvas[y1:y2, x1:x2, c] = 255
    out, moved, left = augmentation(photometric=0)(
        canvas.permute(2, 0, 1), np.array(boxes, float).reshape(-1, 4), np.random.default_rng(seed), side, side
    )
    assert len(moved) == len(left) and out.shape == (3, side, side) and out.dtype == torch.uint8
    for b, k in zip(moved, left):
        assert (b >= 0).all() and (b <= side).all() and (b[2:] >= b[:2]).all()
        peak = out[k].max()  # less than 255 where the box is thinner than a pixel
        ys, xs = torch.where(out[k] > peak / 2)
        if peak > 127:
            assert np.abs(b - [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).max() <= 1.6
        else:
            assert (b[2:] - b[:2]).min() < 2  # thinner than a pixel


def test_normalised_once(tmp_path):
    f = folder_of(tmp_path, images=[image(k) for k in range(1, 6)], draw=False, anns=[ann(1)])
    for k in range(1, 6):
        Image.new("RGB", (100, 80), (128,) * 3).save(f / f"images/train/{k}.png")
    x, _ = Images(load_data(str(f))["train"], 64, augmentation(0, 0, 0.8, 0.5, mosaic=1.0))[0, 1]
    assert x.unique().tolist() == [128]


IDS, KINDS = [0, 3, 17, 42], [1, 5, 90]
boxes = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 150), st.integers(0, 150)).map(
    lambda b: [float(v) for v in b]
)
true = st.lists(
    st.tuples(
        st.sampled_from(IDS),
        st.sampled_from(KINDS),
        boxes,
        st.booleans(),
        st.sampled_from([None, 900.0, 5000.0, 10000.0]),
    ),
    max_size=25,
)
guess = st.lists(
    st.tuples(st.sampled_from(IDS), st.sampled_from(KINDS), boxes, st.sampled_from([0.1, 0.5, 0.5001, 0.9])),
    max_size=40,
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(true, guess, st.booleans(), st.sampled_from([10, 100]))
def test_ap_equals_the_reference(true, guess, copies, most):
    "To the last digit: ties, crowds, empty images, sizes, more detections than count"
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    anns = [
        dict(id=k + 1, image_id=i, category_id=c, bbox=b, iscrowd=int(w), area=b[2] * b[3] if a is None else a)
        for k, (i, c, b, w, a) in enumerate(true)
    ]
    found = [dict(image_id=i, category_id=c, bbox=b, score=s) for i, c, b, s in guess]
    if copies:
        found += [
            dict(image_id=a["image_id"], category_id=a["category_id"], bbox=a["bbox"], score=0.5) for a in anns
        ]
    gt = dict(
        info={},
        images=[dict(id=i) for i in IDS],
        categories=[dict(id=c, name=str(c)) for c in KINDS],
        annotations=anns,
    )
    ours = coco_ap(gt, found, most)
    if not found:
        assert set(ours.values()) <= {0.0, None}
        return
    with contextlib.redirect_stdout(io.StringIO()):
        g = COCO()
        g.dataset = copy.deepcopy(gt)
        g.createIndex()
        e = COCOeval(g, g.loadRes(copy.deepcopy(found)), "bbox")
        e.params.maxDets = [1, 10, most] if most > 10 else [1, 9, 10]
        e.evaluate()
        e.accumulate()
    p, r = e.eval["precision"], e.eval["recall"]
    mean = lambda x: float(x[x > -1].mean()) if (x > -1).any() else None
    theirs = dict(
        AP=mean(p[..., 0, 2]),
        AP50=mean(p[0, ..., 0, 2]),
        AP75=mean(p[5, ..., 0, 2]),
        APs=mean(p[..., 1, 2]),
        APm=mean(p[..., 2, 2]),
        APl=mean(p[..., 3, 2]),
        AR1=mean(r[..., 0, 0]),
        AR100=mean(r[..., 0, 2]),
        ARs=mean(r[..., 1, 2]),
        ARm=mean(r[..., 2, 2]),
        ARl=mean(r[..., 3, 2]),
    )
    assert {k: ours[k] for k in theirs} == theirs
