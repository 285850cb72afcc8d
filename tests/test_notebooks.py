"The notebooks as files: parameters, order of imports, outputs"

import ast, json, os, re, subprocess, sys, time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
RUNNABLE = [p.name for p in NBS if p.parent.name == "nbs" and '"parameters"' in p.read_text()]


def cells(path):
    return json.loads(path.read_text())["cells"]


def code(path):
    return [c for c in cells(path) if c["cell_type"] == "code"]


def tagged(path):
    return [c for c in code(path) if "parameters" in c["metadata"].get("tags", [])]


def check_parameters(path):
    "Exactly one cell tagged `parameters`, of literals only, that papermill can read"
    import papermill

    found = tagged(path)
    assert len(found) == 1, (
        f"{path.name}: {len(found)} cells are tagged 'parameters'; "
        "without exactly one, papermill silently runs the defaults"
    )
    for node in ast.parse("".join(found[0]["source"])).body:
        assert isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Constant), (
            f"{path.name}: parameters must be plain literals, line {node.lineno} is not"
        )
    assert papermill.inspect_notebook(str(path)), f"{path.name}: papermill finds no parameter"


@pytest.mark.parametrize("name", RUNNABLE)
def test_parameters(name):
    check_parameters(ROOT / "nbs" / name)


def test_the_runnable_notebooks_are_found():
    assert {"train.ipynb", "attention.ipynb", "colab.ipynb"} <= set(RUNNABLE)


@pytest.mark.parametrize(
    "name",
    [
        "attention.ipynb",
        *(pytest.param(n, marks=pytest.mark.slow) for n in RUNNABLE if n not in ("attention.ipynb", "train.ipynb")),
    ],
)
def test_an_unknown_parameter_stops_the_notebook(name, tmp_path):
    "Papermill only warns of a misspelt parameter, and runs the defaults; for train.ipynb it is in test_commands"
    r = papermill(f"nbs/{name}", tmp_path / "o.ipynb", "-p", "tpyo", "1")
    assert r.returncode != 0 and "tpyo" in r.stderr and "Traceback" not in r.stderr.split("PapermillExecutionError")[-1]


def papermill(*words):
    return subprocess.run(
        [Path(sys.executable).with_name("papermill"), *map(str, words)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_killed_kernel_ends_papermill_and_leaves_a_notebook(tmp_path):
    "Papermill notes every cell of a dead kernel as completed"
    cell = lambda i, s: dict(cell_type="code", id=i, metadata={}, source=s, outputs=[], execution_count=None)
    nb = dict(
        nbformat=4,
        nbformat_minor=5,
        metadata=dict(kernelspec=dict(name="python3", display_name="p", language="python")),
        cells=[cell("a", "print('before')"), cell("b", "import os; os.kill(os.getpid(), 9)")],
    )
    (tmp_path / "k.ipynb").write_text(json.dumps(nb))
    start = time.time()
    r = papermill(tmp_path / "k.ipynb", tmp_path / "o.ipynb")
    assert r.returncode != 0 and time.time() - start < 200 and "before" in (tmp_path / "o.ipynb").read_text()


def test_imports_of_exported_cells_are_absolute():
    "A relative import works in the package and fails in the notebook"
    for path in NBS:
        for c in code(path):
            src = "".join(c["source"])
            if re.match(r"#\| exports?\b", src):
                assert not re.search(r"^\s*from \.", src, re.M), path.name


def test_every_public_name_is_there():
    "`from rtdetr_kd.x import *` works for every module whose dependencies are here"
    import importlib

    for f in sorted((ROOT / "rtdetr_kd").rglob("[a-z]*.py")):
        name = ".".join(f.relative_to(ROOT).with_suffix("").parts)
        try:
            m = importlib.import_module(name)
        except ImportError as e:
            assert "rtdetr_kd" not in str(e), f"{f.stem}: {e}"
            continue
        assert not [n for n in getattr(m, "__all__", []) if not hasattr(m, n)], f.stem


def test_nothing_of_a_merge_is_left():
    "Marks of a conflict; that the package equals the notebooks is tests/all.sh's first check"
    for f in [*NBS, *(ROOT / "rtdetr_kd").rglob("*.py")]:
        assert not re.search(r"^(<{7}|>{7}) ", f.read_text(), re.M), f.name


def test_every_setting_is_a_parameter():
    import papermill
    from dataclasses import fields
    from rtdetr_kd.train.config import Config

    assert set(papermill.inspect_notebook(str(ROOT / "nbs/train.ipynb"))) == {f.name for f in fields(Config)}


@pytest.mark.parametrize("tags", [[], ["parameter"], ["Parameters"]])
def test_a_lost_or_misspelt_tag_is_noticed(tmp_path, tags):
    nb = json.loads((ROOT / "nbs/train.ipynb").read_text())
    for c in nb["cells"]:
        if c["metadata"].get("tags"):
            c["metadata"]["tags"] = tags
    (tmp_path / "train.ipynb").write_text(json.dumps(nb))
    with pytest.raises(AssertionError, match="silently runs the defaults"):
        check_parameters(tmp_path / "train.ipynb")


def test_cleaning_keeps_the_tag():
    import configparser

    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    assert "tags" in ini["DEFAULT"]["allowed_cell_metadata_keys"].split()


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.relative_to(ROOT / "nbs").with_suffix("").as_posix())
def test_committed_with_outputs_and_without_traces(path):
    text = path.read_text()
    assert any(c["outputs"] for c in code(path)), "readers see no picture: run the notebook before committing"
    assert not re.search(r"/(root|home|Users|tmp)/\w|(?<![\w.}])/work/\w", text), "a path of one machine"
    assert "jupyter.widget-" not in text, "a widget, for which a page would load a script from the network"
    shown = json.dumps(
        [
            {k: v for k, v in o.items() if k != "data"}
            | dict(data={k: v for k, v in o.get("data", {}).items() if not k.startswith("image/")})
            for c in code(path)
            for o in c["outputs"]
        ]
    )
    told = re.search(r"(?<![\w.])/work\b|site-packages|\.venv/", shown)
    assert not told, f"an output tells of one machine: …{shown[max(0, told.start() - 60) : told.end() + 60]}"
    assert not any(o.get("output_type") == "error" for c in code(path) for o in c["outputs"]), "a committed error"
