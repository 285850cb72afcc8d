"Exported files, as strangers open them; the notebook that exports, as people run it"
import importlib.util, json, re, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
ROOT = Path(__file__).resolve().parent.parent
STUDENT = ROOT / "weights/toy_student.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from rtdetr_kd.deploy.export import write_onnx, write_openvino
    from rtdetr_kd.model.weights import load_model
    to = tmp_path_factory.mktemp("export")
    onnx = write_onnx(load_model(STUDENT), to / "toy.onnx")
    return dict(onnx=onnx, xml=write_openvino(onnx, to / "toy.xml"), folder=to)


def twelve():
    "A dozen images of the split that chooses"
    from rtdetr_kd.data.dataset import load_data
    from rtdetr_kd.data.split import part
    return part(load_data("toy")["select"], range(12))


@pytest.fixture(scope="module")
def recipe(files):
    from rtdetr_kd.deploy.calibrate import calibrate
    return calibrate(files["onnx"], twelve(), 12)


def scenes(n, side=128):
    from rtdetr_kd.data.toy import scene
    return np.stack([scene("val", k, side)[0] for k in range(n)])


def ten_lines() -> str:
    "The docs' program that needs nothing but onnxruntime"
    import nbformat
    cells = nbformat.read(ROOT / "nbs/deploy/02_export.ipynb", 4).cells
    return next(c.source for c in cells if c.cell_type == "code" and "onnxruntime.InferenceSession(folder" in c.source)


def test_ten_lines_of_onnxruntime(files):
    "Run in a process that cannot import this project, they find what `detect` finds"
    from rtdetr_kd.model.weights import load_model
    assert len(ten_lines().strip().splitlines()) <= 15
    before = f"from pathlib import Path\nfolder = Path({str(files['folder'])!r})\nroot = lambda: Path({str(ROOT)!r})\n"
    after = "\nimport sys; assert 'torch' not in sys.modules and 'rtdetr_kd' not in sys.modules"
    r = subprocess.run([sys.executable, "-I", "-c", before + ten_lines() + after], text=True, capture_output=True)
    assert r.returncode == 0, r.stderr
    found = load_model(STUDENT).detect(ROOT / "figures/scene.jpg")
    said = [re.fullmatch(r"(\w+) (\d\.\d\d) at \[(.*)\]", l).groups() for l in r.stdout.strip().splitlines()]
    assert sorted(n for n, *_ in said) == sorted(found.names)
    for (_, s, b), p, box in zip(said, found.scores, found.boxes):
        assert abs(float(s) - p) < .05
        assert np.abs(np.array(b.split(), float) - box).max() < 4


@pytest.mark.parametrize("n", [1, 2, 5])
def test_any_batch_in_every_runtime(files, n):
    from rtdetr_kd.deploy.open import open_model
    from rtdetr_kd.deploy.verify import compare_detections
    want = [v[:n] for v in open_model(STUDENT, threads=1)(scenes(5))]
    for f in (files["onnx"], files["xml"]):
        r = compare_detections(tuple(want), open_model(f)(scenes(n)))
        assert r["lost"] == 0 and r["score"] < 1e-3 and r["iou"] > .99, (f, r)


def test_what_the_file_says(files):
    from rtdetr_kd.deploy.open import open_model
    from rtdetr_kd.model.weights import load_model, weights_mark
    m = load_model(STUDENT)
    for f in (files["onnx"], files["xml"]):
        r = open_model(f)
        said = (r.names, r.category_ids, r.size, r.about["weights"])
        assert said == (m.spec.names, m.spec.category_ids, 128, weights_mark(m))
    assert not re.search(rb"/(root|home|work|tmp)/\w", files["onnx"].read_bytes()), "a path of one machine in the file"


def test_the_shipped_file_is_the_export(files):
    "weights/toy_student.onnx: the same nodes in the same order, the same numbers"
    import onnx
    new, shipped = onnx.load(files["onnx"]), onnx.load(ROOT / "weights/toy_student.onnx")
    assert [n.op_type for n in new.graph.node] == [n.op_type for n in shipped.graph.node]
    assert [n.name for n in new.graph.node] == [n.name for n in shipped.graph.node]
    sizes = lambda m: {i.name: tuple(i.dims) for i in m.graph.initializer}
    assert sizes(new) == sizes(shipped)


