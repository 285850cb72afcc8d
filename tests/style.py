"What CONTRIBUTING asks of a notebook, counted: `python tests/style.py [checkout]` prints a table by room"

import ast, io, json, re, sys, tokenize
from pathlib import Path
from statistics import median

PARAMETER = re.compile(r"\s+\*{0,2}\w+(:[^#]*|=[^#]*)?,\s*#")  # of a function, with its comment
LONGEST_LINE, LONGEST_CELL, MEDIAN_CELL = 120, 40, 10


def notebooks(root: Path) -> list:
    "Every notebook below nbs/"
    return sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def room_of(path: Path, root: Path) -> str:
    "The folder below nbs/, or - for those at the top"
    parts = path.relative_to(root / "nbs").parts
    return parts[0] if len(parts) > 1 else "-"


def source(cell: dict) -> str:
    return "".join(cell["source"])


def exported(cells: list) -> list:
    "Sources of the cells that go into the package, but those that only import"
    out = [source(c) for c in cells if c["cell_type"] == "code" and re.match(r"#\|\s*export", source(c))]
    return [s for s in out if not all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(s).body)]


def lines_of(code: str) -> int:
    "Lines with something on them, but the directive"
    return sum(bool(l.strip()) and not l.startswith("#|") for l in code.splitlines())


def body_lines(code: str) -> int:
    "The same without lines that only tell a parameter's meaning"
    return sum(bool(l.strip()) and not l.startswith("#|") and not PARAMETER.match(l) for l in code.splitlines())


def is_table(code: str) -> bool:
    "A table of settings: nothing but assignments, or a class of fields"
    body = ast.parse(code).body
    fields = lambda n: isinstance(n, ast.ClassDef) and all(isinstance(s, (ast.AnnAssign, ast.Expr)) for s in n.body)
    return all(isinstance(n, (ast.Assign, ast.AnnAssign)) or fields(n) for n in body)


def chains(code: str) -> int:
    "Semicolons between two statements; one at the end of a cell only hides a value"
    code = re.sub(r"^\s*[%!].*$", "", code, flags=re.M)
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (tokenize.TokenError, SyntaxError):
        return 0
    ends = (tokenize.NEWLINE, tokenize.COMMENT, tokenize.ENDMARKER, tokenize.NL)
    return sum(
        t.string == ";" and t.type == tokenize.OP and tokens[k + 1].type not in ends for k, t in enumerate(tokens)
    )


def too_long(text: str) -> int:
    return sum(len(l) > LONGEST_LINE for l in text.splitlines())


def comment_lines(code: str) -> set:
    "Lines that have a comment"
    return {t.start[0] for t in tokenize.generate_tokens(io.StringIO(code).readline) if t.type == tokenize.COMMENT}


def undocumented(code: str) -> list:
    "Parameters of public functions, with the function's name, that have no comment of their own"
    said, out = comment_lines(code), []
    for f in ast.parse(code).body:
        if not isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) or f.name.startswith("_"):
            continue
        args = [
            a
            for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs, f.args.vararg, f.args.kwarg)
            if a and a.arg != "self"
        ]
        alone = lambda a: [b.lineno for b in args].count(a.lineno) == 1 and a.lineno != f.lineno
        out += [f"{f.name}({a.arg})" for a in args if not (alone(a) and a.end_lineno in said)]
    return out


SHOWS = re.compile(r"!\[|^\|[-: |]+\|\s*$|^```\n", re.M)  # a picture, a table, a drawing in prose


def bare_sections(cells: list) -> tuple:
    "Sections, and how many of them have neither picture nor drawing nor table"
    sections = [[]]
    for c in cells:
        if c["cell_type"] == "markdown" and re.search(r"^## ", source(c), re.M):
            sections.append([])
        sections[-1].append(c)
    shown = lambda c: (
        SHOWS.search(source(c))
        if c["cell_type"] == "markdown"
        else any(
            k in o.get("data", {})
            for o in c.get("outputs", [])
            for k in ("image/png", "image/svg+xml", "text/html", "text/markdown")
        )
    )
    titled = [s for s in sections[1:] if not source(s[0]).startswith("## What can go wrong")]
    return len(titled), sum(not any(shown(c) for c in s) for s in titled)


def measured(root: Path) -> dict:  # room: its figures
    "The figures of each room"
    rooms = {}
    for p in notebooks(root):
        cells = json.loads(p.read_text(encoding="utf-8"))["cells"]
        out, code = exported(cells), [source(c) for c in cells if c["cell_type"] == "code"]
        r = rooms.setdefault(
            room_of(p, root), dict(notebooks=0, lines=[], over=0, long=0, chains=0, parameters=0, sections=0, bare=0)
        )
        r["notebooks"] += 1
        r["lines"] += [body_lines(s) for s in out]
        r["over"] += sum(lines_of(s) > LONGEST_CELL and not is_table(s) for s in out)
        r["long"] += sum(map(too_long, code))
        r["chains"] += sum(map(chains, code))
        r["parameters"] += sum(len(undocumented(s)) for s in out)
        sections, bare = bare_sections(cells)
        r["sections"] += sections
        r["bare"] += bare
    return rooms


def table(rooms: dict) -> str:
    "The figures in Markdown"
    head = [
        "room",
        "notebooks",
        "lines of an exported cell (without parameters): median, longest",
        f"over {LONGEST_CELL}",
        f"lines over {LONGEST_LINE}",
        "`;`",
        "parameters without meaning",
        "sections without picture, drawing, table",
    ]
    rows = [
        [
            k,
            r["notebooks"],
            f"{median(r['lines'] or [0]):g}, {max(r['lines'], default=0)}",
            r["over"],
            r["long"],
            r["chains"],
            r["parameters"],
            f"{r['bare']} of {r['sections']}",
        ]
        for k, r in rooms.items()
    ]
    both = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, r)) + " |" for r in both)


def which(root: Path):
    "Print every place that is counted, but the long median"
    for p in notebooks(root):
        cells, name = json.loads(p.read_text(encoding="utf-8"))["cells"], p.relative_to(root / "nbs")
        for s in exported(cells):
            if lines_of(s) > LONGEST_CELL and not is_table(s):
                print(f"{name}: a cell of {lines_of(s)} lines: {s.splitlines()[1]}")
            if found := undocumented(s):
                print(f"{name}: without meaning: {', '.join(found)}")
        for c in cells:
            if c["cell_type"] != "code":
                continue
            if n := chains(source(c)):
                print(f"{name}: {n} ';' in cell {c['id']}")
            for l in source(c).splitlines():
                if len(l) > LONGEST_LINE:
                    print(f"{name}: {len(l)} characters: {l.strip()[:60]}…")


if __name__ == "__main__":
    words = sys.argv[1:]
    root = Path(next((w for w in words if w != "--which"), Path(__file__).parent.parent))
    if "--which" in words:
        sys.exit(which(root))
    rooms = measured(root)
    whole = {k: sum((r[k] for r in rooms.values()), [] if k == "lines" else 0) for k in next(iter(rooms.values()))}
    print(table(rooms | {"all": whole}))
