"""Build the site, offline: notebooks with their committed outputs, API pages, guides -> `_site`

Nothing is executed but docs/facts.py."""

import ast, configparser, json, os, re, shutil, sys
from pathlib import Path

here = Path(__file__).resolve().parent
root = here.parent
site = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 and __name__ == "__main__" else root / "_site"
src = site.with_name(site.name + "_src")
sys.path[:0] = [str(here), str(root)]

import nbformat
from nbformat.v4 import new_markdown_cell
from sphinx.cmd.build import main as sphinx

import api, facts

ROOMS = {  # caption: folder of nbs/
    "The data": "data",
    "The detector": "model",
    "Distillation": "distill",
    "A run": "train",
    "The study": "study",
    "To a device": "deploy",
    "The server": "serve",
}
GROUND = ["files", "names", "props", "command"]  # notebooks that everything stands on, or that stand on everything
GUIDES = ["own_data", "fine_tuning", "which_method", "three_tasks", "films", "small_gpu", "colab_a100", "deploy"]
GUIDES += ["reproduce", "troubleshooting", "glossary"]
MATHJAX = "tex-chtml.js"
# what a fence of shell commands begins with
COMMANDS = "(?:rtdetr-kd|yolo|papermill|python|pip|make|curl|for|export|git|docker|serve|trtexec|nbdev_\\w+|#)"


def settings() -> dict:
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(root / "settings.ini")
    return ini["DEFAULT"]


source_url = f"{settings()['git_url']}/blob/{settings()['branch']}"


def directives(cell) -> str:
    return " ".join(re.findall(r"^#\|\s*(.+)$", cell.source, re.M))


# what a line of a check begins with
CHECKS = re.compile(r"(?:assert |test_\w+\(|for .*: (?:assert|test_\w+)|with |    )")


def is_check(source: str) -> bool:
    "Does a cell only prove something? It is folded: a reader may open it"
    lines = [l for l in source.splitlines() if l.strip() and not l.startswith("#")]
    return bool(lines) and all(CHECKS.match(l) for l in lines)


def outside(link: str) -> str:
    "A link out of nbs/ leads to the file on GitHub"
    base = source_url if "." in Path(link).name else source_url.replace("/blob/", "/tree/")
    return f"{base}/{re.sub(r'^(?:[.][.]/)+', '', link)}"


def linked(prose: str, find) -> str:
    "`name` in prose leads to its API entry; code blocks, headings and existing links stay as they are"

    def words(part):
        return re.sub(
            r"(?<![\[`\w])`(\w+(?:\.\w+)?)(?:\(\))?`(?![\]`])",
            lambda m: f"[{m[0]}](#{e.label})" if (e := find(m[1])) else m[0],
            part,
        )

    lines, fenced = [], False
    for line in prose.split("\n"):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        lines.append(
            line
            if fenced or line.startswith("#")
            else "".join(
                p if k % 2 else words(p) for k, p in enumerate(re.split(r"(!?\[[^\]]*\]\([^)]*\)|\$[^$]+\$)", line))
            )
        )
    text = re.sub(
        rf"^```\n(?={COMMANDS} )", "```bash\n", "\n".join(lines), flags=re.M
    )  # on a phone commands are wrapped, drawings are not
    text = re.sub(r"\]\(((?:\.\./)*)index\.ipynb", r"](\1map.ipynb", text)
    text = re.sub(r"\[!\[([^\]]*)\]\(https?:[^)]*\)\]", r"[\1]", text)  # a badge from elsewhere: its words
    text = re.sub(r"(!\[[^\]]*\]\()(?:\.\./)+(figures/[^)\s]+\))", r"\1/\2", text)  # staged beside the pages
    return re.sub(r"\]\((?!(?:\.\./)*[\w/]+\.ipynb[)#])(\.\./[^)#\s]+)\)", lambda m: f"]({outside(m[1])})", text)


def imported(nb) -> dict:
    "name -> module, as the notebook's own cells import it"
    out = {}
    for c in nb.cells:
        if c.cell_type != "code" or "import" not in c.source:
            continue
        try:
            tree = ast.parse(re.sub(r"^\s*[%!].*$", "", c.source, flags=re.M))
        except SyntaxError:
            continue
        for n in ast.walk(tree):
            if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("rtdetr_kd."):
                out |= {a.asname or a.name: n.module.partition(".")[2] for a in n.names}
    return out


