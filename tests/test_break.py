"Neighbours of the known faults: what a hostile or careless data set, and a file cut off in mid-write, must not do"

import json, shutil

import numpy as np
import pytest
from PIL import Image

from conftest import ann, folder_of, read, write
from rtdetr_kd.data.dataset import load_data, summary
from rtdetr_kd.data.report import check
from rtdetr_kd.distill.cache import CachedAnswers

pytestmark = pytest.mark.usefixtures("own_cache")


def renamed(folder, name):
    "The first training image under another name, in the annotations only"
    p = folder / "annotations/instances_train.json"
    d = json.loads(p.read_text())
    d["images"][0]["file_name"] = name
    p.write_text(json.dumps(d))
    return folder


def test_a_number_beyond_all_numbers(tmp_path):
    huge = lambda d: json.dumps(d).replace("[11, 10, 20, 20]", "[11, 10, 20, 1e999]").encode()
    s = read(tmp_path, anns=[ann(1), ann(2, box=(11, 10, 20, 20))], text=huge)
    assert s.notes == {"box that is no four numbers: dropped": 1} and len(s.boxes) == 1


@pytest.mark.parametrize("name", ["a" * 5000 + ".png", "\ud800.png", "a\0b.png"], ids=["long", "surrogate", "nul"])
def test_names_that_no_file_can_have(tmp_path, name):
    f = renamed(folder_of(tmp_path, anns=[ann(1), ann(2, 2)]), name)
    text = summary(load_data(str(f)))
    assert "image that cannot be read: dropped" in text and text.encode()  # can be printed
    assert f"{check(f, progress=False)}".encode()


def test_a_link_to_itself(tmp_path):
    f = folder_of(tmp_path, anns=[ann(1), ann(2, 2)])
    (f / "images/train/1.png").unlink()
    (f / "images/train/1.png").symlink_to("1.png")
    assert load_data(str(f))["train"].ids.tolist() == [2]


