"The API pages, read from the package's source: no module is imported"

import ast, re, tokenize
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Entry:
    "A function or class as a reader wants to see it"

    module: str
    name: str  # Class.method for a patched method
    line: int  # in the package's file
    cell: str  # id of the notebook's cell
    doc: str = ""
    signature: str = ""
    rows: list = field(default_factory=list)  # parameter, type, default, meaning
    gives: tuple | None = None  # type, meaning

    @property
    def label(self):  # names of targets have no case, so a class is told from a function in another way
        return f"{'class' if self.signature.startswith('class ') else 'api'}-{self.module}.{self.name}".lower()


def comments(source: str) -> dict:  # line -> text
    "The last comment of each line"
    lines = iter(source.splitlines(keepends=True))
    return {
        t.start[0]: t.string.lstrip("# ").strip()
        for t in tokenize.generate_tokens(lambda: next(lines, ""))
        if t.type == tokenize.COMMENT
    }


def text(node) -> str:
    return "" if node is None else ast.unparse(node)


def parameters(f: ast.FunctionDef, said: dict) -> list:  # parameter, type, default, meaning
    "A row for each parameter; one on a line of its own has its comment"
    a = f.args
    given = [None] * (len(a.posonlyargs + a.args) - len(a.defaults)) + a.defaults
    pairs = list(zip(a.posonlyargs + a.args, given)) + list(zip(a.kwonlyargs, a.kw_defaults))
    pairs += [(x, None) for x in (a.vararg, a.kwarg) if x]
    used = [x.lineno for x, _ in pairs]
    tell = lambda x: said.get(x.end_lineno, "") if used.count(x.lineno) == 1 and x.lineno != f.lineno else ""
    return [(x.arg, text(x.annotation), text(d), tell(x)) for x, d in pairs if x.arg != "self"]


def body_start(f: ast.FunctionDef) -> int:
    return f.body[0].lineno


def returned(f: ast.FunctionDef, said: dict) -> tuple | None:
    "Type and meaning of what comes back: the comment on the line that ends the signature"
    first = body_start(f)
    line = next((k for k in range(first - 1, f.lineno - 1, -1) if k in said), None)
    last = max([x.end_lineno for x in ast.walk(f.args) if hasattr(x, "end_lineno")], default=f.lineno)
    own = said[line] if line is not None and (line > last or line == f.lineno) else ""
    return (text(f.returns), own) if f.returns is not None or own else None


def of_function(f, module: str, cell: str, said: dict, owner: str = "") -> Entry:
    name = f"{owner}.{f.name}" if owner else f.name
    rows = parameters(f, said)
    short = ", ".join(p + (f"={d}" if d else "") for p, _, d, _ in rows)
    return Entry(module, name, f.lineno, cell, ast.get_docstring(f) or "", f"{name}({short})", rows, returned(f, said))


def of_class(c, module: str, cell: str, said: dict) -> list:
    "The class, with its constructor's parameters or its fields, and its public methods"
    rows = [
        (s.target.id, text(s.annotation), text(s.value), said.get(s.end_lineno, ""))
        for s in c.body
        if isinstance(s, ast.AnnAssign)
    ]
    init = next((s for s in c.body if isinstance(s, ast.FunctionDef) and s.name == "__init__"), None)
    if init:
        rows = parameters(init, said)
    bases = ", ".join(map(text, c.bases))
    out = [
        Entry(
            module,
            c.name,
            c.lineno,
            cell,
            ast.get_docstring(c) or "",
            f"class {c.name}({bases})" if bases else f"class {c.name}",
            rows,
        )
    ]
    public = [
        s
        for s in c.body
        if isinstance(s, ast.FunctionDef)
        and (not s.name.startswith("_") or s.name == "__call__")
        and ast.get_docstring(s)
    ]
    return out + [of_function(s, module, cell, said, c.name) for s in public]


def read_module(path: Path, name: str) -> tuple:  # notebook's name, what the module is about, entries
    "Everything public that one file of the package defines, in the order of its notebook"
    source = path.read_text(encoding="utf-8")
    tree, said, cell, out = ast.parse(source), comments(source), {}, []
    for k, line in enumerate(source.splitlines(), 1):
        m = re.match(r"# %% (?:\.\./)+nbs/(.+)\.ipynb #(\w+)", line)
        if m:
            cell[k] = m[1], m[2]
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        own = cell[max(k for k in cell if k <= node.lineno)][1]
        if isinstance(node, ast.ClassDef):
            out += of_class(node, name, own, said)
            continue
        patched = any(text(d).startswith("patch") for d in node.decorator_list)
        owner = text(node.args.args[0].annotation) if patched else ""
        out.append(of_function(node, name, own, said, owner))
    return (
        next(iter(cell.values()))[0],
        ast.get_docstring(tree),
        [e for e in out if not e.name.split(".")[-1].startswith("__") or e.name.endswith("__call__")],
    )


def cell_text(s: str) -> str:
    return (
        s.replace("|", "\\|")
        .replace("\n", " ")
        .replace("<", "&lt;")
        .replace("*", "\\*")
        .replace("_", "\\_")
        .replace("$", "\\$")
        .replace("[", "\\[")
        .replace("{", "\\{")
    )


def table(e: Entry) -> str:
    "Parameters and what comes back; nothing where there is nothing to tell"
    if not e.rows and not e.gives:
        return ""
    code = lambda s: f"`{s}`".replace("|", "\\|") if s else ""
    rows = [
        ("parameter", "type", "default", "shape, unit, meaning"),
        *((code(p), code(t), code(d), cell_text(m)) for p, t, d, m in e.rows),
    ]
    if e.gives:
        rows.append(("*returns*", code(e.gives[0]), "", cell_text(e.gives[1])))
    columns = [c for c in zip(*rows) if any(c[1:])]  # those with something in them
    head, *body = zip(*columns)
    return "\n".join(f"| {' | '.join(r)} |" for r in (head, ["---"] * len(columns), *body))


def page(name: str, notebook: str, about: str, entries: list, source_url: str) -> str:
    "One module's page"
    out = [f"# {name}", f"{{.lead}}\n{about}", f"Explained in [{notebook}](../{notebook}.ipynb)."]
    here = {e.name for e in entries}
    for e in entries:
        level = (
            "###" if e.name.split(".")[0] in here - {e.name} else "##"
        )  # a method below its class, if the class is of this module
        file = f"{source_url}/rtdetr_kd/{e.module.replace('.', '/')}.py#L{e.line}"
        where = f"[in the story](#sym-{e.module}.{e.cell}) · [source]({file})"
        shown = (
            e.signature
            if len(e.signature) < 60
            else re.sub(r"\((.*)\)$", lambda m: "(\n    " + m[1].replace(", ", ",\n    ") + ",\n)", e.signature)
        )
        out += [
            f"({e.label})=\n{level} {e.name}",
            f"```python\n{shown}\n```",
            cell_text(e.doc.splitlines()[0]) if e.doc else "",
            table(e),
            where,
        ]
    return "\n\n".join(x for x in out if x) + "\n"
