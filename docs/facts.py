"""The figures in the guides: each {{name argument…}} is filled from committed result files.

`python docs/facts.py memory` predicts which batches fit which cards and writes runs/published/memory.json."""

import json, re, sys
from functools import cache
from pathlib import Path

root = Path(__file__).resolve().parent.parent
CARDS = [4, 6, 8, 12, 16, 24, 40, 80]  # GB, as they are sold
PAIRS = {  # what people train: the settings, and how the guides call them
    "r18 from r50, 640 px": dict(
        data="coco", size="r18", method="query", teacher="random:r50", precision="float16", image_size=640
    ),
    "r18 from r50, 640 px, teacher cached": dict(
        data="coco", size="r18", method="query", teacher="random:r50", precision="float16", image_size=640, cache="disk"
    ),
    "r18 alone, 640 px": dict(data="coco", size="r18", method="none", precision="float16", image_size=640),
    "small from r18, 256 px": dict(
        data="coco", size="small", method="query", teacher="random:r18", precision="float16", image_size=256
    ),
}
CHECKPOINTS = {"": "nothing", "backbone": "backbone", "all": "all"}


@cache
def study():
    "Of the study: the comparisons of study.json by (configuration, control), the README's table by method, the runs"
    from rtdetr_kd.study.grid import spoken
    from rtdetr_kd.study.records import read_runs, runs_of_study
    from rtdetr_kd.study.tables import comparisons, study_table

    return (
        {(r.variant, r.control): r for r in comparisons().itertuples()},
        study_table().set_index("method"),
        runs_of_study(),
        read_runs(),
        spoken,
    )


@cache
def paper_values():
    from rtdetr_kd.study.paper import values

    return values()


def compared(what):
    "'query+cwd' (against none) or 'query+cwd, none longer'"
    a, _, b = what.partition(", ")
    found = study()[0]
    if (a, b or "none") not in found:
        raise KeyError(
            f"study.json does not compare '{a}' with '{b or 'none'}' "
            f"(it compares: {'; '.join(f'{x}, {y}' for x, y in found)})"
        )
    return found[a, b or "none"]


def gain(*v):
    from rtdetr_kd.study.statistics import difference_text

    r = compared(" ".join(v))
    return difference_text(r.gain, r.low, r.high)


def verdict(*v):
    return compared(" ".join(v)).verdict


def price(*v):
    return paper_values()["price:" + " ".join(v)]  # of a training, in trainings without a teacher


def ap(*v):
    return study()[1].AP[study()[4](" ".join(v))]


def of_run(name, figure, digits="3"):
    return f"{study()[3].set_index('run').loc[name, figure]:.{digits}f}"


def minutes(name):
    return f"{study()[3].set_index('run').train_seconds[name] / 60:.0f}"


def hours_of_study():
    return f"{study()[2].train_seconds.sum() / 3600:.1f}"


def runs_of_study():
    return str(len(study()[2]))


def toy_table():
    from rtdetr_kd.study.tables import markdown

    return markdown(study()[1].reset_index())


def strength_table():
    from rtdetr_kd.study.tables import markdown, strength_rows

    return markdown(strength_rows())


def bccd():
    from rtdetr_kd.study.results import bccd_block

    return bccd_block(study()[3])


def attention_table():
    from rtdetr_kd.study.attention_study import agreement_table
    from rtdetr_kd.study.tables import markdown

    return markdown(agreement_table(["cosine_asked"]))


@cache
def parameters(size):
    import torch
    from rtdetr_kd.model.detector import RTDETR, Spec
    from rtdetr_kd.model.sizes import SIZES

    with torch.device("meta"):
        return f"{sum(p.numel() for p in RTDETR(Spec(['a'] * 80, **SIZES[size])).parameters()) / 1e6:.1f}"


def sizes_table():
    from rtdetr_kd.model.sizes import SIZES

    lines = ["| size | parameters, million | pixels | queries |", "|---|---|---|---|"]
    return "\n".join(
        lines
        + [
            f"| `{k}` | {parameters(k)} | {v['image_size']} | {v['queries']} |"
            for k, v in SIZES.items()
        ]
    )