FAULTS = {
    "foreign.onnx": "was not written by rtdetr_kd",
    "cut.onnx": "copy or export it again",
    "empty.onnx": "export",
    "alone.xml": "alone.bin: there is no such model file",
    "none.onnx": "no such model file",
    "none.engine": "no such model file",
    "model.h5": "a model file ends in",
}


@pytest.fixture
def damaged(files, tmp_path):
    "A folder of files with a fault each"
    import onnx
    whole = files["onnx"].read_bytes()
    m = onnx.load(files["onnx"])
    del m.metadata_props[:]
    onnx.save(m, tmp_path / "foreign.onnx")
    (tmp_path / "cut.onnx").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "alone.xml").write_text(files["xml"].read_text())
    return tmp_path


@pytest.mark.parametrize("name, says", FAULTS.items())
def test_damaged_and_foreign_files(damaged, name, says):
    from rtdetr_kd.deploy.open import open_model
    with pytest.raises((ValueError, FileNotFoundError)) as e: open_model(damaged / name)
    assert says in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("wrong", [(1, 3, 128, 128), (1, 64, 64, 3), (0, 128, 128, 3), (128, 128, 3)])
def test_a_wrong_input_size(files, wrong):
    from rtdetr_kd.deploy.open import open_model
    for f in (files["onnx"], files["xml"]):
        with pytest.raises(ValueError, match=r"\(b,128,128,3\)"): open_model(f)(np.zeros(wrong, np.uint8))


def test_calibration_sees_what_inference_sees(files):
    "The arrays of the calibration are those of the evaluation"
    from rtdetr_kd.data import dataset
    from rtdetr_kd.deploy import calibrate, runner, verify
    from rtdetr_kd.model import evaluate
    assert verify.Images is evaluate.Images is dataset.Images
    one = dataset.Images(twelve(), 64)[3][0].permute(1, 2, 0)
    assert np.array_equal(runner.pictures(twelve(), 64, [3])[0], one)
    assert calibrate.pictures is verify.pictures is runner.pictures


def test_entropy_is_not_minmax(files, recipe):
    from rtdetr_kd.deploy.calibrate import calibrate
    plain = calibrate(files["onnx"], twelve(), 12, "minmax")
    width = lambda r: np.array([hi - lo for lo, hi in r["ranges"].values()])
    assert (width(recipe) < .99 * width(plain)).mean() > .2  # with the defaults of ONNX Runtime: 0


@pytest.mark.parametrize("target, name", [("onnxruntime", "a.onnx"), ("openvino", "b.xml"), ("tensorrt", "c.onnx")])
def test_int8_finds_the_same_objects(files, recipe, target, name):
    from rtdetr_kd.deploy.open import open_model
    from rtdetr_kd.deploy.quantize import tensorrt_takes, write_int8
    from rtdetr_kd.deploy.verify import compare_detections
    f = write_int8(files["onnx"], files["folder"] / name, recipe, target)
    r = compare_detections(open_model(files["onnx"])(scenes(8)), open_model(f)(scenes(8)), .5)
    assert r["lost"] <= 1
    assert r["matched"] > 10
    if target == "tensorrt": assert tensorrt_takes(f) == []


def reads_integers(graph) -> list:
    "Convolutions and products whose weights come out of a Dequantize node"
    made = {o: n.op_type for n in graph.node for o in n.output}
    products = [n for n in graph.node if n.op_type in ("Conv", "MatMul") and len(n.input) > 1]
    return [n for n in products if made.get(n.input[1]) == "DequantizeLinear"]


def test_what_stays_in_float(files, recipe):
    "Only convolutions of backbone and fusion read integers, unless asked"
    import onnx
    from rtdetr_kd.deploy.calibrate import DEFAULT, PARTS
    from rtdetr_kd.deploy.quantize import write_int8
    m = onnx.load(write_int8(files["onnx"], files["folder"] / "d.onnx", recipe, "tensorrt"))
    integer, starts = reads_integers(m.graph), tuple(s for p in DEFAULT for s in PARTS[p])
    assert len(integer) > 30
    for n in integer: assert n.op_type == "Conv" and n.name.startswith(starts), n.name
    for n in m.graph.node:
        if n.op_type in {"Softmax", "LayerNormalization", "TopK", "GridSample", "Log"}:
            assert not any(i.endswith(".dq") for i in n.input), n.name


