"The site as a reader meets it, and the guides' figures"

import json, os, re, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
NBS = sorted(
    p.relative_to(ROOT / "nbs").with_suffix("").as_posix()
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in p.parts
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "The site, built as `make docs` does, with warnings as errors"
    pytest.importorskip("furo")
    pytest.importorskip("myst_nb")
    if os.environ.get("RTDETR_KD_SITE"):
        return Path(os.environ["RTDETR_KD_SITE"])  # one that has just been built
    out = tmp_path_factory.mktemp("docs") / "site"
    r = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "docs/build.py", out],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=900,
    )
    assert r.returncode == 0, (r.stdout + r.stderr)[-3000:]
    return out


class Links(HTMLParser):
    "What a page loads, and where it leads"

    def __init__(self, text):
        super().__init__()
        self.loads, self.leads, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get("id"):
            self.ids.add(a["id"])
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed") and a.get("src"):
            self.loads.append(a["src"])
        if tag == "link" and a.get("href") and a.get("rel") != "canonical":
            self.loads.append(a["href"])
        if tag == "a" and a.get("href"):
            self.leads.append(a["href"])


@pytest.fixture(scope="module")
def pages(site) -> dict:
    return {p: Links(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}


def test_nothing_is_loaded_from_the_network(site, pages):
    far = [(p.name, s) for p, page in pages.items() for s in page.loads if re.match(r"(https?:)?//", s)]
    css = [
        p.name
        for p in site.rglob("*.css")
        if re.search(r"@import|url\(\s*[\"']?(https?:)?//", p.read_text(errors="replace"))
    ]
    assert not far and not css
    js = [
        p.name
        for p in site.rglob("*.js")
        if "mathjax" not in p.parts and re.search(r"\.src\s*=\s*[\"']https?://", p.read_text(errors="replace"))
    ]
    assert not js


def test_every_link_within_the_site_leads_somewhere(site, pages):
    for p, page in pages.items():
        for link in page.leads:
            if re.match(r"\w+:|//", link):
                continue
            path, _, mark = link.partition("#")
            to = (p.parent / path).resolve() if path else p
            assert to.is_file(), f"{p.name}: {link}"
            if mark and to in pages:
                assert mark in pages[to].ids, f"{p.name}: {link}"


@pytest.mark.parametrize("name", NBS)
def test_every_notebook_is_a_page_with_its_outputs(site, name):
    at = "map" if name == "index" else name  # the landing page is no notebook
    page = (site / f"{at}.html").read_text(encoding="utf-8")
    cells = json.loads((ROOT / f"nbs/{name}.ipynb").read_text())["cells"]
    shown = [
        c for c in cells if c["cell_type"] == "code" and not re.search(r"^#\|.*\bhide\b", "".join(c["source"]), re.M)
    ]
    pictures = sum("image/png" in o.get("data", {}) for c in shown for o in c["outputs"])
    assert page.count("_images/") >= pictures
    assert f'href="{at}.html"' in (site / "index.html").read_text(encoding="utf-8")


def test_the_landing_page_lets_people_in(site):
    "One sentence, a picture, how to install, three lines of use, the finding, four doors; and no test of ours"
    page = (site / "index.html").read_text(encoding="utf-8")
    article = page[page.index("<article") : page.index("</article>")]
    said = re.sub(r"<[^>]+>", "", article)
    for words in (
        "Install",
        "git clone",
        "make train",
        "pip install",
        "load_model",
        "my own data",
        "how it works",
        "Reproduce",
        "Deploy",
    ):
        assert words.lower() in said.lower(), words
    assert "_images/detections.png" in article and "_images/comparison.png" in article
    assert "assert" not in said and "%!" not in said


def test_tables_are_rendered_as_tables(site, pages):
    "What a notebook shows as Markdown, too"
    for p in pages:
        text = re.sub(r"<pre.*?</pre>|<code.*?</code>", "", p.read_text(encoding="utf-8"), flags=re.S)
        assert not re.search(r"\|\s*:?-{3,}:?\s*\|", re.sub(r"<[^>]+>", "", text)), (
            f"{p.name} shows a table's raw pipes"
        )


def test_a_cell_that_only_proves_is_folded():
    import build

    assert build.is_check("test_eq(a, b)\nassert c") and build.is_check("for x in y: assert x")
    assert not build.is_check("x = 1\nassert x") and not build.is_check("print(1)")


def test_a_guide_leads_to_chapters_of_the_site(pages):
    assert not [
        (p.name, l)
        for p, page in pages.items()
        if p.parent.name == "guides"
        for l in page.leads
        if re.search(r"/blob/\w+/[\w/]+\.ipynb", l)
    ]


def test_api_entries_have_shapes_and_units(site):
    page = re.sub(r"<[^>]+>", "", (site / "api/data.boxes.html").read_text(encoding="utf-8"))
    assert "cxcywh" in page and re.search(r"\(\.\.\.,4\)|\(n,4\)", page) and "shape, unit, meaning" in page


def test_search_knows_the_words(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert (site / "search.html").is_file() and '"hungarian"' in index and "deform" in index


def test_both_colour_schemes_and_the_maths_are_there(site):
    css = "".join(p.read_text(errors="replace") for p in (site / "_static").rglob("*.css"))
    assert "prefers-color-scheme:dark" in css.replace(" ", "")
    page = (site / "distill/04_queries.html").read_text(encoding="utf-8")
    assert "tex-chtml.js" in page and list((site / "_static/mathjax").rglob("*.woff"))


def test_pictures_are_of_a_sane_size(site):
    from PIL import Image

    for p in (site / "_images").glob("*.png"):
        w, h = Image.open(p).size
        assert 30 <= w <= 2600 and 20 <= h <= 4000, f"{p.name}: {w}×{h}"
    assert sum(p.stat().st_size for p in site.rglob("*") if p.is_file()) < 60e6


@pytest.mark.slow
def test_no_page_is_wider_than_its_window(site, tmp_path):
    "On a phone, on a desk, and between the two; skipped without Chromium"
    from test_page import CHROMIUM, Browser

    if not CHROMIUM:
        pytest.skip("no Chromium here")
    b = Browser(tmp_path / "home")
    try:
        for width in (390, 1100, 1330, 1400, 1900):
            b("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
            for name in (
                "index",
                "guides/which_method",
                "guides/troubleshooting",
                "distill/04_queries",
                "deploy/10_latency",
                "api/train.run",
                "search",
            ):
                b("Page.navigate", url=f"file://{site}/{name}.html")
                b.until(f"document.readyState == 'complete' && location.href.includes('{name}.html')")
                assert b.js("document.documentElement.scrollWidth") <= width, (name, width)
    finally:
        b.close()


def test_a_broken_link_stops_the_build(tmp_path):
    "The flag that makes it so is the build's own: here on one page"
    pytest.importorskip("myst_nb")
    (tmp_path / "index.md").write_text("# A\n\n[gone](nowhere.md)\n")
    from sphinx.cmd.build import main

    assert (
        main(
            [
                "-q",
                "-W",
                "-b",
                "html",
                "-c",
                str(ROOT / "docs"),
                "-D",
                "html_static_path=",
                "-D",
                "html_css_files=",
                str(tmp_path),
                str(tmp_path / "out"),
            ]
        )
        != 0
    )


def test_no_figure_of_a_guide_is_typed():
    "Results have three decimals or a sign; those that stand in a guide's source were typed"
    for p in (ROOT / "docs/guides").glob("*.md"):
        prose = re.sub(r"```.*?```|`[^`]*`|\{\{.*?\}\}", "", p.read_text(encoding="utf-8"), flags=re.S)
        assert not re.search(r"\d\.\d{3}|[+±]\s?\d", prose), p.name


def test_an_unknown_fact_is_refused():
    import facts

    with pytest.raises(KeyError, match="there is no such fact"):
        facts.fill("{{gian cwd}}", "page")
    with pytest.raises(KeyError, match="does not compare 'cdw' with 'none'"):
        facts.fill("{{gain cdw}}", "page")
    assert facts.fill("{{gain cwd}}", "page").startswith("+0.")


def test_a_guide_that_claims_more_than_the_study_is_refused():
    import facts

    said = facts.verdict("cwd")
    assert facts.fill(f"a\n%! cwd, none: {said}\nb", "page") == "a\nb"
    with pytest.raises(
        ValueError,
        match=f"page.md: the text says that 'cwd' against 'none' is 'wonderful', the result files say '{said}'",
    ):
        facts.fill("%! cwd, none: wonderful\n", "page")


def test_index_shows_the_study_as_it_is():
    "Its committed outputs are the table that study.json has and the figure that is committed"
    import base64
    from rtdetr_kd.study.tables import markdown, study_table

    shown = [
        o.get("data", {})
        for c in json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"]
        for o in c.get("outputs", [])
    ]
    assert markdown(study_table()) in ["".join(d.get("text/markdown", [])) for d in shown], (
        "nbs/index.ipynb shows another table: run it again"
    )
    pictures = [base64.b64decode("".join(d["image/png"])) for d in shown if "image/png" in d]
    assert (ROOT / "figures/comparison.png").read_bytes() in pictures, (
        "nbs/index.ipynb shows another figure: run it again"
    )


def test_batches_by_card_follow_from_the_predicted_need():
    import facts

    found = json.loads((ROOT / "runs/published/memory.json").read_text())
    assert {r["pair"] for r in found["rows"]} == set(facts.PAIRS)
    for r in found["rows"]:
        need = {int(k): v for k, v in r["need"].items()}
        assert (
            r["batch"] == [facts.largest(need, 0.97 * 1024 * c, found["most"]) for c in facts.CARDS]
            and sorted(r["batch"]) == r["batch"]
        )
    assert facts.largest({1: 100, 2: 200, 4: 400}, 320, 4) == 3 and facts.largest({1: 100}, 50, 4) == 0


NUMBERED = [n for n in NBS if "/" in n]


@pytest.mark.parametrize("name", NUMBERED)
def test_a_chapter_has_its_parts(name):
    cells = json.loads((ROOT / f"nbs/{name}.ipynb").read_text())["cells"]
    prose = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    text = "\n".join(prose)
    assert re.search(r"^# .+", text, re.M) and re.search(r"^> .+", text, re.M), "a title and one line"
    assert "**You need" in text and "**You get" in text
    assert re.search(r"^## What can go wrong$", text, re.M) and "## What can go wrong" in prose[-1], (
        "it ends with what can go wrong"
    )
    shown = [o.get("data", {}) for c in cells if c["cell_type"] == "code" for o in c["outputs"]]
    assert any(k in d for d in shown for k in ("image/png", "image/svg+xml", "text/html")) or re.search(
        r"^\|[-: |]+\|$|^```\n", text, re.M
    ), "a picture, a table or a diagram"


def test_index_leads_to_every_notebook():
    text = (ROOT / "nbs/index.ipynb").read_text()
    assert not [n for n in NBS if n != "index" and f"({n}.ipynb)" not in text]


def test_the_workflow_is_the_ci_script():
    yaml = pytest.importorskip("yaml")
    steps = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]["steps"]
    assert [s["run"] for s in steps if "run" in s] == ["bash .ci/run"]
    runs = [
        s.get("run")
        for s in yaml.safe_load((ROOT / ".github/workflows/docs.yml").read_text())["jobs"]["build"]["steps"]
    ]
    assert "make docs" in runs
