"The study: AP from kept matches, intervals that hold, a grid that ends, a paper that agrees with its results"
import json, os, shutil, signal, subprocess, sys, threading, time
from pathlib import Path

import numpy as np
import pytest

from rtdetr_kd.study import grid, runner
from rtdetr_kd.train.config import configure
from rtdetr_kd.model.evaluate import coco_ap
from rtdetr_kd.study.matches import NAMES, draws, figures, load, matches_of, packed_matches, resampled, unpacked_matches
from rtdetr_kd.study.records import log_of, match_bytes, names_in, put_line, put_member, record, records, runs_of_study

ROOT = Path(__file__).resolve().parent.parent


# AP from matches

def scenes(seed, images=14, classes=3, scores=8):
    "Random truth and detections: crowds, equal scores, ignored sizes, a class without objects"
    rng = np.random.default_rng(seed)
    anns = [
        dict(id=k, image_id=int(rng.integers(images)), category_id=int(rng.integers(classes - 1)),
             iscrowd=int(rng.random() < .1),
             bbox=[*map(float, rng.uniform(0, 60, 2)), *map(float, rng.lognormal(3.4, .8, 2))]) for k in range(50)
    ]
    for a in anns: a["area"] = a["bbox"][2] * a["bbox"][3]
    near = [
        dict(image_id=a["image_id"], category_id=a["category_id"],
             bbox=[v + float(rng.normal(0, 3))
                   for v in a["bbox"]], score=float(rng.integers(scores)) / scores)
        for a in anns
        for _ in range(2)
    ]
    for x in near: x["bbox"][2:] = [max(v, 1.) for v in x["bbox"][2:]]
    far = [
        dict(image_id=int(rng.integers(images)), category_id=int(rng.integers(classes)),
             bbox=[*map(float, rng.uniform(0, 80, 2)), 20., 30.], score=float(rng.integers(scores)) / scores)
        for _ in range(120)
    ]
    return dict(images=[dict(id=k) for k in range(images)], categories=[dict(id=k) for k in range(classes)],
                annotations=anns), near + far


@pytest.mark.parametrize("seed", range(6))
def test_ap_from_matches_is_coco_ap_to_the_last_digit(seed):
    gt, found = scenes(seed)
    m = matches_of(gt, found)
    want = coco_ap(gt, found)
    assert figures(m) == figures(unpacked_matches(packed_matches(m))) == {k: want[k] for k in NAMES}


@pytest.mark.parametrize("seed", range(4))
def test_a_resample_is_the_data_set_with_repeated_images(seed):
    gt, found = scenes(seed, scores=10**6)
    w = draws(14, 3, seed)
    copies = lambda rows, n: [
        x | dict(image_id=100 * (x["image_id"] + 1) + r) for x in rows for r in range(n[x["image_id"]])
    ]
    fast = resampled(matches_of(gt, found), w)
    for n, row in zip(w, fast):
        anns = [a | dict(id=k + 1) for k, a in enumerate(copies(gt["annotations"], n))]
        again = gt | dict(images=[dict(id=100 * (i + 1) + r) for i in range(14) for r in range(n[i])], annotations=anns)
        want = coco_ap(again, copies(found, n))
        assert {k: v for k, v in want.items() if k in NAMES} == figures(matches_of(gt, found), n)
        for k, v in zip(NAMES, row): assert (want[k] is None and v != v) or abs(want[k] - v) < 1e-12, k


@pytest.mark.parametrize("run", ["toy-none", "toy-query+cwd-seed=3"])
def test_published_matches_give_the_published_ap(run):
    m = record(run)["metrics"]
    assert {k: m[k] for k in NAMES} == figures(load(run))


# Statistics

def coverage(rng, seeds, sd, studies, images=50, n=100):
    "Share of simulated studies whose interval contains the truth, with a mean over images in the place of AP"
    from rtdetr_kd.study.statistics import interval
    held = 0
    for _ in range(studies):
        x = rng.normal(0, sd[0], seeds) + rng.normal(0, sd[1], (images, 1)) + rng.normal(0, sd[2],
                                                                                         (images, seeds))  # (i,s)
        low, high = interval(x.mean(0), draws(images, n, int(rng.integers(2**31))) @ x / images)
        held += low <= 0 <= high
    return held / studies


@pytest.mark.parametrize("seeds, sd", [(6, (1, .3, .3)), (6, (1, 1, 1)), (3, (1, .3, .3))])
def test_coverage_of_the_interval(seeds, sd):
    assert .93 <= coverage(np.random.default_rng(1), seeds, sd, 1200) <= .97


