"A notebook whose parameters are edited by hand and that is run again in the same kernel"

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
