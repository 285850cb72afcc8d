"colab.ipynb, in its stand-in for COCO and for the GPU"
import json, os, re, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NB = ROOT / "nbs/colab.ipynb"
CELLS = json.loads(NB.read_text())["cells"]
CODE = "\n".join("".join(c["source"]) for c in CELLS if c["cell_type"] == "code")


def run(out, *words, seconds=590, **env):
    exe = Path(sys.executable).with_name("papermill")
    return subprocess.run([exe, "nbs/colab.ipynb", str(out), "--log-output", *map(str, words)], cwd=ROOT, text=True, capture_output=True, timeout=seconds,
                          stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env})


def test_the_badge_opens_this_notebook():
    text = "".join("".join(c["source"]) for c in CELLS)
    assert "colab.research.google.com/github/rtdetr-kd/rtdetr-kd/blob/main/nbs/colab.ipynb" in text


def test_the_install_line_changes_nothing_that_is_there(tmp_path):
    "The extra exists, and with the versions of this environment pinned pip finds a solution that leaves them alone"
    import tomllib
    from importlib.metadata import version
    extra = re.search(r"\{project\}\[(\w+)\]", CODE)[1]
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = tmp_path / "kept.txt"
    pins.write_text("\n".join(f"{k}=={version(k)}" for k in ("torch", "torchvision", "numpy")))
    r = subprocess.run([sys.executable, "-m", "pip", "install", "--dry-run", "--no-build-isolation", "--no-deps", "-q", "--report", tmp_path / "report.json", "-c", pins, "-e", f"{ROOT}[{extra}]"], text=True, capture_output=True, timeout=300)
    assert r.returncode == 0, r.stderr[-800:]
    assert not {i["metadata"]["name"] for i in json.loads((tmp_path / "report.json").read_text())["install"]} & {"torch", "torchvision", "numpy"}


def test_without_a_gpu_it_stops_before_any_download(tmp_path):
    pytest.importorskip("rtdetr_kd.runner")
    r = run(tmp_path / "out.ipynb", CUDA_VISIBLE_DEVICES="")
    assert r.returncode != 0 and "there is no GPU: Runtime" in r.stderr


@pytest.mark.slow
def test_from_nothing_to_the_table_and_again(tmp_path):
    "All of it; then again, as after a disconnect: nothing is trained twice, and what was cut off goes on"
    pytest.importorskip("rtdetr_kd.runner")
    r = run(tmp_path / "a.ipynb", "-p", "stand_in", "True", "-p", "work", tmp_path)
    assert r.returncode == 0, r.stderr[-2000:]
    said = r.stdout + r.stderr
    assert said.index("runs to go") < said.index("seed 0: AP") and "less_none" in said and "{'finished': 4}" in said
    done = {f: f.stat().st_mtime_ns for f in tmp_path.glob("runs/*/metrics.json")}
    assert len(done) == 4
    cut = next(f for f in done if "none" in f.parent.name and "seed" in f.parent.name)
    cut.unlink()  # as if the runtime had gone just before the end
    r = run(tmp_path / "b.ipynb", "-p", "stand_in", "True", "-p", "work", tmp_path)
    assert r.returncode == 0, r.stderr[-2000:]
    again = {f: f.stat().st_mtime_ns for f in tmp_path.glob("runs/*/metrics.json")}
    assert {f for f in again if again[f] != done.get(f)} == {cut}