def test_tensorrt_calls_exist_in_nvidias_interface():
    "mypy against the stubs of 10.13"
    pytest.importorskip("mypy")
    if importlib.util.find_spec("tensorrt") is None: pytest.skip("tensorrt-stubs are not installed")
    options = ["--ignore-missing-imports", "--follow-imports=silent", "--no-error-summary", "--check-untyped-defs"]
    modules = [str(ROOT / f"rtdetr_kd/deploy/{name}.py") for name in ("tensorrt", "engine")]
    r = subprocess.run([sys.executable, "-m", "mypy", *options, *modules], text=True, capture_output=True, cwd=ROOT)
    wrong = [l for l in r.stdout.splitlines() if any(k in l for k in ("attr-defined", "call-arg", "arg-type"))]
    assert not wrong, "\n".join(wrong)


def papermill(*words):
    exe = Path(sys.executable).with_name("papermill")
    return subprocess.run([exe, *map(str, words)], cwd=ROOT, text=True, capture_output=True, timeout=500,
                          stdin=subprocess.DEVNULL)


def slow(words, says):
    "A kernel is started for each: make test does that for two"
    return pytest.param(words, says, marks=pytest.mark.slow)


@pytest.mark.parametrize("words, says", [
    ("-p precison int8", "did you mean 'precision'"),
    slow("-p target tflite", "onnxruntime, openvino, tensorrt"),
    slow("-p calibration_images 0", "at least 1"),
    slow("-p max_loss much", "must be a number"),
    ("-p weights no/such.safetensors", "no such weights file"),
    slow("-p parts head", "must be one of backbone, fusion"),
])
def test_faults_stop_with_one_sentence(tmp_path, words, says):
    r = papermill("nbs/export_model.ipynb", tmp_path / "out.ipynb", *words.split(), "-p", "out", tmp_path / "x.onnx")
    assert r.returncode != 0
    assert says in r.stderr
    assert "Traceback" not in r.stderr.split("PapermillExecutionError")[-1]
    assert not (tmp_path / "x.onnx").exists()


def test_the_command(tmp_path, tiny):
    "INT8 for OpenVINO from the command line, checked and evaluated"
    from rtdetr_kd.deploy.open import open_model
    words = ["-p", "data", tiny, "-p", "target", "openvino", "-p", "precision", "int8", "-p", "max_loss", .2,
             "-p", "evaluate", "true", "-p", "out", tmp_path / "x.xml"]
    r = papermill("nbs/export_model.ipynb", tmp_path / "out.ipynb", *words)
    assert r.returncode == 0, r.stderr[-2000:]
    assert open_model(tmp_path / "x.xml").precision.startswith("int8")


def test_nothing_compared_is_an_error():
    "Two networks that have never met, and find nothing: `matched: 0` is no agreement"
    from rtdetr_kd.deploy.verify import check_export
    from rtdetr_kd.props import tiny
    a, b = tiny(0, 128), tiny(1, 128)
    for weights in (b, a):
        with pytest.raises(ValueError, match="nothing was compared"): check_export(a, weights, twelve())


def test_pictures_without_objects_come_last(files):
    "A set that begins with empty pictures is compared on the others"
    from rtdetr_kd.data.split import part
    from rtdetr_kd.deploy.verify import check_export
    from dataclasses import replace
    some = twelve()
    keep = np.repeat(np.arange(len(some)) >= 8, np.diff(some.start))
    start = np.concatenate([[0], np.cumsum(np.where(np.arange(len(some)) >= 8, np.diff(some.start), 0))])
    emptied = {k: getattr(some, k)[keep] for k in vars(some) if isinstance(getattr(some, k), np.ndarray)
               and len(getattr(some, k)) == len(keep)}
    late = replace(some, start=start, **emptied)
    assert len(late.boxes) == len(part(some, range(8, 12)).boxes)
    assert check_export(files["onnx"], STUDENT, late, images=4)["matched"] > 5