def test_the_percentiles_would_not_have_done():
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        x = rng.normal(0, 1, 3)
        low, high = np.quantile(x[rng.integers(0, 3, (300, 3))].mean(1), [.025, .975])
        held += low <= 0 <= high
    assert held / 400 < .88


def test_one_seed_is_not_ranked_and_no_seed_in_common_is_refused():
    import pandas as pd
    from rtdetr_kd.study.statistics import compare
    runs = pd.DataFrame([
        dict(variant=v, seed=s, AP=.5 + s + (v == "a"), draws=np.full((9, 1), .5))
        for v, s in (("a", 0), ("b", 0), ("c", 1))
    ])
    assert compare(runs, [("a", "b")]).verdict.tolist() == ["one seed: not ranked"]
    with pytest.raises(ValueError, match="no seed in common"): compare(runs, [("a", "c")])


def test_the_study_asks_what_the_published_runs_can_answer():
    from rtdetr_kd.study.tables import comparisons, questions
    c, runs = comparisons(), runs_of_study()
    assert sorted(zip(c.variant,
                      c.control)) == sorted(questions(runs)), "runs were published since: python -m rtdetr_kd.study"
    seeds = {v: {*r.seed} for v, r in runs.groupby("variant")}
    assert all(r.n == len(seeds[r.variant] & seeds[r.control]) for r in c.itertuples())


def test_a_kept_comparison_is_computed_again():
    from rtdetr_kd.study.statistics import compare, with_draws
    from rtdetr_kd.study.tables import comparisons
    runs = runs_of_study()
    now = compare(with_draws(runs[runs.variant.isin(["cwd", "none"])], 1000), [("cwd", "none")]).iloc[0]
    kept = comparisons().query("variant == 'cwd' and control == 'none'").iloc[0]
    for k in ("n", "gain", "low", "high", "p"): assert abs(now[k] - kept[k]) < 2e-6, k


# Published records

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "Two configurations of the study with two seeds each, and what they give"
    from rtdetr_kd.study.tables import compute_study
    folder = tmp_path_factory.mktemp("published")
    runs = runs_of_study()
    for name in runs[runs.variant.isin(["none", "cwd"]) & (runs.seed < 2)].run:
        put_line(folder / "runs.jsonl", record(name))
        put_member(folder / "matches.tar", f"{name}.npz.xz", match_bytes(name))
    (folder / "study.json").write_text(json.dumps(compute_study(30, folder)))
    return folder


def refused(folder, says):
    from rtdetr_kd.study.tables import recomputed
    with pytest.raises(ValueError, match=says): recomputed(folder)


def test_results_that_follow_from_the_runs_pass(small):
    from rtdetr_kd.study.tables import recomputed
    recomputed(small)


def leaves(v, path=()):
    "Every cell of nested dicts and lists: its place and its value"
    inner = v.items() if isinstance(v, dict) else enumerate(v) if isinstance(v, list) else None
    return [(path, v)] if inner is None else [x for k, w in inner for x in leaves(w, (*path, k))]


def test_every_falsified_cell_of_the_study_is_found(small):
    from rtdetr_kd.study.tables import changed_cells
    study = json.loads((small / "study.json").read_text())
    for path, v in leaves(study):
        other = json.loads(json.dumps(study))
        at = other
        for k in path[:-1]: at = at[k]
        at[path[-1]] = v + 1e-5 if isinstance(v, float) else v + 1 if isinstance(v, int) else f"{v}!"
        assert len(changed_cells(other, study)) == 1, path


@pytest.mark.parametrize("row, key, value", [("comparisons", "gain", .2), ("comparisons", "verdict", "better"),
                                             ("sizes", "low", .1), ("table", "AP", "0.900 ± 0.001")])
def test_a_falsified_study_is_refused(small, tmp_path, row, key, value):
    shutil.copytree(small, tmp_path / "p")
    study = json.loads((small / "study.json").read_text())
    study[row][0][key] = value
    (tmp_path / "p/study.json").write_text(json.dumps(study))
    refused(tmp_path / "p", f"study.json, {row}, row 1, {key}")


@pytest.mark.parametrize("figure", ["AP", "AP75", "APs"])
def test_a_changed_metric_is_refused(small, tmp_path, figure):
    shutil.copytree(small, tmp_path / "p")
    r = record("toy-cwd", small)
    put_line(tmp_path / "p/runs.jsonl", r | dict(metrics=r["metrics"] | {figure: r["metrics"][figure] + 1e-6}))
    refused(tmp_path / "p", f"toy-cwd: {figure} is")


