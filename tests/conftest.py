"Where the optional reference material lies, and a data set small enough to train on in seconds"

import json, os
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
LONGEST = ("pretended_gpu", "methods", "docs", "export", "training", "serve", "memory", "distributed", "card")


def pytest_collection_modifyitems(items):
    "Files that take minutes come first, so that of two workers none has to wait for the other at the end"
    place = {f"test_{name}": k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda i: place.get(i.path.stem, len(place)))


def shared(*parts) -> Path:
    "A file of the reference material, or skip"
    base = Path(os.environ.get("RTDETR_KD_SHARED") or ROOT.parent / "shared")
    path = base.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"reference material {'/'.join(parts)} is not here: set RTDETR_KD_SHARED")
    return path


def scenes(folder: Path, **counts) -> Path:
    "A data set of that many scenes of 64 pixels in each split"
    from rtdetr_kd.props import tiny_data

    return tiny_data(folder, **counts)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    "24 training scenes, 8 to select by, 8 to test on"
    return scenes(tmp_path_factory.mktemp("data") / "tiny", train=24, select=8, val=8)


@pytest.fixture(scope="session")
def tiny_odd(tmp_path_factory) -> Path:
    "25 training scenes, 7 to select by, 7 to test on: nothing that two would divide"
    return scenes(tmp_path_factory.mktemp("data") / "odd", train=25, select=7, val=7)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    "Nothing of an earlier test is remembered"
    monkeypatch.setenv("RTDETR_KD_CACHE", str(tmp_path / "cache"))


# --- a data set with one fault, in COCO's format ---------------------------------------------------------------

def image(i, name=None, w=100, h=80):
    return dict(id=i, file_name=name or f"{i}.png", width=w, height=h)


def ann(i, image_id=1, c=1, box=(10, 10, 20, 20), **more):
    return dict(id=i, image_id=image_id, category_id=c, bbox=list(box), area=400, iscrowd=0) | more


CATS = [dict(id=1, name="cat"), dict(id=2, name="dog")]


def write(folder: Path, images=None, anns=None, cats=CATS, split="train", draw=True, text=None) -> Path:
    "A split of a folder in COCO's format, with its pictures"
    images = [image(1), image(2)] if images is None else images
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "images" / split).mkdir(parents=True, exist_ok=True)
    for k, im in enumerate(images if draw else []):
        p = folder / "images" / split / im["file_name"]
        p.parent.mkdir(parents=True, exist_ok=True)
        size = im.get("width") or 100, im.get("height") or 80
        Image.new("RGB", tuple(int(float(x)) for x in size), (k % 250, 99, len(split))).save(p)
    d = dict(images=images, annotations=[ann(1)] if anns is None else anns, categories=cats)
    (folder / "annotations" / f"instances_{split}.json").write_bytes(text(d) if text else json.dumps(d).encode())
    return folder


def folder_of(tmp_path, **k) -> Path:
    "A whole data set whose train split has the fault"
    write(tmp_path / "d", split="val")
    write(tmp_path / "d", split="select", images=[image(7)], anns=[ann(1, 7)])
    return write(tmp_path / "d", **k)


def read(tmp_path, **k):
    "The train split of such a folder, as a `Split`"
    from rtdetr_kd.data.coco import read_coco
    write(tmp_path / "d", **k)
    return read_coco(tmp_path / "d/annotations/instances_train.json", tmp_path / "d/images/train", "train")
