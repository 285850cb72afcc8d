"""Before a commit: outputs stay as they were where only noise has changed, and no picture is heavy

`python tests/outputs.py [notebook …]`, or all that differ from the last commit. A picture that is committed twenty
times with another antialiasing makes the repository heavy and its history unreadable."""

import base64, io, json, re, subprocess, sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
HEAVY = 150_000  # bytes of a picture
NEAR = 2.0  # mean difference of grey values (of 255) below which two pictures are the same
NOISE = [  # what differs from run to run without meaning anything
    (r"0x[0-9a-f]{6,}", "0x…"),
    (r"\d+(?:\.\d+)?(?= ?(?:s|ms|µs|min|images/s|MB|MiB|kB)\b)", "#"),
    (r"\d{2}:\d{2}(?::\d{2})?(?:\.\d+)?", "#"),
    (r"<!-- .*? -->|(?<=id=\")[^\"]+", "#"),
]


def plain(text: str) -> str:
    "A text without what differs from run to run"
    for pattern, to in NOISE:
        text = re.sub(pattern, to, text)
    return re.sub(r"[ \t]+", " ", text)


def pixels(file: str) -> np.ndarray:  # (h,w,3) of uint8
    "A picture as numbers"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file))).convert("RGB"))


def same_picture(a: str, b: str) -> bool:
    "Do two files, as base64 texts, show the same?"
    x, y = pixels(a), pixels(b)
    return x.shape == y.shape and float(np.abs(x.astype(int) - y).mean()) < NEAR


def text_of(v) -> str:
    return "".join(v) if isinstance(v, list) else str(v)


def same_output(a: dict, b: dict) -> bool:
    "Do two outputs of a cell tell the same?"
    if a["output_type"] != b["output_type"]:
        return False
    if a["output_type"] == "stream":
        return a["name"] == b["name"] and plain(text_of(a["text"])) == plain(text_of(b["text"]))
    one, two = by_type(a), by_type(b)
    if one.keys() != two.keys():
        return False
    return all(same_picture(v, two[k]) if k == "picture" else plain(v) == plain(two[k]) for k, v in one.items())


def by_type(output: dict) -> dict:  # type: text
    "What an output shows; a picture may be a PNG now and a JPEG before"
    data = {k: text_of(v) for k, v in output.get("data", {}).items()}
    pictures = [data.pop(k) for k in ("image/png", "image/jpeg") if k in data]
    if not pictures:
        return data
    return {"picture": pictures[0]} | {k: v for k, v in data.items() if k != "text/plain"}


def keep_old(new: dict, old: dict) -> int:  # cells whose outputs are the old ones again
    "Put the committed outputs back where source and meaning are the same"
    before, kept = {c.get("id"): c for c in old["cells"]}, 0
    for c in new["cells"]:
        was = before.get(c.get("id"))
        if c["cell_type"] != "code" or was is None or was["cell_type"] != "code":
            continue
        a, b = was["outputs"], c["outputs"]
        if a == b or len(a) != len(b) or was["source"] != c["source"]:
            continue
        if all(map(same_output, a, b)):
            c["outputs"], kept = a, kept + 1
    return kept


def encoded(im: Image.Image, kind: str, **how) -> str:
    "A picture as the base64 text of a file"
    out = io.BytesIO()
    im.save(out, kind, **how)
    return base64.b64encode(out.getvalue()).decode() + "\n"


def heavy(text: str) -> bool:
    return len(text) * 3 / 4 > HEAVY


def lighter(png: str) -> tuple:  # type, base64 text
    "A heavy picture as one with fewer colours, or, if it has photographs in it, as a JPEG"
    im = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    few = encoded(im.quantize(128, dither=Image.Dither.NONE), "PNG", optimize=True)
    if not heavy(few):
        return "image/png", few
    for quality in (88, 80, 70, 60, 50, 40):
        jpeg = encoded(im, "JPEG", quality=quality, optimize=True)
        if not heavy(jpeg):
            break
    return "image/jpeg", jpeg


def lighten(nb: dict) -> int:  # pictures that were made lighter
    "No picture above the limit"
    n = 0
    for data in (o["data"] for c in nb["cells"] for o in c.get("outputs", []) if "data" in o):
        if not heavy(text_of(data.get("image/png", ""))):
            continue
        kind, light = lighter(text_of(data.pop("image/png")))
        data[kind], n = light, n + 1
    return n


def committed(path: Path) -> dict | None:
    "The notebook of the last commit"
    r = subprocess.run(["git", "show", f"HEAD:{path.relative_to(ROOT).as_posix()}"], cwd=ROOT, capture_output=True)
    return json.loads(r.stdout) if r.returncode == 0 else None


def changed() -> list:
    "Notebooks that differ from the last commit, and those with a heavy picture"
    r = subprocess.run(
        ["git", "status", "--porcelain", "-uall", "--", "nbs"], cwd=ROOT, text=True, capture_output=True, check=True
    )
    return [p for l in r.stdout.splitlines() if (p := ROOT / l[3:].split(" -> ")[-1]).suffix == ".ipynb" and p.exists()]


def main(paths: list):
    for p in paths:
        nb, old = json.loads(p.read_text(encoding="utf-8")), committed(p)
        light = lighten(nb)
        kept = keep_old(nb, old) if old else 0
        light += lighten(nb)  # an old one may be heavy, too
        if kept or light:
            p.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{p.relative_to(ROOT)}: {kept} outputs as before, {light} pictures lighter")


if __name__ == "__main__":
    main([Path(a).resolve() for a in sys.argv[1:]] or changed())