def named_after_numbers(folder):
    "Tiny data whose classes are named as an official checkpoint's without names: class 0, class 1, …"
    from rtdetr_kd.props import tiny_data
    tiny_data(folder, 128)
    for f in folder.rglob("*.json"):
        d = json.loads(f.read_text())
        for k, c in enumerate(sorted(d["categories"], key=lambda c: c["id"])): c["name"] = f"class {k}"
        f.write_text(json.dumps(d))
    return folder


def test_an_official_checkpoint_is_compared_with_pytorch(tmp_path):
    "A .pth says neither its size nor its data: both are given; the file is checked against the network itself"
    import torch
    from rtdetr_kd.deploy.open import open_model
    from rtdetr_kd.deploy.verify import check_export
    from rtdetr_kd.model.weights import load_model
    torch.save(dict(model=load_model(ROOT / "weights/toy_teacher.safetensors").state_dict()), tmp_path / "t.pth")
    data = named_after_numbers(tmp_path / "data")
    words = ["-p", "weights", tmp_path / "t.pth", "-p", "data", data, "-p", "image_size", 128]
    r = papermill("nbs/export_model.ipynb", tmp_path / "out.ipynb", *words)
    assert r.returncode == 0, r.stderr[-2000:]
    assert open_model(tmp_path / "t.onnx").size == 128
    from rtdetr_kd.data.dataset import load_data
    other, split = load_model(tmp_path / "t.pth", image_size=128), load_data(str(data))["select"]
    assert check_export(tmp_path / "t.onnx", other, split)["matched"] > 3
    torch.nn.init.normal_(other.decoder.dec_score_head[-1].weight)
    with pytest.raises(ValueError, match="does not find"): check_export(tmp_path / "t.onnx", other, split)


@pytest.mark.parametrize("kind", ["pth", "folder", "own"])
def test_the_command_exports_at_the_size_that_is_asked_for(tmp_path, kind, monkeypatch):
    "Weights that say 640, or nothing; what is written is stood in for, as it takes long"
    import torch
    from rtdetr_kd.command import main
    from rtdetr_kd.deploy import export
    from rtdetr_kd.model.detector import RTDETR, Spec
    from rtdetr_kd.model.foreign_weights import save_huggingface
    from rtdetr_kd.model.weights import save_model
    torch.manual_seed(0)
    m = RTDETR(Spec(["x", "y"], width=16, d=64, d_ff=64, expansion=.5, layers=2, queries=20, image_size=640)).eval()
    path = tmp_path / dict(pth="w.pth", folder="theirs", own="w.safetensors")[kind]
    if kind == "folder": save_huggingface(m, path)
    elif kind == "pth": torch.save(dict(model=m.state_dict()), path)
    else: save_model(m, path)
    sides = []
    monkeypatch.setattr(
        export, "write_onnx", lambda m, p, *a, **k: p.write_text("") or sides.append(export.example_inputs(
            m.spec.image_size, "fractions")[0][0].shape[1:]))
    main(["export", str(path), "--to", str(tmp_path / "w.onnx"), "--image_size", "96"])
    main(["export", str(path), "--to", str(tmp_path / "w.onnx")])
    assert sides == [(96, 96, 3), (640, 640, 3)]


def test_ones_own_student_brings_its_data(tmp_path, tiny):
    "README's line, as typed: weights alone"
    from rtdetr_kd.model.weights import load_model, save_model
    save_model(load_model(STUDENT), tmp_path / "best.safetensors", config=dict(data=str(tiny), exif="auto"))
    words = ["-p", "weights", tmp_path / "best.safetensors", "-p", "precision", "int8", "-p", "evaluate", "true",
             "-p", "max_loss", .3]
    r = papermill("nbs/export_model.ipynb", tmp_path / "out.ipynb", *words)
    assert r.returncode == 0, r.stderr[-2000:]
    assert f"Measured on {tiny.name}" in (tmp_path / "best.int8.onnx.md").read_text()
