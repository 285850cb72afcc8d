"The house: rooms, doors between them, and the short names that people use"

import importlib, re, subprocess, sys
from pathlib import Path

import pytest

from rtdetr_kd.names import PUBLIC, ROOMS, SHORT, doors, imports_of, modules

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rtdetr_kd"
MODULES = modules(PACKAGE)
DOORS = list(doors(PACKAGE))


def notebook_of(module: str) -> str:
    return re.search(r"File to edit: (?:\.\./)+nbs/(\S+)\.ipynb", MODULES[module].read_text(encoding="utf-8"))[1]


def order(module: str) -> tuple:
    "Place in the order of reading: the room, then the number of the notebook in it"
    if module == "names":
        return -1, ""  # known to all
    if module == "props":
        return len(ROOMS), ""  # knows all
    return ROOMS.index(module.split(".")[0]), notebook_of(module)


@pytest.mark.parametrize("module", MODULES)
def test_imports_come_from_rooms_and_notebooks_before(module):
    late = [b for a, b in DOORS if a == module and order(b) >= order(a)]
    told = ", ".join(f"{b} ({notebook_of(b)})" for b in late)
    assert not late, f"rtdetr_kd.{module} ({notebook_of(module)}) imports {told}, which come later"


@pytest.mark.parametrize(
    "code",
    [
        "from ..study.grid import GRID",
        "def f():\n from rtdetr_kd.study.grid import GRID",
        "importlib.import_module('rtdetr_kd.study.grid')",
        "P = 'import rtdetr_kd.study.grid as g; print(g)'",
        "from ..study import grid",
    ],
)
def test_a_door_into_a_later_room_is_seen(code):
    assert imports_of(code, "data.boxes", MODULES) == {"study.grid"} and order("study.grid") > order("data.boxes")


@pytest.mark.parametrize("short", SHORT)
def test_a_short_name_is_the_module(short):
    if short == "serve_ray":
        pytest.importorskip("ray")
    real, *others = (importlib.import_module(f"rtdetr_kd.{m}") for m in SHORT[short].split())
    offered = importlib.import_module(f"rtdetr_kd.{short}")
    assert offered is real
    for m in others:
        for name in m.__all__:
            assert getattr(offered, name) is getattr(m, name)


def test_every_file_of_the_package_is_a_notebook_s_or_a_door():
    "Nothing is written by hand but the doors: their whole text is known"
    for p in PACKAGE.rglob("*.py"):
        at, text = ".".join(p.relative_to(PACKAGE).with_suffix("").parts), p.read_text(encoding="utf-8")
        if at in MODULES or p.name == "_modidx.py" or at == "__init__":
            continue
        room = p.parent.name
        if p.name == "__init__.py":
            assert text.endswith(f'__getattr__, __dir__, __all__ = offered("{room}")\n') and room in PUBLIC, p
        elif p.name == "__main__.py":
            name = "rtdetr_kd" if p.parent == PACKAGE else f"rtdetr_kd.{room}"
            assert text.startswith(f'"""`python -m {name}`"""\n') and len(text.splitlines()) == 4, p
        else:
            assert text.endswith(f'stand_for(__name__, "{at}")\n') and at in SHORT, p


def test_every_module_has_its_notebook():
    "nbdev leaves the module of a deleted notebook on disk"
    for m in MODULES:
        assert (ROOT / f"nbs/{notebook_of(m)}.ipynb").is_file(), f"rtdetr_kd.{m} has no notebook: git rm it"


def test_a_room_has_each_number_once():
    "The numbers are the order of reading: none twice, none left out"
    for room in {f.parent for f in (ROOT / "nbs").glob("*/[0-9][0-9]_*.ipynb")}:
        numbers = sorted(int(f.name[:2]) for f in room.glob("[0-9][0-9]_*.ipynb"))
        assert numbers == list(range(len(numbers))), room.name


@pytest.mark.parametrize("room", PUBLIC)
def test_a_room_offers_what_it_lists(room):
    m = importlib.import_module(f"rtdetr_kd.{room}")
    for name in m.__all__:
        assert getattr(m, name) is not None
    assert not {f.stem for f in (PACKAGE / room).glob("*.py")} & set(m.__all__), (
        "a module would take the place of a name"
    )


@pytest.mark.parametrize("words", ["train_cli", "download", "serve", "results", "matches", "study", "paper"])
def test_commands_are_where_they_were(words):
    r = subprocess.run(
        [sys.executable, "-m", f"rtdetr_kd.{words}", "--help"], cwd=ROOT, text=True, capture_output=True, timeout=120
    )
    assert r.returncode == 0 and r.stdout.strip(), r.stderr


def test_one_name_has_one_meaning():
    "No public function or class of that name in two modules; a table below lists what may"
    import ast

    homes = {}
    for m, p in MODULES.items():
        for n in ast.parse(p.read_text(encoding="utf-8")).body:
            public = isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not n.name.startswith("_")
            if public and not any("patch" in ast.unparse(d) for d in n.decorator_list):
                homes.setdefault(n.name, []).append(m)
    twice = {k: v for k, v in homes.items() if len(v) > 1 and k not in ("main",)}
    assert not twice, twice
