"What is typed arrives: notebooks edited by hand and run again, the same folder by another way, letters a stream lacks"

import json, os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

KERNEL = r'''
"Runs the cells of a notebook as a kernel does, up to the one that reads the parameters; then again, edited"
import json, re, sys
from IPython.core.interactiveshell import InteractiveShell

path, read, value, edits = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
cells = [c for c in json.load(open(path))["cells"] if c["cell_type"] == "code"]
at = next(k for k, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", []))
last = next(k for k, c in enumerate(cells) if read in "".join(c["source"]))
shell = InteractiveShell()

def run(first, edit, more=""):
    "The cells from `first` on, with an edited line in the parameters cell, and perhaps another at its end"
    for k, c in enumerate(cells[:last + 1]):
        source = "".join(c["source"])
        if k < first: continue
        if k == at:
            for name, v in edit.items():
                source, n = re.subn(rf"^({name}: \w+ = )[^#]+", lambda m: m[1] + repr(v) + "  ", source, flags=re.M)
                assert n == 1, name
            source += more
        done = shell.run_cell(source, store_history=True)
        if not done.success: return str(done.error_in_exec or done.error_before_exec)
    return shell.ev(value)

said = [run(0, edits[0]), run(0, edits[1]), run(at, edits[2]), run(0, edits[2], "\ntpyo = 1"), run(at, edits[0])]
print("SAID", json.dumps(said))
'''

TOY = dict(train=("method", ["none", "cwd", "logit"], "given = chosen(", "config.method", {}),
           ablation=("names", ["none", "logit", "cwd"], "parameters(", "p['names']", dict(dry=True)),
           attention=("row", [3, 4, 5], "parameters(", "p['row']", {}),
           export_model=("batch", [1, 2, 3], "p = {k:", "p['batch']", {}),
           colab=("subset", [24, 25, 26], "parameters(", "p['subset']", dict(stand_in=True)))


@pytest.mark.parametrize("name", TOY)
def test_an_edited_parameter_arrives_every_time(name, tmp_path):
    "From the top, from the parameters on, after a misspelt line, and back again"
    key, values, read, value, fixed = TOY[name]
    edits = json.dumps([fixed | {key: v} for v in values])
    r = subprocess.run(
        [sys.executable, "-c", KERNEL, f"{name}.ipynb", read, value, edits], cwd=ROOT / "nbs", text=True,
        capture_output=True, timeout=300, env=os.environ | dict(PYTHONPATH=str(ROOT), MPLBACKEND="agg"))
    assert "SAID" in r.stdout, r.stderr[-2000:] + r.stdout[-2000:]
    first, second, third, misspelt, again = json.loads(r.stdout.split("SAID ")[1])
    assert [first, second, third, again] == [*values, values[0]]
    assert "tpyo" in misspelt


def named(folder, name):
    "Tiny data with a class of that name"
    from rtdetr_kd.props import tiny_data

    tiny_data(folder)
    for f in folder.rglob("*.json"):
        d = json.loads(f.read_text())
        d["categories"][0]["name"] = name
        f.write_text(json.dumps(d))
    return folder


def test_letters_that_a_stream_lacks_end_no_run(tmp_path):
    "λ of a method and a class in Chinese, on a terminal with a code page"
    data = named(tmp_path / "data", "猫λ")
    words = f"--data {data} --size toy --image_size 64 --batch 8 --max_steps 1 --epochs 1 --workers 0 --method logit "
    words += f"--teacher random:toy --teacher_min_ap 0 --pilot 3 --runs {tmp_path / 'runs'} --name r --tracker none"
    r = subprocess.run(
        [sys.executable, "-m", "rtdetr_kd.train_cli", *words.split()], cwd=tmp_path, capture_output=True, timeout=300,
        env=os.environ | dict(PYTHONPATH=str(ROOT), PYTHONIOENCODING="cp1252", OMP_NUM_THREADS="1"))
    assert r.returncode == 0, r.stderr.decode("cp1252")[-2000:]
    assert b"\\u732b\\u03bb" in r.stdout and (tmp_path / "runs/r/metrics.json").exists()


def test_the_same_folder_by_another_way_goes_on(tmp_path, monkeypatch, capsys):
    "Relative, absolute, through a link, and moved; other annotations are another experiment"
    from rtdetr_kd.model.evaluate import coco_ap
    from rtdetr_kd.data.dataset import load_data
    from rtdetr_kd.data.split import ground_truth
    from rtdetr_kd.props import tiny_data
    from rtdetr_kd.train.config import configure
    from rtdetr_kd.train.run import train

    tiny_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    usual = dict(size="toy", image_size=64, batch=8, epochs=1, max_steps=1, workers=0, runs="runs", name="r",
                 tracker="none")
    first = train(configure(data="data", **usual))
    for way in (str(tmp_path / "data"), "./data", "link"):
        assert train(configure(data=way, **usual))["AP"] == first["AP"]
    kept = coco_ap(ground_truth(load_data("data")["val"]), "runs/r/predictions.json")
    assert kept == {k: first[k] for k in kept}  # to the last digit
    (tmp_path / "data").rename(tmp_path / "moved")
    train(configure(data="moved", **usual))
    f = tmp_path / "moved/annotations/instances_val.json"
    f.write_text(f.read_text() + " ")
    with pytest.raises(ValueError, match="another file as data:val"):
        train(configure(data="moved", **usual))


def test_nothing_written_is_one_sentence(tmp_path):
    "A place for runs that is none, and papermill's short command where nothing can be written"
    from rtdetr_kd.study.papermill import changed_texts, writable

    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="-p runs"):
        writable(tmp_path / "file/runs")
    words = f"--size toy --epochs 1 --runs {tmp_path / 'file'} --name r --tracker none"
    r = subprocess.run([sys.executable, "-m", "rtdetr_kd.train_cli", *words.split()], text=True, capture_output=True,
                       timeout=300, cwd=ROOT, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert r.returncode == 1 and "Traceback" not in r.stderr, r.stderr[-1500:]
    assert changed_texts("-p name 007".split()) and not changed_texts("-p name run7".split())


def test_one_lowest_score():
    "Whoever names no threshold gets the same one everywhere"
    import inspect, re

    from rtdetr_kd.data.finding import LOWEST_SCORE
    from rtdetr_kd.model.detector import RTDETR
    from rtdetr_kd.serve.app import create_app
    from rtdetr_kd.serve.main import arguments
    from rtdetr_kd.train.run import beside_truth

    default = lambda f: inspect.signature(f).parameters["threshold"].default
    page = (ROOT / "rtdetr_kd/serve/page.html").read_text()
    cell = (ROOT / "nbs/attention.ipynb").read_text()
    values = [default(RTDETR.detect), default(create_app), default(beside_truth), arguments([]).threshold,
              float(re.search(r'id="t".*?value="([\d.]+)"', page)[1]),
              float(re.search(r"threshold: float = ([\d.]+)", cell)[1])]
    assert set(values) == {LOWEST_SCORE} == {0.5}


def test_a_report_without_splits_shows_no_empty_table(tmp_path):
    from rtdetr_kd.data import check

    (tmp_path / "notes.txt").write_text("")
    said = repr(check(tmp_path))
    assert "this has to be repaired" in said and "no annotations" in said and "Empty DataFrame" not in said
