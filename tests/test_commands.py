"The commands as people type them, in a real process"

import json, os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def papermill(*words, **env):
    exe = Path(sys.executable).with_name("papermill")
    return subprocess.run(
        [exe, *map(str, words)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=500,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **env},
    )


@pytest.mark.parametrize(
    "words, says",
    [
        ("-p metod query", ["no setting 'metod'", "did you mean 'method'"]),
        pytest.param("-p method qury", ["method='qury'", "none, logit, boxes, feature, cwd, pkd, mgd, query",
                                        "did you mean 'query'"], marks=pytest.mark.slow),
        pytest.param("-p epochs abc", ["epochs='abc'", "a whole number"], marks=pytest.mark.slow),
        ("-p data no/such/folder", ["data='no/such/folder'", "no such folder", "'toy', 'coco' or a folder"]),
    ],
)
def test_faults_stop_at_once_with_one_sentence(tmp_path, words, says):
    r = papermill("nbs/train.ipynb", tmp_path / "out.ipynb", *words.split(), "-p", "runs", tmp_path)
    assert r.returncode != 0
    for s in says:
        assert s in r.stderr
    assert "Traceback" not in r.stderr.split("PapermillExecutionError")[-1]
    assert not list(tmp_path.glob("*/metrics.json"))


def test_the_main_job(tmp_path, tiny):
    "A student of the shipped teacher, end to end, on a few scenes"
    words = (
        f"-p data {tiny} -p size toy -p method query -p teacher {ROOT}/weights/toy_teacher.safetensors -p epochs 2 "
        f"-p batch 8 -p image_size 64 -p kd_points 10 -p name main -p runs {tmp_path}"
    )
    r = papermill("nbs/train.ipynb", tmp_path / "out.ipynb", *words.split(), "--log-output")
    assert r.returncode == 0, r.stderr[-2000:]
    run = tmp_path / "main"
    metrics, log = (
        json.loads((run / "metrics.json").read_text()),
        [json.loads(l) for l in (run / "log.jsonl").read_text().splitlines()],
    )
    assert metrics["method"] == "query" and metrics["teacher"]["source"] == "toy_teacher.safetensors" and len(log) == 2
    assert all(log[0][k] > 0 for k in ("kd_score", "kd_box", "kd_query", "kd_attention"))
    assert json.loads((run / "predictions.json").read_text()) and not (run / "last").exists()
    assert "ETA" in r.stdout + r.stderr and "select: AP" in r.stdout + r.stderr


@pytest.mark.parametrize("stdin", ["null", "pipe"])
def test_no_output_path(tmp_path, stdin):
    "`papermill nbs/train.ipynb` as typed: an output in runs/, the source untouched, also when stdin is a pipe"
    root = tmp_path / "project"
    (root / "nbs").mkdir(parents=True)
    (root / "settings.ini").write_text("lib_name = rtdetr_kd")
    nb = dict(
        nbformat=4,
        nbformat_minor=5,
        metadata=dict(kernelspec=dict(name="python3", display_name="p", language="python")),
        cells=[
            dict(
                cell_type="code",
                id="a",
                metadata=dict(tags=["parameters"]),
                source="method = 'none'",
                outputs=[],
                execution_count=None,
            ),
            dict(
                cell_type="code",
                id="b",
                metadata={},
                source="print('method is', method)",
                outputs=[],
                execution_count=None,
            ),
        ],
    )
    src = root / "nbs/train.ipynb"
    src.write_text(json.dumps(nb))
    before = src.read_text()
    kw = dict(input="") if stdin == "pipe" else dict(stdin=subprocess.DEVNULL)
    r = subprocess.run(
        [Path(sys.executable).with_name("papermill"), "nbs/train.ipynb", "-p", "method", "query"],
        cwd=root,
        text=True,
        capture_output=True,
        timeout=120,
        **kw,
    )
    assert r.returncode == 0, r.stderr
    assert "method is query" in (root / "runs/train-method=query.ipynb").read_text() and src.read_text() == before
    assert "method is query" in r.stdout + r.stderr
