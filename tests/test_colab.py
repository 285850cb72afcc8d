"colab.ipynb, in its stand-in for COCO and for the GPU"

import json, os, re, subprocess, sys, time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NB = ROOT / "nbs/colab.ipynb"
CELLS = json.loads(NB.read_text())["cells"]
CODE = "\n".join("".join(c["source"]) for c in CELLS if c["cell_type"] == "code")


def run(out, *words, seconds=590, **env):
    exe = Path(sys.executable).with_name("papermill")
    return subprocess.run(
        [exe, "nbs/colab.ipynb", str(out), "--log-output", *map(str, words)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
    )


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
    r = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--dry-run",
            "--no-build-isolation",
            "--no-deps",
            "-q",
            "--report",
            tmp_path / "report.json",
            "-c",
            pins,
            "-e",
            f"{ROOT}[{extra}]",
        ],
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert r.returncode == 0, r.stderr[-800:]
    assert not {i["metadata"]["name"] for i in json.loads((tmp_path / "report.json").read_text())["install"]} & {
        "torch",
        "torchvision",
        "numpy",
    }


def test_without_a_gpu_it_stops_before_any_download(tmp_path):
    r = run(tmp_path / "out.ipynb", CUDA_VISIBLE_DEVICES="")
    assert r.returncode != 0 and "there is no GPU: Runtime" in r.stderr


@pytest.mark.slow
def test_in_a_fresh_environment_the_install_cell_is_enough(tmp_path):
    """Nothing is installed but what Colab has, whose torch stays the same

    Then the notebook's cells run up to its imports and the training step."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "v"], check=True, timeout=120)
    py = tmp_path / "v/bin/python"
    colab = ["torch", "torchvision", "scipy", "matplotlib", "pandas", "ipykernel"]
    subprocess.run([py, "-m", "pip", "install", "-q", *colab], check=True, timeout=1200)
    copy = tmp_path / "rtdetr-kd"
    subprocess.run(["git", "clone", "-q", ROOT, copy], check=True, timeout=120)
    sources = ["".join(c["source"]) for c in CELLS if c["cell_type"] == "code"]
    last = next(k for k, s in enumerate(sources) if "loss.backward()" in s)
    script = "\n\n".join(sources[: last + 1]).replace("stand_in: bool = False", "stand_in: bool = True")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(OMP_NUM_THREADS="1")
    r = subprocess.run([py, "-c", script], cwd=copy, text=True, capture_output=True, timeout=1200, env=env)
    assert r.returncode == 0 and "gradients are finite" in r.stdout, (r.stdout + r.stderr)[-2000:]
    r = subprocess.run([py, "-m", "pip", "check"], text=True, capture_output=True, timeout=120)
    assert r.returncode == 0, r.stdout


def killed_in_the_middle(work):
    """Start it, and kill -9 everything while its first run without distillation is at work

    Gives the runs that were finished by then, and the one that was not."""
    import psutil

    exe = Path(sys.executable).with_name("papermill")
    with open(work / "killed.txt", "w") as log:
        p = psutil.Popen(
            [
                exe,
                "nbs/colab.ipynb",
                work / "killed.ipynb",
                "--log-output",
                "-p",
                "stand_in",
                "True",
                "-p",
                "work",
                work,
            ],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        cut, end = None, time.time() + 590
        while cut is None:
            assert p.poll() is None and time.time() < end, (work / "killed.txt").read_text()[-2000:]
            time.sleep(0.02)
            cut = next(
                (f.parent for f in work.glob("runs/*-none-*/config.json") if not (f.parent / "metrics.json").exists()),
                None,
            )
        for q in [p, *p.children(recursive=True)]:
            q.kill()
        p.wait()
    return {f: f.stat().st_mtime_ns for f in work.glob("runs/*/metrics.json")}, cut


@pytest.mark.slow
def test_after_kill_9_in_the_middle_it_goes_on_to_the_table(tmp_path):
    "As after a disconnect: what is finished is left alone, what was cut off is finished, and the table is there"
    from rtdetr_kd.study.grid import GRID

    done, cut = killed_in_the_middle(tmp_path)
    assert done and not (cut / "metrics.json").exists()
    r = run(tmp_path / "again.ipynb", "-p", "stand_in", "True", "-p", "work", tmp_path)
    assert r.returncode == 0, r.stderr[-2000:]
    said = r.stdout + r.stderr
    assert (
        f"{len(done)} finished" in said
        and said.index("runs to go") < said.index("seed 0: AP")
        and "less_none" in said
        and "{'finished': 4}" in said
    )
    assert re.search(r"\[\d\.\d min\] ", said), "nothing is printed for minutes, and the reader thinks that it hangs"
    assert f"coco30k: {3 * len(GRID)} runs: " in said, "the whole grid is planned, though four of its runs are made"
    assert len([*tmp_path.glob("runs/*/metrics.json")]) == 4 and all(f.stat().st_mtime_ns == t for f, t in done.items())
    attempts = {f.parent: len(f.read_text().splitlines()) for f in tmp_path.glob("runs/*/attempts.txt")}
    assert attempts[cut] == 2 and all(n == 1 for folder, n in attempts.items() if folder != cut)


def write_outputs(work):
    "Run the notebook in its stand-in, and keep what it said in the committed one: `python tests/test_colab.py`"
    r = run(work / "out.ipynb", "-p", "stand_in", "True", "-p", "work", work)
    assert r.returncode == 0, r.stderr[-2000:]
    said = {
        c["id"]: c["outputs"] for c in json.loads((work / "out.ipynb").read_text())["cells"] if c["cell_type"] == "code"
    }
    nb = json.loads(NB.read_text())
    for c in nb["cells"]:
        if c["cell_type"] == "code":
            c["outputs"], c["execution_count"] = (
                [{**o, **({"execution_count": None} if "execution_count" in o else {})} for o in said[c["id"]]],
                None,
            )
    NB.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_outputs(Path(folder))
