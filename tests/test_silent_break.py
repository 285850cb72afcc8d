"What a hostile user does to data, caches and weights: each ends with a sentence, and nothing half done looks whole"

import errno, json, math, os, shutil, time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from conftest import CATS, ROOT, ann, folder_of, image, scenes
from rtdetr_kd.data.dataset import load_data
from rtdetr_kd.data.report import check

pytestmark = pytest.mark.usefixtures("own_cache")
STUDENT = ROOT / "weights/toy_student.safetensors"


def whole():
    "A sound file of eight images"
    images, anns = [image(k) for k in range(1, 9)], [ann(k, k) for k in range(1, 9)]
    return dict(images=images, annotations=anns, categories=CATS)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    d = whole()
    return folder_of(tmp_path_factory.mktemp("sound"), images=d["images"], anns=d["annotations"])


def told(f, text):
    "What the check says, and how many boxes a training would read; None where it would not begin"
    (f / "annotations/instances_train.json").write_bytes(text if isinstance(text, bytes) else json.dumps(text).encode())
    report = check(f, progress=False)
    f"{report}".encode()
    try: n = len(load_data(str(f))["train"].boxes)
    except (ValueError, FileNotFoundError): n = None
    assert report.ok == (n is not None)
    return " | ".join(f"{p.what}: {p.done}" for p in report.faults().itertuples()), n


def first(**changes):
    "That file with its first annotation changed"
    d = whole()
    d["annotations"][0] |= changes
    return d


ODD = {
    "brackets": (b'{"images":' + b"[" * 10**5, "not readable JSON", None),
    "brackets inside": (
        b'{"images":[],"annotations":[],"categories":' + b"[" * 5000 + b"]" * 5000 + b"}", "JSON", None),
    "mask of a million megapixels": (
        first(bbox=None, segmentation=dict(size=[10**6, 10**6], counts=[0, 10**12])), "box outside its image", 7),
    "mask of runs below 0": (
        first(bbox=None, segmentation=dict(size=[80, 100], counts=[-5, 10, 3])), "no four numbers", 7),
    "mask of endless runs": (
        first(bbox=None, segmentation=dict(size=[80, 100], counts=[1, 10**400])), "no four numbers", 7),
    "turn in words": (first(attributes=dict(rotation="ninety")), "turn of a box that is no number", None),
    "turn without end": (first(attributes=dict(rotation=math.inf)), "turn of a box that is no number", None),
    "a group in words": (first(iscrowd="yes"), "annotation without iscrowd: one object: repaired", 8),
    "a group": (first(iscrowd=True), "", 8),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_annotations(sound, name):
    text, says, boxes = ODD[name]
    said, n = told(sound, text)
    assert says in said and n == boxes, said


def test_a_group_that_is_true_is_a_group(sound):
    told(sound, first(iscrowd=True))
    assert load_data(str(sound))["train"].crowd.sum() == 1


@pytest.mark.parametrize("width", [1e308, 10**400, math.inf, -100, "wide"])
def test_sides_that_no_picture_has(sound, width):
    d = whole()
    d["images"][0]["width"] = width
    said, n = told(sound, d)
    assert "image without width and height: taken from the file: repaired" in said and n == 8


def test_a_voc_picture_of_any_width(tmp_path):
    from test_break import voc

    huge = "<annotation><size><width>1e300</width><height>80</height></size>{}</annotation>"
    assert load_data(str(voc(tmp_path, huge)))["val"].sizes.tolist() == [[80, 100]]


def test_a_yaml_of_brackets(tmp_path):
    from test_break import YAML, yolo

    with pytest.raises(ValueError, match="not readable YAML"):
        load_data(str(yolo(tmp_path, text=YAML + "z: " + "[" * 3000 + "]" * 3000 + "\n")))


def in_child(f, *args):
    "A process of its own that has everything loaded; it may hang, or be killed"
    import multiprocessing

    p = multiprocessing.get_context("fork").Process(target=f, args=args, daemon=True)
    p.start()
    return p


def endless(to, kind, said):
    "A pipe, or a device, as a picture of a set, as one to look at, and as a list of pictures"
    from rtdetr_kd.data.images import open_image
    from test_break import YAML, yolo

    def put(p):
        p.unlink(missing_ok=True)
        os.mkfifo(p) if kind == "pipe" else p.symlink_to(kind)

    f = folder_of(to, images=[image(k) for k in range(1, 9)], anns=[ann(k, k) for k in range(1, 9)])
    put(f / "images/train/1.png")
    y = yolo(to / "y", text=YAML.replace("train/images", "list.txt"))
    put(y / "list.txt")
    words = [str(load_data(str(f))["train"].notes)]
    for call in (lambda: open_image(f / "images/train/1.png"), lambda: load_data(str(y))):
        try: call()
        except ValueError as e: words.append(str(e))
    said.write_text("\n".join(words))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
def test_what_has_no_end_is_not_read(tmp_path, kind):
    p = in_child(endless, tmp_path, kind, tmp_path / "said")
    p.join(60)
    p.kill()
    said = (tmp_path / "said").read_text()
    assert said.count("a device or a pipe, which has no end") == 2, said
    assert "image that cannot be read: dropped" in said


# --- half done -----------------------------------------------------------------------------------------------


def test_a_copy_is_whole_or_not_there(tmp_path, monkeypatch):
    "A disk that is full in the middle: no folder that looks like a data set without val, and the next try may begin"
    import rtdetr_kd.data.report as report
    from rtdetr_kd.files import Stop, plainly

    f, real = folder_of(tmp_path), report.write_json

    def full(path, *a):
        if "val" in path.name: raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, *a)

    monkeypatch.setattr(report, "write_json", full)
    with pytest.raises(Stop, match="instances_val.json could not be written, its disk is full"), plainly():
        check(f, progress=False, fix=tmp_path / "copy")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["d"]
    monkeypatch.setattr(report, "write_json", real)
    check(f, progress=False, fix=tmp_path / "copy")
    assert check(tmp_path / "copy", progress=False).ok