def memory_table():
    "Largest batch by card, from the committed predictions"
    found = json.loads((root / "runs/published/memory.json").read_text())
    lines = [
        "| training | computed again | " + " | ".join(f"{c} GB" for c in CARDS) + " |",
        "|" + "---|" * (len(CARDS) + 2),
    ]
    return "\n".join(
        lines
        + [
            f"| {r['pair']} | {r['checkpoint']} | "
            + " | ".join(str(b) if b < found["most"] else f"{found['most']}+" for b in r["batch"])
            + " |"
            for r in found["rows"]
        ]
    )


def memory_of(pair, card, checkpoint="nothing"):
    found = json.loads((root / "runs/published/memory.json").read_text())
    r = next(r for r in found["rows"] if r["pair"] == pair.replace("_", " ") and r["checkpoint"] == checkpoint)
    return str(r["batch"][CARDS.index(int(card))])


def nb(stem):  # room/name, without its number
    "A link to a notebook, or its name where this checkout lacks it"
    room, _, name = stem.rpartition("/")
    found = next((root / "nbs" / room).glob(f"[0-9][0-9]_{name}.ipynb"), root / f"nbs/{stem}.ipynb")
    return f"[{stem}](../{found.relative_to(root / 'nbs').as_posix()})" if found.exists() else f"`{stem}`"


FACTS = {
    f.__name__: f
    for f in (
        gain,
        verdict,
        price,
        ap,
        of_run,
        minutes,
        hours_of_study,
        runs_of_study,
        toy_table,
        strength_table,
        bccd,
        attention_table,
        parameters,
        sizes_table,
        memory_table,
        memory_of,
        nb,
    )
}


def claimed(text: str, where: str) -> str:
    "The text without its claims, once they have been compared with study.json; as the paper does it"
    if "%!" not in text:
        return text
    from rtdetr_kd.study.paper import broken_claims
    from rtdetr_kd.study.tables import comparisons

    if bad := broken_claims(text, comparisons()):
        raise ValueError(f"{where}: {'; '.join(bad)}: read its sentences again")
    return re.sub(r"^%! .*\n", "", text, flags=re.M)


def fill(text: str, where: str) -> str:
    """Replace every {{…}}

    An unknown one, or a claim (`%! configuration, control: verdict`) that study.json does not make, is an error that
    says where."""

    def of(m):
        name, *args = m[1].split()
        if name not in FACTS:
            raise KeyError(
                f"docs/guides/{where}.md asks for {{{{{m[1]}}}}}: there is no such fact (there are: {', '.join(FACTS)})"
            )
        return FACTS[name](*args)

    text = claimed(text, f"docs/guides/{where}.md")
    return re.sub(r"\{\{(.+?)\}\}", lambda m: unbroken(of(m)), text)


def unbroken(text: str) -> str:  # a number and its interval stay on one line
    return (
        re.sub(r"(\[[-+][\d.]+,) ", "\\1\u00a0", text)
        .replace(" ± ", "\u00a0±\u00a0")
        .replace("AP − none", "AP\u00a0−\u00a0none")
    )


def memory(most=128):
    "Predict the largest batches and write them down"
    from dataclasses import replace
    from rtdetr_kd.files import write_json
    from rtdetr_kd.train.config import configure
    from rtdetr_kd.train.memory import itemised, rehearsal, worst

    rows = []
    for name, given in PAIRS.items():
        for stages, word in CHECKPOINTS.items():
            with rehearsal(replace(configure(**given), checkpoint=stages)) as phases:
                need = {
                    b: itemised(worst(phases(b)))["total"] for b in (1, 2, 4, 8, 16, 32, 64, 128)
                }  # it grows in proportion: between two, interpolate
                fits = [largest(need, 0.97 * 1024 * c, most) for c in CARDS]
            rows.append(dict(pair=name, checkpoint=word, batch=fits, need={k: round(v) for k, v in need.items()}))
            print(rows[-1], flush=True)
    write_json(root / "runs/published/memory.json", dict(most=most, rows=rows))


def largest(need: dict, room: float, most: int) -> int:
    "The largest batch that fits, between known ones by straight lines, rounded down"
    fits = [b for b, v in need.items() if v <= room]
    if not fits or max(fits) >= most:
        return max(fits, default=0)
    a = max(fits)
    z = min(b for b in need if b > a)
    return a + int((room - need[a]) / (need[z] - need[a]) * (z - a))


if __name__ == "__main__" and sys.argv[1:] == ["memory"]:
    sys.path.insert(0, str(root))
    memory()
