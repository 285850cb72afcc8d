"Data that used to be trained on without a word: each input with the value that is right"

import json, os, shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import CATS, ann, folder_of, image, read, scenes, shared, write
from rtdetr_kd.data.carving import carve
from rtdetr_kd.data.dataset import Images, load_data, summary
from rtdetr_kd.data.formats import read_split
from rtdetr_kd.data.images import open_image
from rtdetr_kd.data.report import check
from rtdetr_kd.data.split import ground_truth, pack_split
from rtdetr_kd.data.written import LAYOUTS, LIMITS, UNITS, Reading, as_xywh
from rtdetr_kd.model.evaluate import coco_ap, evaluate

pytestmark = pytest.mark.usefixtures("own_cache")
stops = lambda report: report.faults()[report.faults().done == "stop"].what.tolist()


# --- boxes: each way of writing, in each format ----------------------------------------------------

OWN = dict(coco=("xywh", "pixels"), yolo=("cxcywh", "fractions"), voc=("xyxy", "pixels"))
WAYS = [(l, u) for l in LAYOUTS for u in UNITS]


def written(b, way, w, h):
    "A box `xywh` in pixels as a tool of that way writes it"
    x, y, bw, bh = (v / s * UNITS[way[1]] if UNITS[way[1]] else v for v, s in zip(b, (w, h, w, h)))
    return dict(xywh=(x, y, bw, bh), xyxy=(x, y, x + bw, y + bh), cxcywh=(x + bw / 2, y + bh / 2, bw, bh))[way[0]]


def cells(split):
    "Images and their boxes `xywh` of the blood cells, with those left out that have no area"
    d = json.loads(shared("data", "bccd", "annotations", f"instances_{split}.json").read_text())
    own = {im["id"]: [] for im in d["images"]}
    for a in d["annotations"]:
        if min(a["bbox"][2:]) > 0:
            own[a["image_id"]].append(a)
    return d, own