def test_a_changed_match_is_refused(small, tmp_path):
    shutil.copytree(small, tmp_path / "p")
    m = load("toy-cwd", small)
    k = np.flatnonzero(m.right[:, 0].any(1))[40]
    m.right[k], m.wrong[k] = False, True  # one detection that was right is called wrong
    put_member(tmp_path / "p/matches.tar", "toy-cwd.npz.xz", packed_matches(m))
    refused(tmp_path / "p", "toy-cwd: AP is .* by its matches")


def test_the_archive_is_the_same_whatever_the_order(small, tmp_path):
    names = names_in(small / "matches.tar")
    for name in reversed(names): put_member(tmp_path / "m.tar", name, match_bytes(name.removesuffix(".npz.xz"), small))
    assert (tmp_path / "m.tar").read_bytes() == (small / "matches.tar").read_bytes()


def test_every_published_run_says_where_it_comes_from():
    fields = {"run", "commit", "date", "processor", "versions", "data_fingerprint", "cost", "config", "metrics"}
    for r in records():
        assert set(r) == fields and set(r["cost"]) == {"seconds", "images"
                                                       } and r["commit"] and r["date"] and r["versions"]
        assert (r["cost"]["images"] is not None) == (r["config"]["method"] == "none" or "cost" in r["metrics"])
        assert not any(str(r["config"][k]).startswith(("/", "~")) for k in ("data", "teacher", "init", "runs"))
    assert len({r["run"] for r in records()}) == len(records()) and all(log_of(r["run"]) for r in records())


# The grid

STUB = """import json, os, time
from pathlib import Path
here = Path(runs) / name
(here / "last").mkdir(parents=True, exist_ok=True)
print("method", method, "seed", seed, flush=True)
if method == "cwd": raise ValueError("this one never works")
if method == "mgd": os.kill(os.getpid(), 9)
if slow and not (here / "last" / "state").exists():
    (here / "last" / "state").write_text("half")
    time.sleep(60)
seconds = 10. * (2 if method == "query" else 1)
figures = dict(AP=.5, train_seconds=seconds, lam=1.5, seed=seed, given=dict(lam=lam, epochs=epochs))
(here / "metrics.json").write_text(json.dumps(figures))
"""


@pytest.fixture
def stub(tmp_path):
    "A notebook that stands for train.ipynb: quick, failing, dying or slow, by its parameters"
    import nbformat
    (tmp_path / "nbs").mkdir()
    names = ("method seed runs name lam epochs teacher shuffle_teacher data logit_mode alignment stage_shape "
             "rho slow").split(
    )
    cells = [
        nbformat.v4.new_code_cell("\n".join(f"{n} = None" for n in names), metadata=dict(tags=["parameters"])),
        nbformat.v4.new_code_cell(STUB)
    ]
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python"))),
        tmp_path / "nbs/train.ipynb")
    return tmp_path / "nbs/train.ipynb"


def test_a_failed_and_a_killed_run_do_not_stop_the_others(stub, tmp_path, monkeypatch, capsys):
    launch = runner.launch
    monkeypatch.setattr(runner, "launch", lambda s, f, threads=0: launch(s, f, threads, stub))
    go = lambda: runner.ablation("toy", "none,none longer,cwd,cwd untrained,mgd,query", 1, str(tmp_path / "runs"),
                                 workers=3).set_index("configuration").state
    state, said = go(), capsys.readouterr().out
    with pytest.raises(RuntimeError, match="3 of 6 runs are not finished"):
        runner.refuse_failed(state.reset_index())  # what makes the command fail
    assert [state[k] for k in ("none", "none longer", "query")] == ["finished"] * 3
    assert "this one never works" in state["cwd"] and state["cwd untrained"] == "waits for cwd" and "died" in state[
        "mgd"].lower()
    assert "3 of 6 runs are finished" in said and "cwd, seed 0: failed" in said
    m = json.loads(
        (tmp_path / "runs/toy-none-epochs=8/metrics.json").read_text())  # twice as long: what the price of query buys
    assert m["given"]["epochs"] == 8
    tries = lambda name: len((tmp_path / f"runs/{name}/attempts.txt").read_text().splitlines())
    state = go()
    assert (tries("toy-none"), tries("toy-mgd")) == (1, 2), "finished runs are skipped, others tried again"


