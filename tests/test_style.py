"What CONTRIBUTING asks of notebooks and code, measured by tests/style.py"

import base64, json
from statistics import median

import pytest
from conftest import ROOT
from style import (
    body_lines,
    LONGEST_LINE,
    MEDIAN_CELL,
    bare_sections,
    chains,
    measured,
    notebooks,
    room_of,
    source,
    too_long,
    undocumented,
)

HEAVY = 150_000  # bytes of a picture
ROOMS = measured(ROOT)


@pytest.mark.parametrize("room", ROOMS)
def test_cells_are_short(room):
    r = ROOMS[room]
    assert r["over"] == 0, "an exported cell of over forty lines that is no table of settings"
    assert median(r["lines"] or [0]) <= MEDIAN_CELL


@pytest.mark.parametrize("room", ROOMS)
def test_one_idea_a_line(room):
    assert ROOMS[room]["chains"] == 0, "statements chained by ';'"


@pytest.mark.parametrize("room", ROOMS)
def test_every_parameter_has_a_meaning(room):
    assert ROOMS[room]["parameters"] == 0, "python tests/style.py --which names them"


@pytest.mark.parametrize("room", ROOMS)
def test_most_sections_show_something(room):
    r = ROOMS[room]
    assert r["bare"] <= r["sections"] / 2, (
        f"{r['bare']} of {r['sections']} sections have neither picture nor drawing nor table"
    )


@pytest.mark.parametrize(
    "path",
    [*notebooks(ROOT), *sorted(p for d in ("tests", "bench", "docs") for p in (ROOT / d).rglob("*.py"))],
    ids=lambda p: p.relative_to(ROOT).as_posix(),
)
def test_lines_are_at_most_120_characters(path):
    "The package is made from the notebooks' cells"
    text = path.read_text(encoding="utf-8")
    code = (
        [text] if path.suffix == ".py" else [source(c) for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    )
    assert not sum(map(too_long, code)), [l[:80] for s in code for l in s.splitlines() if len(l) > LONGEST_LINE][:3]


@pytest.mark.parametrize("path", notebooks(ROOT), ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_no_picture_is_heavy(path):
    for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for o in c.get("outputs", []):
            for kind, v in o.get("data", {}).items():
                if kind.startswith("image/p") or kind == "image/jpeg":
                    size = len(base64.b64decode("".join(v)))
                    assert size <= HEAVY, (
                        f"{size // 1000} kB in cell {c['id']}: python tests/outputs.py makes it lighter"
                    )


def test_the_measures_measure():
    "Each of them finds the fault that it is for"
    assert chains("a = 1; b = 2\nplt.show();") == 1 and chains("'a; b'") == 0
    assert body_lines("#| export\ndef f(\n    x,  # a number\n    y=2,  # another\n):\n    return x") == 3
    assert undocumented("def f(\n    x,  # a number\n    y,\n): pass") == ["f(y)"]
    assert undocumented("def f(x): pass") == ["f(x)"] and undocumented("def _f(x): pass") == []
    cell = lambda kind, s: dict(cell_type=kind, source=s, outputs=[])
    cells = [
        cell("markdown", "# T"),
        cell("markdown", "## A"),
        cell("markdown", "| a |\n|---|"),
        cell("markdown", "## B"),
        cell("code", "1"),
    ]
    assert bare_sections(cells) == (2, 1)
    assert too_long("x" * 121) == 1 and too_long("x" * 120) == 0
    assert room_of(ROOT / "nbs/data/00_boxes.ipynb", ROOT) == "data"
