"What people expect of a detector: every source, every form, every verb's help, as they type them"

import argparse, io, json, os, re, shutil, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rtdetr_kd.command import VERBS, parser_of
from rtdetr_kd.data.toy import scene
from rtdetr_kd.deploy import open_model
from rtdetr_kd.weights import load_model

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "weights/toy_student.safetensors"


@pytest.fixture(scope="module")
def model():
    return load_model(TOY)


@pytest.fixture(scope="module")
def scenes():
    return [scene("val", k, 128)[0] for k in range(6)]


@pytest.fixture(scope="module")
def folder(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for k, x in enumerate(scenes):
        Image.fromarray(x).save(folder / f"{k}.png")
    return folder


def run_command(*words, cwd):
    "`rtdetr-kd` as a process of its own"
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    words = [sys.executable, "-m", "rtdetr_kd", *words]
    return subprocess.run(words, cwd=cwd, env=env, text=True, capture_output=True, timeout=300)


def same(a, b, tolerance=1e-4):
    assert a.names == b.names
    np.testing.assert_allclose(a.boxes, b.boxes, atol=tolerance * 128)
    np.testing.assert_allclose(a.scores, b.scores, atol=tolerance)


SOURCES = {
    "path": lambda d, x: d / "0.png",
    "text": lambda d, x: str(d / "0.png"),
    "bytes": lambda d, x: (d / "0.png").read_bytes(),
    "file object": lambda d, x: io.BytesIO((d / "0.png").read_bytes()),
    "PIL": lambda d, x: Image.open(d / "0.png"),
    "array": lambda d, x: x[0],
    "floats": lambda d, x: x[0].astype(np.float32) / 255,
    "tensor": lambda d, x: torch.from_numpy(x[0]).permute(2, 0, 1),
    "float tensor": lambda d, x: torch.from_numpy(x[0]).permute(2, 0, 1) / 255,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_one_picture_is_detections(model, folder, scenes, kind):
    same(model.detect(SOURCES[kind](folder, scenes), 0.3), model.detect(scenes[0], 0.3))


MANY = {
    "folder": lambda d, x: d,
    "pattern": lambda d, x: f"{d}/*.png",
    "list": lambda d, x: [d / "0.png", *x[1:]],
    "batch": lambda d, x: np.stack(x),
    "tensor batch": lambda d, x: torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2),
    "generator": lambda d, x: (v for v in x),
}


@pytest.mark.parametrize("kind", MANY)
def test_many_pictures_are_a_list(model, folder, scenes, kind):
    found = model.detect(MANY[kind](folder, scenes), 0.3, batch=4)
    assert isinstance(found, list) and len(found) == 6
    for a, x in zip(found, scenes):
        same(a, model.detect(x, 0.3))


def test_blue_first_is_said(model, scenes):
    same(model.detect(scenes[0][..., ::-1], 0.3, bgr=True), model.detect(scenes[0], 0.3))


def test_batched_is_one_by_one_to_five_digits(model, scenes):
    many = model.detect(scenes, 0.05, batch=6)
    for a, x in zip(many, scenes):
        b = model.detect(x, 0.05)
        n = min(len(a), len(b))
        assert abs(len(a) - len(b)) <= 1  # a score at the threshold
        np.testing.assert_allclose(a.scores[:n], b.scores[:n], atol=1e-5)


@pytest.mark.parametrize("ending", ["onnx", "safetensors"])
def test_an_opened_file_detects_alike(model, folder, ending):
    for a, b in zip(open_model(TOY.with_suffix(f".{ending}")).detect(folder, 0.3), model.detect(folder, 0.3)):
        same(a, b, 1e-2)


def test_the_mode_is_as_before(model, scenes):
    model.train()
    model.encoder.eval()
    before = [m.training for m in model.modules()]
    model.detect(scenes)
    assert [m.training for m in model.modules()] == before
    model.eval()


def test_a_film_is_its_frames(model, scenes, tmp_path):
    cv2 = pytest.importorskip("cv2", reason="films need the extra [video]")
    film = cv2.VideoWriter(str(tmp_path / "film.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (128, 128))
    for x in scenes:
        film.write(np.ascontiguousarray(x[..., ::-1]))
    film.release()
    found = model.detect(tmp_path / "film.avi", 0.3)
    assert [d.source.rpartition("#")[2] for d in found] == list("012345")
    for d, x in zip(found, scenes):
        assert abs(d.image.astype(int) - x).mean() < 12  # JPEG, and the channels in their order
    with pytest.raises(ValueError, match="cannot be opened as a video"):
        (tmp_path / "no.mp4").write_bytes(b"no film")
        model.detect(tmp_path / "no.mp4")


def test_supervision_gets_the_same_boxes(model, scenes):
    pytest.importorskip("supervision")
    found = model.detect(scenes[0], 0.3)
    sv = found.to_supervision()
    np.testing.assert_allclose(sv.xyxy, found.boxes, atol=1e-4)
    assert sv.data["class_name"].tolist() == found.names and len(sv) == len(found)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_a_meaning_for_each_option(verb):
    "As people type it; a meaning is more than the option's name"
    r = run_command(verb, "--help", cwd=ROOT)
    assert r.returncode == 0, r.stderr
    found = re.findall(r"^ {2,4}(?:-\w, )?--([\w-]+)(.*(?:\n {8,}.*)*)", r.stdout, re.M)
    assert found or verb in ("download",)
    for name, rest in found:
        said = re.sub(r"\(default: .*?\)|\s+", " ", rest).split(maxsplit=1)
        assert len(" ".join(said)) > len(name) + 3, f"{verb} --{name} has no meaning: {rest!r}"


@pytest.mark.parametrize("verb", [v for v in VERBS if not isinstance(VERBS[v], str)])
def test_each_word_and_option_has_a_help(verb):
    for a in parser_of(verb)._actions:
        assert a.help and (a.help is argparse.SUPPRESS or len(a.help) > 3), (verb, a.dest)


def test_the_command_is_the_module(tmp_path):
    words = ["predict", str(TOY), str(ROOT / "figures/scene.jpg"), "--save", "json", "--to", str(tmp_path / "new")]
    r = run_command(*words, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    row = json.loads((tmp_path / "new/predictions.json").read_text())
    want = load_model(TOY).detect(ROOT / "figures/scene.jpg")
    assert [x["name"] for x in row["objects"]] == want.names and row["width"] == want.image.shape[1]


def test_a_fault_is_a_sentence_and_an_exit_code(tmp_path):
    r = run_command("evaluate", "no.onnx", "toy", cwd=tmp_path)
    assert r.returncode == 1 and r.stderr.startswith("Stopped: no.onnx") and "Traceback" not in r.stderr


def test_the_server_cuts_where_the_weights_say(tmp_path):
    testing = pytest.importorskip("fastapi.testclient")
    from rtdetr_kd.deploy.judge import keep_thresholds
    from rtdetr_kd.serve import create_app

    mine = shutil.copy(TOY, tmp_path / "mine.safetensors")
    keep_thresholds(mine, dict(two=0.99), 0.2)
    with testing.TestClient(create_app(open_model(mine))) as client:
        photo = dict(content=(ROOT / "figures/scene.jpg").read_bytes(), headers={"content-type": "image/jpeg"})
        for _ in range(100):
            if client.get("/readyz").status_code == 200:
                break
            time.sleep(0.1)
        found = client.post("/detect", **photo).json()["detections"]
        every = client.post("/detect", params=dict(threshold=0.2), **photo).json()["detections"]
    assert {d["name"] for d in every} - {d["name"] for d in found} == {"two"}
    assert [d for d in every if d["name"] != "two"] == found