def finder(own: str | None, names: dict, entries: dict):
    "Which API entry a word in a notebook means: its own module's, an imported one, or the only one there is"

    def find(word):
        if (own, word) in entries:
            return entries[own, word]
        if word in names:
            return entries.get((names[word], word))
        all_ = [e for (m, n), e in entries.items() if n == word]
        return (
            all_[0] if len(all_) == 1 and ("_" in word or not word.islower()) else None
        )  # a plain word may mean anything

    return find


def joined(outputs: list) -> list:
    "Lines printed one after the other as one output; what is printed between two tables stays between them"
    out = []
    for o in outputs:
        if out and o.output_type == "stream" and out[-1].output_type == "stream" and o.name == out[-1].name:
            out[-1].text += o.text
        else:
            out.append(o)
    return out


def staged(cell, own: str | None, find, symbols: set) -> list:
    "The cells that take the place of one"
    if cell.cell_type == "raw":
        return []
    if cell.cell_type == "markdown":
        return [new_markdown_cell(linked(cell.source, find))] if not cell.source.startswith("#| hide") else []
    said = directives(cell)
    if "default_exp" in said or re.search(r"\bhide\b", said) or not cell.source.strip():
        return []
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
    tags = ["exported"] if re.search(r"\bexports?\b", said) else []
    folded = not tags and not cell.outputs and is_check(cell.source)
    cell.metadata = dict(tags=[*tags, *(["hide-input"] if folded else [])])
    if folded: cell.metadata["mystnb"] = dict(code_prompt_show="Checks", code_prompt_hide="Checks")
    cell.outputs = joined(cell.outputs)
    anchor = [new_markdown_cell(f"(sym-{own}.{cell['id']})=")] if cell.get("id") in symbols else []
    return [*anchor, cell]


def chapter(path: Path, modules: dict, entries: dict):
    "A notebook as a page; its title as a lead"
    nb = nbformat.read(path, 4)
    name = page_of(path)
    own = next((m for m, (notebook, _, _) in modules.items() if notebook == name), None)
    find = finder(own, imported(nb), entries)
    symbols = {e.cell for e in modules[own][2]} if own else set()
    nb.cells = [o for c in nb.cells for o in staged(c, own, find, symbols)]
    first = nb.cells[0]
    first.source = re.sub(r"^> (.+)$", r"{.lead}\n\1", first.source, count=1, flags=re.M)
    more = [f"[API of `{own}`]({'../' * name.count('/')}api/{own}.md)"] if own else []
    file = f"{source_url}/nbs/{path.relative_to(root / 'nbs').as_posix()}"
    first.source += "\n\n{.where}\n" + " · ".join([*more, f"[this notebook]({file})"])
    return nb


def toctree(caption: str, names: list) -> str:
    said = f":caption: {caption}\n" if caption else ""
    return f"```{{toctree}}\n:hidden:\n{said}\n" + "\n".join(names) + "\n```\n"


def contents(names: list) -> list:
    "Table of contents: the guides, the runnable notebooks, the rooms in the order of reading, the API"
    rooms = [toctree(caption, [n for n in names if n.startswith(f"{room}/")]) for caption, room in ROOMS.items()]
    ground = [n for n in names if "/" not in n and n in GROUND]
    run = [n for n in names if "/" not in n and n not in (*GROUND, "map")]
    return [
        toctree("", ["The map <map>"]),
        toctree("Guides", [f"guides/{g}" for g in GUIDES]),
        toctree("To run", run),
        *rooms,
        toctree("The ground floor", ground),
        toctree("API", ["api/index"]),
    ]


def stage_api(modules: dict):
    (src / "api").mkdir()
    for m, (notebook, about, found) in modules.items():
        (src / f"api/{m}.md").write_text(api.page(m, notebook, about, found, source_url))
    rows = "\n".join(
        f"| [{m}]({m}.md) | [{nb}](../{nb}.ipynb) | {about} | {len(found)} |"
        for m, (nb, about, found) in modules.items()
    )
    head = "# API\n\n{.lead}\nEvery public function and class: signature, types, shapes, units\n\n"
    (src / "api/index.md").write_text(
        head
        + "| module | explained in | about | entries |\n|---|---|---|---|\n"
        + rows
        + "\n\n```{toctree}\n:hidden:\n\n"
        + "\n".join(modules)
        + "\n```\n"
    )