def test_half_a_set_is_not_divided(tmp_path):
    "A val that cannot be read would be missing in all parts"
    from rtdetr_kd.data.dividing import divide

    f = scenes(tmp_path / "d", train=8, select=2, val=2)
    (f / "annotations/instances_val.json").write_text("{")
    with pytest.raises(ValueError, match="instances_val.json is not readable JSON"):
        divide(f)


def test_a_heap_as_downloaded_is_divided(tmp_path, capsys):
    "Pascal VOC without lists, and one file in COCO's format; the check names the command"
    from rtdetr_kd.command import main
    from test_break import voc

    v = voc(tmp_path / "voc")
    for k in range(9):
        shutil.copy(v / "Annotations/train0.xml", v / f"Annotations/{k}.xml")
        rng = np.random.default_rng(k)
        Image.fromarray(rng.integers(0, 255, (80, 100, 3), np.uint8)).save(v / f"JPEGImages/{k}.png")
    shutil.rmtree(v / "ImageSets")
    c = scenes(tmp_path / "cvat", train=12, select=2, val=2)
    for k in ("select", "val"):
        (c / f"annotations/instances_{k}.json").unlink()
    (c / "annotations/instances_train.json").rename(c / "annotations/instances_default.json")
    (c / "images/train").rename(c / "images/default")
    for f, n in ((v, 12), (c, 12)):
        with pytest.raises(SystemExit):
            main(["check", str(f)])
        assert f"go on with: rtdetr-kd split {f}" in capsys.readouterr().out
        main(["split", str(f), "--val", ".2", "--select", ".2"])
        assert sum(len(s) for s in load_data(f"{f}-split").values()) == n


def test_what_to_type_next_is_what_helps(tmp_path, capsys):
    from rtdetr_kd.command import main

    rng = np.random.default_rng(0)
    lo, size = rng.uniform(0, [60, 50], (30, 2)), rng.uniform(10, 30, (30, 2))
    f = folder_of(tmp_path, anns=[ann(k, box=b) for k, b in enumerate(np.concatenate([lo, lo + size], 1).tolist())])
    with pytest.raises(SystemExit):
        main(["check", str(f)])
    assert f"go on with: rtdetr-kd check {f} --boxes xyxy, if that is so" in capsys.readouterr().out
    main(["check", str(f), "--boxes", "xyxy"])
    assert f"go on with: rtdetr-kd train --data {f} --boxes xyxy" in capsys.readouterr().out
    (f / "annotations/instances_train.json").write_text("{")
    with pytest.raises(SystemExit):
        main(["check", str(f)])
    assert f"go on with: rtdetr-kd check {f}, once what it says is mended" in capsys.readouterr().out


def test_the_pictures_of_a_test_split_are_listed(tmp_path):
    from conftest import write

    f = folder_of(tmp_path)
    write(f, split="test", images=[image(3, "3.png")], anns=[])
    shutil.move(f / "images/test/3.png", f / "images/train/3.png")
    shutil.rmtree(f / "images/test")
    d = json.loads((f / "annotations/instances_test.json").read_text())
    d["images"][0]["file_name"] = "train/3.png"
    (f / "annotations/instances_test.json").write_text(json.dumps(d))
    assert not [k for k in load_data(str(f))["train"].notes if "not listed" in k]


# --- two at once, and killed -----------------------------------------------------------------------------------

def slow_check(f, looks, said):
    "A check that notes each picture it looks at, and takes its time"
    from rtdetr_kd.data import audit

    real = audit.look

    def slow(p):
        with open(looks, "a") as to: to.write("x")
        time.sleep(0.02)
        return real(p)

    audit.look = slow
    said.write_text(str(check(f, progress=False).ok))


