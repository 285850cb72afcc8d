"Attention of two networks: maps, agreement, the notebook as it is typed"
import json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def papermill(*words, **env):
    exe = Path(sys.executable).with_name("papermill")
    return subprocess.run([exe, *map(str, words)], cwd=ROOT, text=True, capture_output=True, timeout=500,
                          stdin=subprocess.DEVNULL, env={**os.environ, **env})


@pytest.mark.parametrize("ours, theirs", [("deformable", "dense"), ("dense", "deformable"), ("dense", "dense")])
def test_any_pair_of_decoders_can_be_compared(ours, theirs, tiny):
    from rtdetr_kd.study.attention_study import agreement
    from rtdetr_kd.data.dataset import load_data
    from rtdetr_kd.model.detector import RTDETR, Spec
    from rtdetr_kd.model.sizes import SIZES
    val = load_data(str(tiny))["val"]
    torch.manual_seed(0)
    small = {**SIZES["toy"], "image_size": 64}
    t = RTDETR(Spec(val.names, **small | dict(queries=20, heads=4, layers=3), attention=theirs))
    s = RTDETR(Spec(val.names, **small | dict(queries=12, layers=2), attention=ours))
    found = agreement(t, dict(s=s), val, batch=4, sure=0.)["s"]
    assert set(found.layer) == {1, 2} and (found.layer == 1).sum() == len(val.boxes)
    figures = found.drop(columns=["layer", "image"])
    assert np.isfinite(figures).all().all() and figures.min().min() >= 0 and figures.max().max() <= 1 + 1e-5


def test_the_peak_and_the_mass_follow_the_attention():
    "All weight on one point: the pointing game is decided by where the point is"
    from rtdetr_kd.study.attention_maps import inside, mass, peak
    from rtdetr_kd.distill.features import blur, splat
    box = torch.tensor([[.5, .5, .2, .2]])
    for x, there in ((.5, True), (.8, False)):
        p = torch.tensor([x, .5]).expand(1, 2, 3, 4, 2)
        w = torch.zeros(1, 2, 3, 4); w[..., 0, 0] = 1.
        assert bool(inside(peak(blur(splat(p, w, 20, 20))), box)) is there and float(mass(p, w, box)) == float(there)


def test_published_figures_are_of_the_published_runs():
    from rtdetr_kd.study.attention_study import agreement_runs, measured
    from rtdetr_kd.study.records import record
    m = measured()
    for run, f in m["runs"].items():
        assert record(run)["config"]["data"] == "toy"
        assert 0 < f["cosine"] <= 1 and 0 <= f["pointing_student"] <= 1
    assert len(agreement_runs()) == len(m["runs"]) >= 12 and m["images"] == 800


def test_weights_of_another_run_are_refused(tmp_path):
    from rtdetr_kd.study.attention_study import same_as_published
    (tmp_path / "toy-none").mkdir()
    (tmp_path / "toy-none/metrics.json").write_text(json.dumps(dict(AP=.123)))
    (tmp_path / "toy-none/config.json").write_text("{}")
    with pytest.raises(ValueError, match="these are other weights"): same_as_published(tmp_path / "toy-none")


@pytest.mark.slow
def test_the_notebook_as_it_is_typed(tmp_path):
    "A dense student, untrained, beside the shipped teacher"
    from rtdetr_kd.data.dataset import load_data
    from rtdetr_kd.model.detector import RTDETR, Spec
    from rtdetr_kd.model.sizes import SIZES
    from rtdetr_kd.model.weights import save_model
    torch.manual_seed(0)
    save_model(RTDETR(Spec(load_data("toy")["val"].names, **SIZES["toy"], attention="dense")),
               tmp_path / "dense.safetensors")
    r = papermill("nbs/attention.ipynb", tmp_path / "out.ipynb", "-p", "weights", tmp_path / "dense.safetensors",
                  "-p", "image", ROOT / "figures/scene.jpg", "-p", "heads", "True", "-p", "images", 4, "-p", "out",
                  tmp_path)
    assert r.returncode == 0, r.stderr[-2000:]
    assert {f.suffix
            for f in tmp_path.glob("attention-scene-object=0.*")
            } == {".png", ".pdf"} and (tmp_path / "heads-scene-object=0.png").stat().st_size > 10_000