def test_a_check_that_was_cut_off_is_done_again(tmp_path):
    f = folder_of(tmp_path)
    load_data(str(f))
    kept = sorted((tmp_path / "cache/checks").glob("*.json"))
    assert kept
    assert not list((tmp_path / "cache").rglob("*.part"))
    for cut in (lambda t: t[: len(t) // 2], lambda t: "", lambda t: "[]"):
        before = [p.read_text() for p in kept]
        for p in kept:
            p.write_text(cut(p.read_text()))
        load_data(str(f))
        assert [p.read_text() for p in kept] == before


def test_class_names_that_look_alike(tmp_path):
    s = read(tmp_path, cats=[dict(id=1, name="cat"), dict(id=2, name="Cat "), dict(id=3, name=" ")])
    assert any("only in case or blanks" in k for k in s.notes) and "category without a name: look" in s.notes


def test_an_image_in_select_and_val(tmp_path):
    f = folder_of(tmp_path)
    shutil.copy(f / "images/select/7.png", f / "images/val/1.png")
    assert "image that is also in select" in summary(load_data(str(f)))


def test_why_a_split_has_no_box(tmp_path):
    f = folder_of(tmp_path, anns=[ann(1, 99)])
    with pytest.raises(ValueError, match="has no box.*image that is not listed: dropped"):
        load_data(str(f))
    write(folder_of(tmp_path), split="select", images=[], anns=[])
    with pytest.raises(ValueError, match="'select' has no image.*carved from train"):
        load_data(str(f))


# --- YOLO and VOC ---------------------------------------------------------------------------------------------

YAML = "train: train/images\nval: val/images\nnames: [cat, dog]\n"


def yolo(f, label="0 .5 .5 .2 .2\n", text=YAML):
    for split in ("train", "val"):
        for d in ("images", "labels"):
            (f / split / d).mkdir(parents=True, exist_ok=True)
        for k in range(3):
            Image.new("RGB", (100, 80), (60 * k, 9, len(split))).save(f / f"{split}/images/{k}.png")
            (f / f"{split}/labels/{k}.txt").write_bytes(label if isinstance(label, bytes) else label.encode())
    (f / "data.yaml").write_text(text)
    return f


@pytest.mark.parametrize(
    "text, says",
    [
        (YAML.replace("[cat, dog]", "cat"), "no list of class names"),
        (YAML.replace("[cat, dog]", ""), "no list of class names"),
        (YAML.replace("[cat, dog]", "{cat: 0}"), "no list of class names"),
        (YAML.replace("train/images", "{a: b}"), "'train' is in"),
        (YAML.replace("train/images", "train/images/0.png"), "0.png is no text"),
        ("train: [", "not readable YAML"),
    ],
)
def test_a_yaml_that_says_nothing_useful(tmp_path, text, says):
    with pytest.raises(ValueError, match=says):
        load_data(str(yolo(tmp_path, text=text)))


def test_the_yaml_that_counts(tmp_path):
    f = yolo(tmp_path, text=YAML.replace("[cat, dog]", "[no, yes]\nnc: 5\nval2: ~"))
    (f / "aaa.yaml").write_text(YAML.replace("cat", "cow"))
    (f / "aab.yaml").write_text("{{{ a template")
    s = load_data(str(f))["train"]
    assert s.names == ["no", "yes"] and any(k.startswith("nc is 5, and names has 2") for k in s.notes)


@pytest.mark.parametrize("label", ["0,.5,.5,.2,.2\n", "cat .5 .5 .2 .2\n", "# made by hand\n0 .5 .5 .2 .2\n"])
def test_lines_that_are_no_boxes(tmp_path, label):
    with pytest.raises(ValueError, match="begin with a class number.*0.txt line 1: "):
        load_data(str(yolo(tmp_path, label)))


def test_labels_in_other_codes_and_with_key_points(tmp_path):
    assert np.allclose(
        load_data(str(yolo(tmp_path, "0 .5 .5 .2 .2\r\n".encode("utf-16"))))["val"].boxes, [40, 32, 60, 48]
    )
    with pytest.raises(ValueError, match="0.txt is no text in UTF-8"):
        load_data(str(yolo(tmp_path, "0 .5 .5 .2 .2 é".encode("latin-1"))))
    pose = yolo(tmp_path, "0 .5 .5 .2 .2 .1 .1 2 .9 .9 2\n", YAML + "kpt_shape: [2, 3]\n")
    assert np.allclose(load_data(str(pose))["val"].boxes, [40, 32, 60, 48])


def voc(f, first="<annotation>{}</annotation>", box=(11, 11, 30, 30), listed=b"train0\ntrain1\n"):
    for d in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (f / d).mkdir(parents=True, exist_ok=True)
    x = lambda b: (
        "<object><name>dog</name><bndbox>"
        + "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), b))
        + "</bndbox></object>"
    )
    for n in ("train0", "train1", "val0"):
        Image.new("RGB", (100, 80), (len(n), 9, ord(n[-1]))).save(f / f"JPEGImages/{n}.png")
        (f / f"Annotations/{n}.xml").write_text(
            (first if n == "train0" else "<annotation>{}</annotation>").format(
                x(box if n == "train0" else (11, 11, 30, 30))
            )
        )
    (f / "ImageSets/Main/train.txt").write_bytes(listed)
    (f / "ImageSets/Main/val.txt").write_text("val0")
    return f


def test_voc_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="train0.xml is no Pascal VOC annotation"):
        load_data(str(voc(tmp_path, "<html>{}</html>")))
    with pytest.raises(ValueError, match="no Pascal VOC annotation"):
        load_data(str(voc(tmp_path, '<annotation xmlns="http://x">{}</annotation>')))
    with pytest.raises(ValueError, match="gone.xml: there is no such annotation"):
        load_data(str(voc(tmp_path, listed=b"train0\ngone\n")))


def test_voc_with_a_mark_and_a_negative_corner(tmp_path):
    s = load_data(str(voc(tmp_path, box=(-3, 11, 30, 30), listed=b"\xef\xbb\xbftrain0\r\ntrain1\r\n")))
    assert s["val"].boxes.tolist() == [[10, 10, 30, 30]]  # one bad corner does not move everybody's boxes


# --- the teacher's kept answers -------------------------------------------------------------------------------


def test_kept_answers_that_were_cut_off(tmp_path):
    part = tmp_path / "k"
    part.mkdir()
    (part / "about.json").write_text(json.dumps(dict(images=4, views=1, shapes=[[2, 2]], arrays=["logits"])))
    np.save(part / "logits.npy", np.zeros((4, 3), np.float16))
    CachedAnswers(part)
    np.save(part / "logits.npy", np.zeros((2, 3), np.float16))
    with pytest.raises(ValueError, match="has 2 rows"):
        CachedAnswers(part)
    (part / "logits.npy").write_bytes((part / "logits.npy").read_bytes()[:130])
    with pytest.raises(ValueError):
        CachedAnswers(part)