def test_names_duplicates_and_settings_are_refused(tmp_path):
    for kw, says in [(dict(study="toi"), "did you mean 'toy'"), (dict(names="none,qwery"), "did you mean 'query'"),
                     (dict(settings="epoch=3"), "did you mean 'epochs'"),
                     (dict(names="cwd untrained"), "add that to names"), (dict(names="none,none"), "comes twice"),
                     (dict(names="a,b", grid=dict(a=dict(method="cwd"), b=dict(method="cwd",
                                                                               rho=.5))), "are the same run")]:
        with pytest.raises(ValueError, match=says): grid.plan(**dict(study="toy", runs=str(tmp_path)) | kw)


def test_every_preset_plans(tmp_path):
    for study, n in (("toy", 6 * len(grid.GRID)), ("coco30k", 3 * len(grid.GRID)), ("final", 12)):
        assert len(grid.plan(study, runs=str(tmp_path))) == n
    assert "7.20 at 1.2" in grid.estimate(grid.plan("toy", "none,query", 3, str(tmp_path)), 1, 3600 * 300, 300, 1.2)


@pytest.mark.slow
def test_ablation_as_a_notebook(tiny, tmp_path):
    "One real run of train.ipynb, and the same command again"
    words = f"-p preset toy -p names none -p seeds 1 -p runs {tmp_path}"
    more = f"data={tiny} size=toy image_size=64 batch=8 epochs=1 queries=20"
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    for said in ("1 to run", "1 finished"):
        r = subprocess.run([
            sys.executable, "-m", "papermill", "nbs/ablation.ipynb",
            str(tmp_path / "ablation.ipynb"), *words.split(), "-p", "settings", more, "--log-output"
        ], cwd=ROOT, env=env, text=True, capture_output=True)
        told = r.stdout + r.stderr
        assert r.returncode == 0 and said in told and "1 of 1 runs are finished" in told, told[-2000:]


def test_ray_goes_on_when_a_worker_is_killed(stub, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="pip install 'rtdetr_kd[ray]'")
    monkeypatch.setattr(runner, "root", lambda: tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    todo = [grid.Run(m, 0, dict(method=m, slow=m == "query"), [], tmp_path / "runs" / m) for m in ("none", "query")]
    def kill_the_worker():
        while not (tmp_path / "runs/query/last/state").exists(): time.sleep(.1)
        os.kill(int((tmp_path / "runs/query/attempts.txt").read_text().split()[1]), signal.SIGKILL)
    threading.Thread(target=kill_the_worker, daemon=True).start()
    try: outcome = runner.on_ray(todo, str(tmp_path / "runs"), 2, 1)
    finally: ray.shutdown()
    assert outcome == {("none", 0): "finished", ("query", 0): "finished"}
    tries = (tmp_path / "runs/query/attempts.txt").read_text().splitlines()
    assert len(tries) == 2 and len({t.split()[1] for t in tries}) == 2, "another worker took it up"


def test_shuffled_teachers_answer_for_another_image(tiny, tmp_path):
    import torch
    from rtdetr_kd.distill.cache import arrays, gaps, tied
    from rtdetr_kd.learner import Learner
    kw = dict(data=str(tiny), size="toy", image_size=64, batch=4,
              teacher=str(ROOT / "weights/toy_teacher.safetensors"), kd_points=10, workers=0, runs=str(tmp_path),
              method="query", lam="1")
    plain, shuffled = Learner(configure(**kw)), Learner(configure(**kw, shuffle_teacher=True))
    images, targets = plain.on_device(*plain.fixed_batches(1)[0])
    with torch.no_grad(): own, other = (l.distillation.ask(images, targets).answer for l in (plain, shuffled))
    there, here = (arrays(o, plain.method) for o in (other, own))
    for i in range(4):  # cell by cell: at another place of the batch an image may be rounded otherwise
        gap = lambda k: gaps({n: v[i] for n, v in there.items()}, {n: v[k] for n, v in here.items()})
        assert tied(gap(i - 1), 10) and not tied(gap(i), 10)
    with pytest.raises(ValueError, match="no other image"): configure(**kw | dict(batch=1), shuffle_teacher=True)


def test_a_published_run_is_made_again_to_the_last_digit(tiny, tmp_path):
    from rtdetr_kd.study.records import publish
    from rtdetr_kd.study.results import reproduce
    from rtdetr_kd.train.run import train
    kw = dict(data=str(tiny), method="none", size="toy", image_size=64, batch=8, epochs=1, queries=20, workers=0,
              seed=3)
    was = train(configure(**kw, runs=str(tmp_path), name="r"))
    again = reproduce("r", tmp_path / "again", tmp_path)  # from its folder
    assert again["AP"] == was["AP"] and (tmp_path / "again/r/best.safetensors").exists()
    publish(tmp_path / "r", tmp_path / "published")
    r = record("r", tmp_path / "published")
    assert r["metrics"] == was and r["cost"] == was["cost"] and r["commit"] and r["date"]
    assert [row["epoch"] for row in log_of("r", tmp_path / "published")] == [1]
    assert r["config"]["data"] == tiny.name  # no path of this machine
    other = was | dict(select_AP=was["select_AP"] + 1e-9)
    put_line(tmp_path / "published/runs.jsonl", r | dict(metrics=other, config=r["config"] | dict(data=str(tiny))))
    with pytest.raises(ValueError, match="r came out otherwise: select_AP"):
        reproduce("r", tmp_path / "again", tmp_path / "published")


@pytest.mark.slow
def test_a_run_of_the_study_comes_out_the_same_to_the_last_digit(tmp_path):
    from rtdetr_kd.study.results import reproduce
    if record("toy-none")["metrics"]["machine"]["torch"] != __import__("torch").__version__:
        pytest.skip("another torch than the published run's")
    reproduce("toy-none", tmp_path)


# The paper

def test_the_paper_agrees_with_the_results():
    from rtdetr_kd.study.paper import check_paper
    check_paper()


def test_a_paper_that_disagrees_is_refused(tmp_path):
    from rtdetr_kd.study.paper import check_paper
    shutil.copytree(ROOT / "paper", tmp_path / "paper")
    tex, values, table = (tmp_path / "paper" / f
                          for f in ("paper.tex", "generated/values.tex", "generated/methods.csv"))
    def refused(path, old, new, says):
        text = path.read_text()
        assert old in text, old
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=says): check_paper(tmp_path / "paper")
        path.write_text(text)
    refused(values, "val@ap:none\\endcsname{0.", "val@ap:none\\endcsname{1.", "values.tex differs")
    refused(table, "none,6", "none,7", "methods.csv differs")
    refused(tex, "\\section{Limitations}\n", "\\section{Limitations}\nAP rises by 0.123. ", "number typed")
    refused(tex, "\\val{ap:none}", "\\val{ap:nnoe}", "does not exist")
    refused(tex, "%! cwd, none: better", "%! cwd, none: worse", "the result files say 'better'")