def page_of(path: Path) -> str:  # room/00_notebook; the landing page is no notebook, so index.ipynb is the map
    name = path.relative_to(root / "nbs").with_suffix("").as_posix()
    return "map" if name == "index" else name


def stage():  # everything Sphinx reads
    shutil.rmtree(src, ignore_errors=True)
    shutil.copytree(here / "_static", src / "_static")
    shutil.copytree(root / "figures", src / "figures", ignore=shutil.ignore_patterns("*.md", "*.pdf"))
    paths = sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    files = {
        p: ".".join(p.relative_to(root / "rtdetr_kd").with_suffix("").parts)
        for p in (root / "rtdetr_kd").rglob("*.py")
        if "# %% " in p.read_text(encoding="utf-8")
    }
    order = ["", *ROOMS.values()]
    found = {m: api.read_module(p, m) for p, m in files.items()}
    modules = dict(sorted(found.items(), key=lambda x: (order.index(x[0].rpartition(".")[0]), x[1][0])))
    entries = {(e.module, e.name): e for _, _, found in modules.values() for e in found}
    stage_api(modules)
    (src / "guides").mkdir()
    for g in GUIDES:
        page = facts.fill((here / "guides" / f"{g}.md").read_text(encoding="utf-8"), g)
        (src / f"guides/{g}.md").write_text(linked(page, finder(None, {}, entries)), encoding="utf-8")
    for p in paths:
        (src / page_of(p)).parent.mkdir(exist_ok=True)
        nbformat.write(chapter(p, modules, entries), src / f"{page_of(p)}.ipynb")
    landing = facts.fill((here / "landing.md").read_text(encoding="utf-8"), "landing")
    pages = contents([page_of(p) for p in paths])
    (src / "index.md").write_text("\n\n".join([linked(landing, finder(None, {}, entries)), *pages]), encoding="utf-8")


def prune():
    "Keep of MathJax only what a page loads"
    mj = site / "_static/mathjax"
    keep = {mj / MATHJAX, *(mj / "output/chtml/fonts").rglob("*")}
    for p in mj.rglob("*"):
        if p.is_file() and p not in keep:
            p.unlink()
    for p in sorted(mj.rglob("*"), reverse=True):
        if p.is_dir() and not any(p.iterdir()):
            p.rmdir()


def from_elsewhere() -> list:
    "Pages that load something from the network to be displayed"
    load = re.compile(
        r'<(?:script|img|iframe|source)[^>]+src="(?:https?:)?//[^"]+"'
        r'|<link[^>]+rel="(?:stylesheet|preload|icon)"[^>]+href="(?:https?:)?//[^"]+"|@import|url\(\s*["\']?https?:'
    )
    # code that is shown loads nothing
    shown = lambda p: re.sub(r"<pre.*?</pre>", "", p.read_text(errors="replace"), flags=re.S)
    return sorted(
        f"{p.relative_to(site)}: {m[0][:100]}"
        for p in [*site.rglob("*.html"), *site.rglob("*.css")]
        if (m := load.search(shown(p)))
    )


def main() -> int | str:  # for sys.exit
    if site.exists() and any(site.iterdir()) and not (site / ".buildinfo").exists():
        return (
            f"{site.name} is not empty and no site that this script made: give another folder, nothing is overwritten"
        )
    shutil.rmtree(site, ignore_errors=True)
    stage()
    rc = sphinx(
        ["-q", "-W", "--keep-going", "-b", "html", "-c", str(here), "-d", str(src / ".doctrees"), str(src), str(site)]
    )
    if rc:
        return rc
    shutil.rmtree(src)
    prune()
    (site / ".nojekyll").touch()
    for line in from_elsewhere():
        print("loads from the network:", line, file=sys.stderr)
        rc = 1
    size = sum(p.stat().st_size for p in site.rglob("*") if p.is_file()) / 2**20
    print(f"{len(list(site.rglob('*.html')))} pages, {size:.0f} MB: {site.name}/index.html")
    return rc


if __name__ == "__main__":
    sys.exit(main())
