"The house: rooms, doors between them, and the short names that people use"
import ast, importlib, re, subprocess, sys
from pathlib import Path

import pytest

from rtdetr_kd.names import PUBLIC, SHORT

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rtdetr_kd"
ROOMS = ["files", "data", "model", "distill", "train", "study", "deploy", "serve"]  # each knows only those before it
MODULES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in PACKAGE.rglob("*.py") if "# %% " in p.read_text(encoding="utf-8")}


def notebook_of(module: str) -> str: return re.search(r"File to edit: (?:\.\./)+nbs/(\S+)\.ipynb", MODULES[module].read_text(encoding="utf-8"))[1]


def imports(source: str, module: str) -> set:
    "Every module of the package that a module imports, wherever in it: also in functions, by importlib, and in code kept as text"
    found, room = set(), module.rpartition(".")[0]
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, ast.ImportFrom):
            up = ["rtdetr_kd", *(room.split(".") if room else [])][:len(room.split(".")) + 2 - n.level if room else 1] if n.level else []
            base = ".".join([*up, *([n.module] if n.module else [])])
            found |= {base, *(f"{base}.{a.name}" for a in n.names)}
        elif isinstance(n, ast.Import): found |= {a.name for a in n.names}
        elif isinstance(n, ast.Call) and getattr(n.func, "attr", getattr(n.func, "id", "")) in ("import_module", "__import__", "run_module"):
            found |= {a.value for a in n.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
        elif isinstance(n, ast.Constant) and isinstance(n.value, str):
            found |= set(re.findall(r"(?:from|import) (rtdetr_kd\.[\w.]+)", n.value))
    return {m for f in found if (m := f.removeprefix("rtdetr_kd.")) in MODULES and m != module}


def order(module: str) -> tuple:
    "Place in the order of reading: the room, then the number of the notebook in it"
    if module in ("names", "props"): return (-1 if module == "names" else len(ROOMS), "")  # known to all; knows all
    return ROOMS.index(module.split(".")[0]), notebook_of(module)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_come_from_rooms_and_notebooks_before(module):
    late = [m for m in imports(MODULES[module].read_text(encoding="utf-8"), module) if order(m) >= order(module)]
    assert not late, f"rtdetr_kd.{module} ({notebook_of(module)}) imports {', '.join(f'{m} ({notebook_of(m)})' for m in late)}, which come later"


def test_imports_are_seen_wherever_they_stand():
    code = "def f():\n from ..model.weights import load_model\n import importlib\n importlib.import_module('rtdetr_kd.study.grid')\nC = 'import rtdetr_kd.data.toy as t'"
    assert imports(code, "data.boxes") == {"model.weights", "study.grid", "data.toy"}
    assert imports("from .images import look\nfrom .. import data", "data.boxes") == {"data.images"}


@pytest.mark.parametrize("short", SHORT)
def test_a_short_name_is_the_module(short):
    if short == "serve_ray": pytest.importorskip("ray")
    assert importlib.import_module(f"rtdetr_kd.{short}") is importlib.import_module(f"rtdetr_kd.{SHORT[short]}")


def test_every_file_of_the_package_is_a_notebook_s_or_a_short_name():
    "Nothing is written by hand but the doors: their whole text is known"
    for p in PACKAGE.rglob("*.py"):
        at, text = ".".join(p.relative_to(PACKAGE).with_suffix("").parts), p.read_text(encoding="utf-8")
        if at in MODULES or p.name == "_modidx.py" or at == "__init__": continue
        room = p.parent.name
        if p.name == "__init__.py": assert text.endswith(f'__getattr__, __dir__, __all__ = offered("{room}")\n') and room in PUBLIC, p
        elif p.name == "__main__.py": assert text.startswith(f'"""`python -m rtdetr_kd.{room}`"""\n') and len(text.splitlines()) == 4, p
        else: assert text.endswith(f'stand_for(__name__, "{at}")\n') and at in SHORT, p


@pytest.mark.parametrize("room", PUBLIC)
def test_a_room_offers_what_it_lists(room):
    m = importlib.import_module(f"rtdetr_kd.{room}")
    for name in m.__all__: assert getattr(m, name).__name__ if callable(getattr(m, name)) else getattr(m, name)
    assert not {f.stem for f in (PACKAGE / room).glob("*.py")} & set(m.__all__), "a module would take the place of a name"


@pytest.mark.parametrize("words", ["train_cli", "download", "serve", "results", "matches", "study", "paper"])
def test_commands_are_where_they_were(words):
    r = subprocess.run([sys.executable, "-m", f"rtdetr_kd.{words}", "--help"], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert r.returncode == 0 and r.stdout.strip(), r.stderr