def bccd(folder, form, way):
    "The blood cells in a format, their boxes written in that way; pictures are links"
    pictures = shared("data", "bccd", "images")
    for split in ("train", "val"):
        d, own = cells(split)
        names = [c["name"] for c in d["categories"]]
        at = {c["id"]: k for k, c in enumerate(d["categories"])}
        if form == "coco":
            anns = [
                a | dict(bbox=list(written(a["bbox"], way, im["width"], im["height"])))
                for im in d["images"] for a in own[im["id"]]
            ]
            (folder / "annotations").mkdir(parents=True, exist_ok=True)
            text = json.dumps(d | dict(annotations=anns))
            (folder / f"annotations/instances_{split}.json").write_text(text)
            if not (folder / "images").exists():
                (folder / "images").symlink_to(pictures)
            continue
        for sub in dict(yolo=(f"images/{split}", f"labels/{split}"), voc=("Annotations", "ImageSets/Main"))[form]:
            (folder / sub).mkdir(parents=True, exist_ok=True)
        if form == "yolo":
            (folder / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {names}\n")
        elif not (folder / "JPEGImages").exists():
            (folder / "JPEGImages").symlink_to(pictures)
        for im in d["images"]:
            w, h, stem = im["width"], im["height"], Path(im["file_name"]).stem
            rows = [(at[a["category_id"]], written(a["bbox"], way, w, h)) for a in own[im["id"]]]
            if form == "yolo":
                (folder / f"images/{split}/{im['file_name']}").symlink_to(pictures / im["file_name"])
                lines = [f"{c} " + " ".join(f"{v:.6f}" for v in b) for c, b in rows]
                (folder / f"labels/{split}/{stem}.txt").write_text("\n".join(lines))
            else:
                one = lambda b: [b[0] + 1, b[1] + 1, b[2], b[3]] if way == ("xyxy", "pixels") else b
                xml = "".join(
                    f"<object><name>{names[c]}</name><bndbox>"
                    + "".join(f"<{k}>{v:.6f}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), one(b)))
                    + "</bndbox></object>"
                    for c, b in rows
                )
                size = f"<size><width>{w}</width><height>{h}</height></size>"
                (folder / f"Annotations/{stem}.xml").write_text(f"<annotation>{size}{xml}</annotation>")
        if form == "voc":
            stems = "\n".join(Path(im["file_name"]).stem for im in d["images"])
            (folder / f"ImageSets/Main/{split}.txt").write_text(stems)
    return folder


@pytest.mark.parametrize("way", WAYS, ids="+".join)
@pytest.mark.parametrize("form", OWN)
def test_every_way_of_writing_is_recognised_and_read(tmp_path, form, way):
    f = bccd(tmp_path / form, form, way)
    own = way == OWN[form]
    for split in ("train", "val"):
        s = read_split(f, split, stop=False)
        found = [p.what for p in s.problems if p.done == "stop"]
        assert bool(found) != own, found
        word = "+".join(x for x, o in zip(way, OWN[form]) if x != o)
        assert own or f"give boxes='{word}'" in found[0] and len(found) == 1
        right = [a["bbox"] for im in cells(split)[1].values() for a in im]
        read_as = read_split(f, split, stop=False, how=Reading(boxes="+".join(way)))
        x, y, w, h = np.array(right).T
        order = lambda b: b[np.lexsort(np.round(b).T)]
        assert np.abs(order(read_as.boxes) - order(np.stack([x, y, x + w, y + h], 1).clip(0))).max() < 3
        assert not [p for p in read_as.problems if p.done == "stop"]


@pytest.mark.parametrize("form", OWN)
def test_the_report_names_the_setting_and_the_setting_reads_it(tmp_path, form):
    way = dict(coco=("cxcywh", "pixels"), yolo=("xywh", "fractions"), voc=("xywh", "pixels"))[form]
    f = bccd(tmp_path / form, form, way)
    report = check(f, progress=False)
    assert not report.ok and f"give boxes='{way[0]}'" in f"{report}"
    assert check(f, progress=False, boxes=way[0]).ok
    with pytest.raises(ValueError, match=f"give boxes='{way[0]}'"):
        load_data(str(f))
    assert len(load_data(str(f), boxes=way[0])["train"]) == 185
    with pytest.raises(ValueError, match="without you.*give boxes="):  # no copy of a guess
        check(f, progress=False, fix=tmp_path / "copy")


def test_no_false_stop_on_sets_as_downloaded(tmp_path):
    assert check(shared("data", "bccd"), progress=False).ok
    voc = tmp_path / "raccoon"
    shutil.copytree(shared("data", "raccoon"), voc)
    said = f"{check(voc, progress=False)}"
    assert "ImageSets/Main/train.txt" in said  # it comes without splits: what to do is said
    stems = sorted(p.stem for p in (voc / "annotations").glob("*.xml"))
    (voc / "ImageSets/Main").mkdir(parents=True)
    (voc / "ImageSets/Main/train.txt").write_text("\n".join(stems[20:]))
    (voc / "ImageSets/Main/val.txt").write_text("\n".join(stems[:20]))
    report = check(voc, progress=False)
    assert report.ok, f"{report}"


def test_small_objects_as_centres(tmp_path):
    "A tenth of a percent of the image: few leave it, and still too many"
    rng, size = np.random.default_rng(0), np.array([20, 20])
    lo = rng.uniform(0, [620, 460], (929, 2))
    for boxes, says in ((np.c_[lo, lo * 0 + size], False), (np.c_[lo + size / 2, lo * 0 + size], True)):
        anns = [ann(k, box=b) for k, b in enumerate(boxes.tolist())]
        s = pytest.raises(ValueError, read, tmp_path, images=[image(1, w=640, h=480)], anns=anns) if says else read(
            tmp_path, images=[image(1, w=640, h=480)], anns=anns
        )
        assert not says or "give boxes='cxcywh'" in str(s.value)


def test_two_units_in_one_file(tmp_path):
    anns = [ann(k, box=(k, 10, 20, 20)) for k in range(20)]
    anns += [ann(k, box=(0.1, 0.2, 0.3, 0.01 * k)) for k in range(30, 40)]
    with pytest.raises(ValueError, match="box in fractions among boxes in pixels: 33% of 30.*give limits='mixed="):
        read(tmp_path, anns=anns)


def test_a_box_without_end_is_no_image(tmp_path):
    s = read(tmp_path, anns=[ann(1), ann(2, 2), ann(3, box=(-1e9, -1e9, 2e9, 2e9))])
    assert len(s.boxes) == 2 and s.notes == {"box outside its image: dropped": 1}


# --- drops -----------------------------------------------------------------------------------------

SOUND = [ann(k, box=(k % 8 * 10, k // 8 * 10, 8, 8)) for k in range(20)]
LOSSES = dict(
    numbers=[ann(100 + k) | dict(bbox=None) for k in range(20)],
    flat=[ann(100 + k, box=(k, 5, 0, 9)) for k in range(20)],
    outside=[ann(100 + k, box=(300 + k, 5, 9, 9)) for k in range(20)],
    clipped=[ann(100 + k, 2, box=(60, 2 * k, 64, 10)) for k in range(20)] + SOUND[:10],
    unlisted=[ann(100 + k, 99) for k in range(20)],
)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_has_a_limit(tmp_path, kind):
    anns = SOUND + [a | dict(id=1000 + k) for k, a in enumerate(LOSSES[kind])]
    f = folder_of(tmp_path, anns=anns)
    if kind == "clipped":  # of one side only, so no other way of writing explains them
        anns += [ann(2000 + k, 2, box=(0, 3 * k, 9, 9)) for k in range(20)]
        f = folder_of(tmp_path, anns=anns)
    report = check(f, progress=False)
    assert not report.ok and any(f"more than the limit {kind}={LIMITS[kind]:g}" in w for w in stops(report))
    assert f"{kind}={LIMITS[kind]:g}" in report.faults().limit.tolist()
    with pytest.raises(ValueError, match=f"give limits='{kind}=0"):
        load_data(str(f))
    assert check(f, progress=False, limits=f"{kind}=.6").ok
    load_data(str(f), limits=f"{kind}=.6")


def test_few_losses_are_an_accident_and_none_may_be_asked(tmp_path):
    f = folder_of(tmp_path, anns=SOUND + [ann(99, box=(1, 1, 0, 9))])
    report = check(f, progress=False)
    assert report.ok and "flat=0.02" in report.faults().limit.tolist()
    assert not check(f, progress=False, limits="flat=0").ok
    with pytest.raises(ValueError, match="no limit 'flt'; did you mean 'flat'"):
        check(f, limits="flt=1")


# --- the same object twice -------------------------------------------------------------------------


def test_one_object_under_two_ids_is_one(tmp_path):
    anns = [ann(k, box=(10 * k, 10, 9, 9), area=81) for k in range(1, 6)]
    s = read(tmp_path, anns=anns + [a | dict(id=a["id"] + 50) for a in anns])
    assert len(s.boxes) == 5 and s.notes == {"object listed twice: counted once: repaired": 5}
    perfect = [dict(image_id=1, category_id=1, bbox=a["bbox"], score=0.9) for a in anns]
    assert coco_ap(ground_truth(s), perfect)["AP"] == pytest.approx(1)
    near = read(tmp_path, anns=[ann(1, box=(10, 10, 40, 40)), ann(2, box=(10, 10, 40.5, 40)), ann(3, c=2)])
    assert len(near.boxes) == 3
    assert near.notes == {"object that lies on another of its class (IoU at least 0.95): one object twice?: look": 1}


def yolo(folder, n=6, label="0 .5 .5 .2 .2\n", splits=("train", "val"), text="names: [cat, dog]\n"):
    for split in splits:
        for d in ("images", "labels"):
            (folder / d / split).mkdir(parents=True, exist_ok=True)
        for k in range(n):
            Image.new("RGB", (100, 80), (9 * k, 9, len(split))).save(folder / f"images/{split}/{k}.png")
            (folder / f"labels/{split}/{k}.txt").write_text(label)
    (folder / "data.yaml").write_text("".join(f"{s}: images/{s}\n" for s in splits) + text)
    return folder


def test_one_yolo_line_twice_is_one(tmp_path):
    s = read_split(yolo(tmp_path / "y", label="0 .5 .5 .2 .2\n0 .5 .5 .2 .2\n1 .5 .5 .2 .2\n"), "train")
    assert len(s.boxes) == 12 and s.notes["object listed twice: counted once: repaired"] == 6


# --- label files -----------------------------------------------------------------------------------


def test_label_files_that_are_missing(tmp_path):
    f = yolo(tmp_path / "y", 20)
    (f / "labels/train/3.txt").unlink()
    report = check(f, progress=False)
    says = "image without a label file: taken for one without objects"
    assert report.ok and report.splits["train"].notes[f"{says}: look"] == 1
    for k in range(10):
        (f / f"labels/train/{k}.txt").unlink(missing_ok=True)
    said = "image without a label file.*50% of 20 are more than the limit unlabelled=0.1"
    with pytest.raises(ValueError, match=said):
        load_data(str(f))
    assert len(load_data(str(f), limits="unlabelled=.5")["val"]) == 20
    (f / "data.yaml").write_text((f / "data.yaml").read_text() + "skip_if_label_file_missing: true\n")
    s = read_split(f, "train")
    note = "image without a label file: left out, as skip_if_label_file_missing says: dropped"
    assert len(s) == 10 and s.notes[note] == 10


def test_label_files_without_an_image_and_for_two(tmp_path):
    f = yolo(tmp_path / "y", 20)
    (f / "labels/train/lost.txt").write_text("0 .5 .5 .2 .2\n")
    (f / "labels/train/classes.txt").write_text("cat\ndog\n")
    s = read_split(f, "train")
    p = next(p for p in s.problems if p.what == "label file without an image")
    assert (p.n, p.where) == (1, ["lost.txt"])
    shutil.copy(f / "images/train/1.png", f / "images/train/0.jpg")
    with pytest.raises(ValueError, match="images that share one label file"):
        read_split(f, "train")
    assert len(read_split(f, "train", how=Reading(limits="shared=1"))) == 21


# --- paths of other machines -----------------------------------------------------------------------


def test_lists_of_another_machine(tmp_path):
    f = yolo(tmp_path / "ds", 6)
    prefix = lambda k: "/content/ds/" if k % 2 else "./"
    (f / "train.txt").write_text("\n".join(f"{prefix(k)}images/train/{k}.png" for k in range(6)))
    (f / "data.yaml").write_text("train: train.txt\nval: images/val\nnames: [cat, dog]\n")
    s = load_data(str(f))["val"]
    train = read_split(f, "train")
    assert len(train.boxes) == 6 and train.notes["file name found under another path or case: taken: repaired"] == 3
    assert np.allclose(train.boxes, s.boxes)
    check(f, progress=False, fix=tmp_path / "copy")
    assert len(check(tmp_path / "copy", progress=False).splits["train"].boxes) == 6


def test_a_size_that_cannot_be_is_an_error_and_no_ratio(tmp_path):
    f = yolo(tmp_path / "ds", 6)
    (f / "train.txt").write_text("\n".join(f"/content/{k}.png" for k in range(6)))  # several fit none
    (f / "data.yaml").write_text("train: train.txt\nval: images/val\nnames: [cat, dog]\n")
    said = f"{check(f, progress=False)}"
    assert " inf " not in said and "cannot be read" in said and "this has to be repaired" in said
    names = [dict(id=k, file_name=f"C:\\x\\{k}.png") for k in (1, 2)]  # sizes are read from the files that are meant
    g = folder_of(tmp_path)
    p = g / "annotations/instances_train.json"
    p.write_text(json.dumps(json.loads(p.read_text()) | dict(images=names)))
    assert load_data(str(g))["select"].sizes.tolist() == [[80, 100]]
    assert read_split(g, "train").sizes.tolist() == [[80, 100]] * 2


# --- a yaml by name --------------------------------------------------------------------------------


def test_the_yaml_that_was_named_is_read(tmp_path):
    f = yolo(tmp_path / "set", 8, splits=("train", "val", "fold"))
    (f / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")
    (f / "fold2.yaml").write_text("train: images/fold\nval: images/val\nnames: [cow, yak]\n")
    report = check(f / "fold2.yaml", progress=False)
    assert report.splits["train"].names == ["cow", "yak"] and "fold" in report.splits["train"].files[0]
    assert load_data(str(f / "fold2.yaml"))["train"].names == ["cow", "yak"]
    assert load_data(str(f))["train"].names == ["cat", "dog"]
    with pytest.raises(ValueError, match="does not describe a data set"):
        (f / "other.yaml").write_text("a: 1\n")
        load_data(str(f / "other.yaml"))
    assert "no such file" in f"{check(f / 'fold3.yaml', progress=False)}"
    (f / "data.yaml").rename(f / "fold1.yaml")
    with pytest.raises(ValueError, match="several descriptions"):
        load_data(str(f))
    from rtdetr_kd.train.config import configure

    c = configure(data=str(f / "fold2.yaml"))
    assert c.data.endswith("fold2.yaml") and c.name == "set-fold2-none"
    with pytest.raises(ValueError, match="no such folder"):
        configure(data=str(f / "fold3.yaml"))


# --- turned photographs ----------------------------------------------------------------------------


def turned(f, note, name, size=(100, 80), box=(60, 50, 30, 20)):
    "A dark photograph with a bright object, as stored, and an EXIF note"
    im = Image.new("L", size, 0)
    im.paste(255, (box[0], box[1], box[0] + box[2], box[1] + box[3]))
    exif = Image.Exif()
    exif[0x0112] = note
    im.save(f / name, quality=100, exif=exif)


def brightness(s):
    "The mean inside each image's box, as training sees it"
    images = Images(s, 64)
    out = []
    for k in range(len(s)):
        x1, y1, x2, y2 = s.boxes[s.start[k]].astype(int)
        out.append(float(images.read(k)[:, y1 + 2:y2 - 2, x1 + 2:x2 - 2].float().mean()))
    return out


def test_photographs_that_tell_decide_for_those_that_do_not(tmp_path):
    sizes = {n: (100, 80) for n in range(1, 9)} | {9: (90, 90)}
    images = [image(n, f"{n}.jpg", *sizes[n]) for n in sizes]
    f = folder_of(tmp_path, images=images, anns=[ann(n, n, box=(60, 50, 30, 20)) for n in sizes])
    for n in sizes:
        turned(f / "images/train", min(n, 8) if n < 9 else 3, f"{n}.jpg", sizes[n])
    s = load_data(str(f))["train"]
    assert s.exif == "ignore" and min(brightness(s)) > 250  # 1 to 8 and a square one, labelled as stored
    assert sum(n for k, n in s.notes.items() if k.startswith("photograph labelled as stored")) == 8


def test_photographs_of_which_none_tells_are_a_doubt(tmp_path):
    f = folder_of(tmp_path, images=[image(n, f"{n}.jpg") for n in (1, 2, 3)], anns=[ann(n, n) for n in (1, 2, 3)])
    for n, note in ((1, 1), (2, 3), (3, 2)):
        turned(f / "images/train", note, f"{n}.jpg")
    s = load_data(str(f))["train"]
    assert [n for k, n in s.notes.items() if "no size tells" in k] == [2]
    assert not [k for k in load_data(str(f), exif="ignore")["train"].notes if "no size tells" in k]


def test_yolo_takes_photographs_as_stored_if_told_so(tmp_path):
    f = yolo(tmp_path / "y", 3, label="0 .75 .75 .3 .25\n")
    for k in range(3):
        (f / f"images/train/{k}.png").unlink()
        turned(f / "images/train", 6, f"{k}.jpg")
    s = load_data(str(f), exif="ignore")["train"]
    assert s.sizes.tolist()[0] == [80, 100] and min(brightness(s)) > 250
    assert any("no size tells" in k for k in load_data(str(f))["train"].notes)


# --- 16 bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("times, bits", [(16, 12), (1, 8), (257, 16)])
def test_greys_of_fewer_bits_than_their_file(tmp_path, times, bits):
    f = folder_of(tmp_path, images=[image(1), image(2)], anns=[ann(1), ann(2, 2)])
    scene = np.tile(np.linspace(0, 255, 100), (80, 1)).astype(np.uint16)
    for k in (1, 2):
        Image.fromarray(scene // k * times).save(f / f"images/train/{k}.png")  # one of them half as bright
    s = load_data(str(f))["train"]
    s = next(x for x in load_data(str(f)).values() if "1.png" in x.files and x.folder == s.folder)
    assert s.grey_bits == bits
    peaks = [int(open_image(f / f"images/train/{k}.png", grey_bits=s.grey_bits).max()) for k in (1, 2)]
    assert peaks[0] > 150 and abs(peaks[0] - 2 * peaks[1]) < 4  # all by one factor
    assert any(f"{bits} bits are used" in k for k in s.notes) or s.name == "select"
    seen = Images(s, 64).read(s.files.index("1.png"))
    assert int(seen.max()) == peaks[0]


def twelve_bits(f, split="train"):
    "Pictures of that split as a 12-bit camera writes them: the same scene, once half as bright"
    scene = np.tile(np.linspace(0, 255, 100), (80, 1)).astype(np.uint16)
    for k in (1, 2):
        Image.fromarray(scene // k * 16).save(f / f"images/{split}/{k}.png")
    return f


def pixels_at_inference(detector, source, **how):
    "What a detector is shown of a picture"
    return detector.detect(source, threshold=0, **how).image


@pytest.fixture(scope="module")
def twelve_bit_student(tmp_path_factory):
    "A student of such a set, as a run builds it: its weights and its ONNX file"
    from rtdetr_kd.deploy.export import write_onnx
    from rtdetr_kd.model.weights import load_model, save_model
    from rtdetr_kd.props import short_run
    from rtdetr_kd.train.step import build_student

    to = tmp_path_factory.mktemp("twelve")
    f = twelve_bits(folder_of(to, images=[image(1), image(2)], anns=[ann(1), ann(2, 2)]))
    train = load_data(str(f))["train"]
    m = build_student(short_run(data=str(f), size="toy", image_size=64), train, torch.device("cpu"), False)
    save_model(m, to / "w.safetensors")
    write_onnx(load_model(to / "w.safetensors"), to / "w.onnx")
    return train, to


@pytest.mark.parametrize("file", ["w.safetensors", "w.onnx"])
def test_the_depth_travels_with_the_weights(twelve_bit_student, file):
    "A picture is read in use as it was in training, whatever its own highest value; from a path, PIL and bytes"
    from rtdetr_kd.deploy.judge import open_any

    train, to = twelve_bit_student
    detector = open_any(to / file)
    assert train.grey_bits == detector.grey_bits == 12
    for k in (0, 1):
        path = train.folder / train.files[k]
        seen = Images(train, 64).read(k).permute(1, 2, 0).numpy()
        assert seen.max() == (254, 127)[k]
        for source in (path, Image.open(path), path.read_bytes()):
            assert (pixels_at_inference(detector, source) == seen).all()
    assert pixels_at_inference(detector, path, grey_bits=16).max() == 8  # who says it is heard
    Image.fromarray(np.full((80, 100), 5000, np.uint16)).save(to / "other.png")
    with pytest.raises(ValueError, match="beyond the 12 bits that are expected: grey_bits=14 reads it"):
        detector.detect(to / "other.png")


def test_the_server_reads_the_depth_of_its_weights(twelve_bit_student):
    from rtdetr_kd.deploy.open import open_model
    from rtdetr_kd.serve.batching import Budget, Limits, prepare_image

    train, to = twelve_bit_student
    r = open_model(to / "w.onnx")
    data = (train.folder / "2.png").read_bytes()
    assert prepare_image(None, data, Limits(), 64, Budget(10**9), r.grey_bits)[0].max() in range(124, 128)


def test_a_depth_that_nobody_knows_is_said_and_never_black(tmp_path):
    "Weights that have never seen such a file: the picture's own highest value, and a warning"
    from rtdetr_kd.props import tiny

    for most, seen in ((200, 200), (900, 224), (4080, 254), (5000, 78)):
        Image.fromarray(np.linspace(0, most, 8000).reshape(80, 100).astype(np.uint16)).save(tmp_path / "x.png")
        with pytest.warns(UserWarning, match=f"its highest value is {most}"):
            assert pixels_at_inference(tiny(), tmp_path / "x.png").max() == seen
    Image.fromarray(np.full((80, 100), 70000, np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="greys up to 70000 have no known range"):
        tiny().detect(tmp_path / "x.tif")


def test_a_set_is_judged_with_the_depth_of_the_weights(twelve_bit_student, tmp_path, monkeypatch):
    "A dark test set alone would be taken for one of ten bits"
    import rtdetr_kd.deploy.judge as judge

    _, to = twelve_bit_student
    f = folder_of(tmp_path, images=[image(1), image(2)], anns=[ann(1), ann(2, 2)])
    for k in (1, 2):
        Image.fromarray(np.full((80, 100), 900 + k, np.uint16)).save(f / f"images/train/{k}.png")
    split, seen = load_data(str(f))["train"], []
    monkeypatch.setattr(judge, "predict", lambda m, s, *a, **k: seen.append(s.grey_bits) or [])
    judge.found_by(judge.open_any(to / "w.safetensors"), split)
    assert (split.grey_bits, seen) == (10, [12])


def test_pictures_are_drawn_as_they_were_labelled(tmp_path):
    "Reports and galleries show the pixels that the boxes lie on, turned or not, and no black ones"
    from rtdetr_kd.data.audit import pixels_in

    two = [ann(1, box=(60, 50, 30, 20)), ann(2, 2)]
    f = folder_of(tmp_path, images=[image(1, "1.jpg"), image(2, "2.png")], anns=two)
    turned(f / "images/train", 6, "1.jpg")
    twelve_bits(f)
    s = load_data(str(f))["train"]
    assert pixels_in(s, 0)[52:68, 62:88].min() > 250  # stored 100 wide, as labelled
    assert pixels_in(s, 1).max() > 120
    check(f, progress=False).show()


# --- COCO's objects --------------------------------------------------------------------------------


def bare(i, **more):
    return {k: v for k, v in ann(i).items() if k != "bbox"} | more


def test_an_outline_without_a_box_is_an_object(tmp_path):
    outline = [[10, 10, 30, 10, 30, 30, 10, 30]]
    for a in (bare(1, segmentation=outline), ann(1, box=(0, 0, 0, 0), segmentation=outline),
              ann(1) | dict(bbox=None, segmentation=outline)):
        s = read(tmp_path, anns=[a])
        assert s.boxes.tolist() == [[10, 10, 30, 30]]
        assert s.notes == {"annotation without a box: that around its outline taken: repaired": 1}
    mask = dict(size=[80, 100], counts=[10 * 80 + 10, 20, *[60, 20] * 19])
    assert read(tmp_path, anns=[bare(1, segmentation=mask)]).boxes.tolist() == [[10, 10, 30, 30]]


def test_a_turned_box_becomes_the_one_around_it(tmp_path):
    s = read(tmp_path, anns=[ann(1, box=(20, 35, 60, 10), area=600, attributes=dict(rotation=90.0))])
    assert np.allclose(s.boxes, [[45, 10, 55, 70]]) and s.notes == {
        "turned box: the upright one around it taken: repaired": 1
    }
    assert not read(tmp_path, anns=[ann(1, attributes=dict(rotation=0, occluded=False))]).problems


def test_an_area_that_cannot_be_is_that_of_the_box(tmp_path):
    box = (10, 10, 50, 50)
    for area in (0, 0.01, 10**6):
        s = read(tmp_path, anns=[ann(1, box=box, area=area)])
        assert s.area.tolist() == [2500]
        assert s.notes == {"area that the box contradicts: width × height taken: repaired": 1}
        perfect = [dict(image_id=1, category_id=1, bbox=list(box), score=0.9)]
        assert coco_ap(ground_truth(s), perfect)["APm"] == pytest.approx(1)
    drawn = ann(1, box=box, area=0, segmentation=[[10, 10, 60, 10, 10, 60]])
    assert read(tmp_path, anns=[drawn]).area.tolist() == [1250]
    assert read(tmp_path, anns=[ann(1, box=box, area=900)]).area.tolist() == [900]  # an outline's, no longer there


@pytest.mark.parametrize("points, seen", [(17, True), (2, True), (5, False)])
def test_key_points_are_no_outlines(tmp_path, points, seen):
    f, rng = yolo(tmp_path / "y", 64), np.random.default_rng(0)
    right = []
    for k in range(64):
        size = rng.uniform(0.1, 0.4, 2)
        c = rng.uniform(size / 2, 1 - size / 2)
        p = c + size * rng.uniform(-0.5, 0.5, (points, 2))
        rest = np.column_stack([p, rng.integers(0, 3, points)]) if seen else p
        right.append([*(c - size / 2), *(c + size / 2)])
        line = " ".join(f"{v:.6g}" for v in [*c, *size, *rest.ravel()])
        (f / f"labels/train/{k}.txt").write_text(f"0 {line}\n")
    with pytest.raises(ValueError, match="look like boxes with key points, and data.yaml has no kpt_shape"):
        read_split(f, "train")
    order = sorted(range(64), key=str)
    for how, text in ((Reading(boxes="cxcywh"), ""), (Reading(), f"kpt_shape: [{points}, {2 + seen}]\n")):
        (f / "data.yaml").write_text((f / "data.yaml").read_text() + text)
        s = read_split(f, "train", how=how)
        assert np.allclose(s.boxes, np.array(right)[order] * [100, 80, 100, 80], atol=0.01)


# --- ids -------------------------------------------------------------------------------------------

ODD_IDS = ["/m/01yrx", 2.5, 2**70, -3]


def test_any_id_comes_back_as_it_was():
    from rtdetr_kd.model.detector import RTDETR, Spec
    from rtdetr_kd.model.sizes import SIZES
    from rtdetr_kd.serve.batching import as_coco

    torch.manual_seed(0)
    model = RTDETR(Spec(list("abcd"), category_ids=ODD_IDS, **SIZES["toy"])).eval()
    found = model.detect(np.zeros((80, 100, 3), np.uint8), threshold=0.0)
    ids = [d["category_id"] for d in found.to_coco("img_a")]
    assert set(map(str, ids)) == set(map(str, ODD_IDS)) and all(i in ODD_IDS for i in ids)
    assert [type(ODD_IDS[c]) for c in found.labels] == [type(i) for i in ids]
    json.dumps(found.to_coco(2**70))

    class Runner:
        category_ids = ODD_IDS

    assert [e["category_id"] for e in as_coco([(0.5, c, [0, 0, 1, 1]) for c in range(4)], None, Runner)] == ODD_IDS
    plain = RTDETR(Spec(list("ab"), category_ids=[3, 90], **SIZES["toy"])).eval()
    found = plain.detect(np.zeros((80, 100, 3), np.uint8), threshold=0.0)
    assert {type(d["category_id"]) for d in found.to_coco()} == {int}


def test_odd_ids_through_files(tmp_path):
    from rtdetr_kd.model.detector import RTDETR, Spec
    from rtdetr_kd.model.sizes import SIZES
    from rtdetr_kd.model.weights import load_model, save_model

    model = RTDETR(Spec(list("abcd"), category_ids=ODD_IDS, **SIZES["toy"]))
    save_model(model, tmp_path / "w.safetensors")
    back = load_model(tmp_path / "w.safetensors").spec.category_ids
    assert back == ODD_IDS and [type(i) for i in back] == [type(i) for i in ODD_IDS]


@pytest.mark.parametrize("ids", [[2**63, -1], [2**63, 1], [2**70, 5], [10**30, "a"]])
def test_long_image_ids_stay_whole(tmp_path, ids):
    s = read(tmp_path, images=[image(i, f"{k}.png") for k, i in enumerate(ids)],
             anns=[ann(k, i) for k, i in enumerate(ids)])
    assert s.ids.tolist() == ids and s.start.tolist() == [0, 1, 2]
    assert [a["image_id"] for a in ground_truth(s)["annotations"]] == ids
    found = [dict(image_id=i, category_id=1, bbox=[10, 10, 20, 20], score=0.9) for i in ids]
    assert coco_ap(ground_truth(s), found)["AP"] == pytest.approx(1)


# --- select ----------------------------------------------------------------------------------------


def few_positives(tmp_path, n=200, positive=5):
    anns = [ann(k, k, box=(10, 10, 20, 20)) for k in range(1, positive + 1)]
    f = folder_of(tmp_path, images=[image(k) for k in range(1, n + 1)], anns=anns, draw=False)
    for k in range(1, n + 1):
        Image.new("RGB", (100, 80), (k, 255 - k, k % 7)).save(f / f"images/train/{k}.png")
    (f / "annotations/instances_select.json").unlink()
    return f


def test_positives_are_on_both_sides(tmp_path):
    f = few_positives(tmp_path)
    report = check(f, progress=False)
    assert report.ok and "select, of train" in report.counts().index and len(report.carved) == 20
    assert any("set aside to select by, of 200" in w for w in report.faults().what)
    splits = load_data(str(f))
    assert 0 < len(splits["select"].boxes) < 5 and len(splits["select"]) == 20
    assert report.carved.ids.tolist() == splits["select"].ids.tolist()
    assert "set aside to select by" in summary(splits)
    lone = few_positives(tmp_path / "lone", 40, 1)
    assert not check(lone, progress=False).ok  # the check refuses what training would
    with pytest.raises(ValueError, match="select"):
        load_data(str(lone))


def test_equal_images_stay_on_one_side(tmp_path):
    f = few_positives(tmp_path, 40, 40)
    for k in range(21, 41):
        shutil.copy(f / f"images/train/{k - 20}.png", f / f"images/train/{k}.png")
    splits = load_data(str(f))
    assert not set(splits["train"].digests) & set(splits["select"].digests)
    assert len(splits["train"]) + len(splits["select"]) == 40


def test_a_blind_draw_that_was_sound_stays():
    images = [dict(id=k, file_name=f"{k}.png", width=9, height=9) for k in range(205)]
    rows = [(k, 1, 1, 5, 5, k % 3, 0, 16) for k in range(205)]
    s = pack_split("train", ".", images, rows, [(1, "a"), (2, "b"), (3, "c")])
    train, select = carve(s)
    assert select.ids.tolist() == sorted(np.random.default_rng(0).permutation(205)[:20].tolist())


def test_val_that_is_train_is_refused(tmp_path):
    f = yolo(tmp_path / "y", 12)
    (f / "data.yaml").write_text("train: images/train\nval: images/train\nnames: [cat, dog]\n")
    with pytest.raises(ValueError, match="also in train.*100% of 12 are more than the limit overlap=0.2"):
        load_data(str(f))
    assert len(load_data(str(f), limits="overlap=1")["val"]) == 12


# --- out of the folder -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../../x.png", "{tmp}/x.png", "a/../../../../x.png"])
def test_nothing_outside_is_opened(tmp_path, name, monkeypatch):
    import rtdetr_kd.data.audit, rtdetr_kd.data.coco

    Image.new("RGB", (100, 80)).save(tmp_path / "x.png")
    f = folder_of(tmp_path, images=[image(1), image(2)], anns=[ann(1)])
    (f / "images/train/a").mkdir()
    p = f / "annotations/instances_train.json"
    d = json.loads(p.read_text())
    d["images"][1] = dict(id=2, file_name=name.format(tmp=tmp_path))  # also no size, which would be read
    p.write_text(json.dumps(d))
    opened = []
    for module, what in ((rtdetr_kd.data.audit, "look"), (rtdetr_kd.data.coco, "open_header")):
        real = getattr(module, what)
        monkeypatch.setattr(module, what, lambda q, *a, real=real: opened.append(os.path.normpath(q)) or real(q, *a))
    report = check(f, progress=False)
    assert not report.ok and str(tmp_path / "x.png") not in opened
    d["images"][1] |= dict(width=100, height=80)
    p.write_text(json.dumps(d))
    with pytest.raises(ValueError, match="outside the data folder.*give outside=True"):
        load_data(str(f))
    assert str(tmp_path / "x.png") not in opened
    assert len(load_data(str(f), outside=True)["train"]) == 2


def test_a_list_of_images_outside(tmp_path):
    f = yolo(tmp_path / "y", 6)
    shutil.move(f / "images/train", tmp_path / "elsewhere")
    (f / "data.yaml").write_text(f"train: {tmp_path}/elsewhere\nval: images/val\nnames: [cat, dog]\n")
    with pytest.raises(ValueError, match="lies outside.*give outside=True"):
        load_data(str(f))
    assert len(read_split(f, "train", how=Reading(outside=True, limits="unlabelled=1"))) == 6
    (f / "images/train").symlink_to(tmp_path / "elsewhere")  # a link is the user's own
    (f / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")
    assert len(read_split(f, "train").boxes) == 6


# --- caches ----------------------------------------------------------------------------------------


def test_the_kept_answers_are_those_of_the_content(tmp_path):
    from rtdetr_kd.distill.cache import same_pixels

    f = scenes(tmp_path / "d", train=6, select=2, val=2)
    for p in (f / "images/train").glob("*.jpg"):
        Image.open(p).save(p.with_suffix(".bmp"))
    p = f / "annotations/instances_train.json"
    p.write_text(p.read_text().replace(".jpg", ".bmp"))
    key = lambda **k: same_pixels(Images(load_data(str(f), **k)["train"], 64))
    before = key()
    assert key() == before
    bmp = next((f / "images/train").glob("*.bmp"))
    stat, data = bmp.stat(), bytearray(bmp.read_bytes())
    data[-9:] = bytes(b ^ 255 for b in data[-9:])
    bmp.write_bytes(bytes(data))  # edited in place: same name, same size, and its time put back
    os.utime(bmp, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert key() != before
    s = load_data(str(f))["train"]
    assert same_pixels(Images(replace(s, exif="ignore"), 64)) != same_pixels(Images(s, 64))
    assert same_pixels(Images(replace(s, grey_bits=12), 64)) != same_pixels(Images(s, 64))


def test_the_gate_measures_other_pictures_anew(tmp_path):
    from conftest import ROOT
    from rtdetr_kd.distill.teacher import Teacher, check_teacher
    from rtdetr_kd.model.weights import load_model

    f = scenes(tmp_path / "d", train=6, select=8, val=2)
    teacher = Teacher(load_model(ROOT / "weights/toy_teacher.safetensors"))
    first = check_teacher(teacher, load_data(str(f))["select"])
    assert check_teacher(teacher, load_data(str(f))["select"]) == first
    for p in (f / "images/select").glob("*.jpg"):
        Image.new("RGB", (64, 64), (128,) * 3).save(p)
    split = load_data(str(f))["select"]
    assert check_teacher(teacher, split) == evaluate(teacher.model, split)[0]["AP"] < first


def test_the_settings_are_checked_before_a_run(tmp_path):
    from rtdetr_kd.train.config import configure

    for bad in (dict(boxes="xyxx"), dict(limits="flt=.1"), dict(limits="flat=20"), dict(outside="perhaps")):
        with pytest.raises(ValueError, match=next(iter(bad))):
            configure(**bad)
    assert configure(boxes="xyxy", limits="flat=.1").boxes == "xyxy"


def corners(to):
    "The embedded scenes, small, with boxes written as corners"
    f = scenes(to, train=12, select=4, val=4)
    for p in (f / "annotations").glob("*.json"):
        d = json.loads(p.read_text())
        for a in d["annotations"]:
            x, y, w, h = a["bbox"]
            a["bbox"] = [x, y, x + w, y + h]
        p.write_text(json.dumps(d))
    return f


def test_what_reads_the_data_of_a_run_reads_all_of_its_data(tmp_path, capsys):
    "evaluate, export and bench, a table of files, and the notebooks beside train, on boxes written as corners"
    from conftest import ROOT
    from rtdetr_kd.command import main, split_of
    from rtdetr_kd.deploy.latency import evaluate_file
    from rtdetr_kd.model.weights import load_model

    f, student = corners(tmp_path / "d"), ROOT / "weights/toy_student.safetensors"
    with pytest.raises(SystemExit, match="give boxes='xyxy'"):
        main(["evaluate", str(student), str(f)])
    main(["evaluate", str(student), str(f), "--boxes", "xyxy"])
    val = split_of(str(f), "val", boxes="xyxy")
    ap = evaluate(load_model(student), val)[0]["AP"]
    assert f"{ap:.3f}"[1:] in capsys.readouterr().out
    assert evaluate_file(student, str(f), how=dict(boxes="xyxy"))["AP"] == pytest.approx(ap, abs=2e-3)
    for name, given, read in (("attention", dict(data=str(f), boxes="xyxy", row=1), "val = load_data("),
                              ("export_model", dict(data=str(f), boxes="xyxy"), "splits = load_data(")):
        cells = json.loads((ROOT / f"nbs/{name}.ipynb").read_text())["cells"]
        names = dict(__name__="notebook")
        for c in cells:
            source = "".join(c["source"])
            if c["cell_type"] == "code":
                exec(source, names)
            names |= given if "parameters" in c["metadata"].get("tags", ()) else {}
            if read in source:
                break
        got = names.get("val") or names["splits"]["val"]
        assert np.allclose(got.boxes, val.boxes), name


def test_as_xywh_has_one_meaning():
    b = np.array([[10.0, 20, 30, 40]])
    w, h = np.array([200.0]), np.array([100.0])
    assert as_xywh(b, ("xyxy", "pixels"), w, h).tolist() == [[10, 20, 20, 20]]
    assert as_xywh(b, ("cxcywh", "percent"), w, h).tolist() == [[-10, 0, 60, 40]]
    assert CATS