def test_a_check_killed_and_two_at_once(tmp_path):
    "kill -9 leaves no lock and no half result; of two at once one looks and both know"
    f = folder_of(tmp_path, images=[image(k) for k in range(1, 31)], anns=[ann(k, k) for k in range(1, 31)])
    looks = tmp_path / "looks"
    p = in_child(slow_check, f, looks, tmp_path / "0")
    while not looks.exists() and p.is_alive(): time.sleep(0.01)
    p.kill()
    p.join(60)
    looks.unlink()
    two = [in_child(slow_check, f, looks, tmp_path / f"{k}") for k in (1, 2)]
    for p in two: p.join(60)
    assert [(tmp_path / f"{k}").read_text() for k in (1, 2)] == ["True"] * 2 and not (tmp_path / "0").exists()
    assert len(looks.read_text()) == 33  # thirty, and one of select and two of val
    assert not list((tmp_path / "cache").rglob("*.part"))


# --- weights ---------------------------------------------------------------------------------------------------


def weights(to, spec=(), change=lambda v: v):
    "The shipped student with another description, or other numbers"
    with safe_open(STUDENT, "pt") as f:
        meta, state = f.metadata(), {k: change(f.get_tensor(k)) for k in f.keys()}
    save_file(state, to, meta | dict(spec=json.dumps(json.loads(meta["spec"]) | dict(spec))))
    return to


@pytest.mark.parametrize("spec, says", [
    (dict(names=[1] * 10), "names is no list of texts"), (dict(heads=3), "heads=3 does not divide d=64"),
    (dict(queries=-1), "queries=-1"), (dict(queries="30"), "queries='30'"), (dict(layers=10**6), "layers=1000000"),
    (dict(width=10**7), "width=10000000"), (dict(answer=99), "answer=99"), (dict(attention="foo"), "attention='foo'"),
    (dict(category_ids=[1]), "category_ids are not one for each class"), (dict(grey_bits=12.5), "grey_bits=12.5"),
    (dict(thresholds=[0.5]), "thresholds are not one for each class"), (dict(image_size=10**7), "image_size=10000000"),
], ids=str)
def test_a_description_that_cannot_be(tmp_path, spec, says):
    "Refused before a network is built: some of them would take all memory, some a crash at the first picture"
    from rtdetr_kd.model.weights import load_model

    with pytest.raises(ValueError, match="description of the architecture is damaged") as e:
        load_model(weights(tmp_path / "x.safetensors", spec))
    assert says in str(e.value)


def test_weights_that_are_no_numbers_find_not_nothing(tmp_path):
    from rtdetr_kd.model.weights import load_model

    nan = lambda v: torch.full_like(v, math.nan) if v.is_floating_point() else v
    m = load_model(weights(tmp_path / "x.safetensors", change=nan))
    with pytest.raises(ValueError, match="no number: its weights are damaged"):
        m.detect(ROOT / "figures/scene.jpg")


def test_a_class_called_3_is_asked_for_by_its_name(tmp_path):
    "And one with a comma in its name; numbers are still numbers where no class is called so"
    from rtdetr_kd.command import as_asked
    from rtdetr_kd.data.detections import class_numbers

    names = ["0", "3", "1", "2", "nut, bolt"]
    assert class_numbers(as_asked("3", "")["classes"], names) == {1}
    assert class_numbers(as_asked("nut, bolt", "", names)["classes"], names) == {4}
    assert class_numbers(as_asked("3", "")["classes"], list("abcd")) == {3}


def test_a_warm_up_that_never_ends_is_said(tiny, tmp_path, capsys):
    from rtdetr_kd.props import short_run
    from rtdetr_kd.train.step import tell_of_warmup

    tell_of_warmup(short_run(warmup=200), 12)
    assert "warmup=200 is 16.7 times the 12 steps" in capsys.readouterr().out
    tell_of_warmup(short_run(warmup=12), 12)
    assert not capsys.readouterr().out


def test_a_rare_class_is_on_both_sides(tmp_path):
    "Two images of two hundred have the second class: one of them is set aside, whatever the lot says"
    for at in ((3, 4), (120, 7), (199, 200)):
        anns = [ann(k, k, c=2 if k in at else 1) for k in range(1, 201)]
        f = folder_of(tmp_path / f"{at[0]}", images=[image(k, w=9, h=9) for k in range(1, 201)], draw=False,
                      anns=[a | dict(bbox=[1, 1, 5, 5], area=25) for a in anns])
        (f / "annotations/instances_select.json").unlink()
        for k in range(1, 201):
            Image.new("RGB", (9, 9), (k, 255 - k, k % 7)).save(f / f"images/train/{k}.png")
        splits = load_data(str(f))
        assert [int((s.labels == 1).sum()) for s in splits.values()][:2] == [1, 1]


def test_gradients_are_not_divided_by_a_variable(monkeypatch, tiny, tmp_path):
    "Accelerate reads ACCELERATE_GRADIENT_ACCUMULATION_STEPS; a run says accumulate"
    from rtdetr_kd.props import short_run
    from rtdetr_kd.train.parallel import accelerator

    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    acc, _ = accelerator(short_run(data=str(tiny), tracker="none"), Path(tmp_path))
    assert acc.gradient_accumulation_steps == 1
