"The notebooks as files: parameters, order of imports, outputs"
import ast, json, re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = sorted((ROOT / "nbs").glob("*.ipynb"))
RUNNABLE = ["train.ipynb", "ablation.ipynb", "export_model.ipynb"]


def cells(path): return json.loads(path.read_text())["cells"]
def code(path): return [c for c in cells(path) if c["cell_type"] == "code"]
def tagged(path): return [c for c in code(path) if "parameters" in c["metadata"].get("tags", [])]


def check_parameters(path):
    "Exactly one cell tagged `parameters`, of literals only, that papermill can read"
    import papermill
    found = tagged(path)
    assert len(found) == 1, f"{path.name}: {len(found)} cells are tagged 'parameters'; without exactly one, papermill silently runs the defaults"
    for node in ast.parse("".join(found[0]["source"])).body:
        assert isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Constant), f"{path.name}: parameters must be plain literals, line {node.lineno} is not"
    assert papermill.inspect_notebook(str(path)), f"{path.name}: papermill finds no parameter"


@pytest.mark.parametrize("name", RUNNABLE)
def test_parameters(name): check_parameters(ROOT / "nbs" / name)


def test_every_setting_is_a_parameter():
    import papermill
    from dataclasses import fields
    from rtdetr_kd.config import Config
    assert set(papermill.inspect_notebook(str(ROOT / "nbs/train.ipynb"))) == {f.name for f in fields(Config)}


@pytest.mark.parametrize("tags", [[], ["parameter"], ["Parameters"]])
def test_a_lost_or_misspelt_tag_is_noticed(tmp_path, tags):
    nb = json.loads((ROOT / "nbs/train.ipynb").read_text())
    for c in nb["cells"]:
        if c["metadata"].get("tags"): c["metadata"]["tags"] = tags
    (tmp_path / "train.ipynb").write_text(json.dumps(nb))
    with pytest.raises(AssertionError, match="silently runs the defaults"): check_parameters(tmp_path / "train.ipynb")


def test_cleaning_keeps_the_tag():
    import configparser
    ini = configparser.ConfigParser(); ini.read(ROOT / "settings.ini")
    assert "tags" in ini["DEFAULT"]["allowed_cell_metadata_keys"].split()


def test_imports_go_to_lower_numbers():
    number = {}
    for path in NBS:
        exp = re.search(r"#\| default_exp (\w+)", "".join("".join(c["source"]) + "\n" for c in code(path)))
        if exp: number[exp[1]] = path.stem
    for module, n in number.items():
        for node in ast.walk(ast.parse((ROOT / f"rtdetr_kd/{module}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("rtdetr_kd")):
                other = (node.module or "").split(".")[-1]
                assert number[other] < n, f"{module} ({n}) imports {other} ({number[other]})"


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_committed_with_outputs_and_without_traces(path):
    text = path.read_text()
    assert any(c["outputs"] for c in code(path)), "readers see no picture: run the notebook before committing"
    assert not re.search(r"/(root|home|Users|tmp)/\w", text), "a path of one machine"
    assert not any(o.get("output_type") == "error" for c in code(path) for o in c["outputs"]), "a committed error"