def test_without_latex_the_message_says_what_to_install(monkeypatch, tmp_path):
    from rtdetr_kd.study.paper import build_paper
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt-get install latexmk"): build_paper(tmp_path)


def test_every_reference_is_cited_and_every_citation_has_one():
    import re
    tex, bib = (ROOT / "paper" / f for f in ("paper.tex", "refs.bib"))
    cited = {k.strip() for m in re.findall(r"\\cite[pt]?\{([^}]*)\}", tex.read_text()) for k in m.split(",")}
    assert cited == {*re.findall(r"^@\w+\{(\w+),", bib.read_text(), re.M)}


def test_a_control_differs_in_one_thing(tmp_path):
    "Beside what it takes from the run it controls: that run's lambda, and a sum's scales"
    from dataclasses import asdict

    from rtdetr_kd.study.grid import plan
    from rtdetr_kd.train.config import FREE

    names = "query,cwd,query+cwd,inherit,query untrained,cwd untrained,query+cwd untrained,query shuffled,cwd shuffled,"
    names += "query+cwd shuffled,inherit untrained,inherit scrambled"
    runs = plan("toy", names, 1, str(tmp_path))
    for r in [r for r in runs if not r.waits and r.config in ("query", "cwd", "query+cwd")]:
        r.folder.mkdir(parents=True)
        found = dict(lam=0.7, strength=dict(scale=dict(query=3.7, cwd=30.7)), train_seconds=1)
        (r.folder / "metrics.json").write_text(json.dumps(found))
    settings = {r.config: asdict(configure(**r.settings)) for r in plan("toy", names, 1, str(tmp_path))}
    differ = lambda a, b: {k for k in a if a[k] != b[k] and k not in FREE}
    for name, own in settings.items():
        method, _, kind = name.rpartition(" ")
        if kind not in ("untrained", "shuffled", "scrambled"): continue
        one = dict(untrained="inherit" if method == "inherit" else "teacher", shuffled="shuffle_teacher",
                   scrambled="scramble")[kind]
        assert differ(own, settings[method]) - {"lam", "scales"} == {one}, name
        if method != "inherit": assert own["lam"] == "0.7" and bool(own["scales"]) == ("+" in method), name
