"""Reading an annotation file like COCO's: ours against pycocotools, each in a fresh process, in turns

python bench/coco_start.py [images, default 118000] [rounds]"""

import json, subprocess, sys, tempfile
from pathlib import Path

import numpy as np

OURS = "from rtdetr_kd.data.coco import read_coco; import rtdetr_kd.data.dataset"
RUN = """
import resource, sys, time
{imports}
start = time.process_time()
{work}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(time.process_time() - start, peak)
"""
KINDS = dict(
    ours=(OURS, "s = read_coco(sys.argv[1], '.')"),
    pycocotools=(
        "import contextlib, io; from pycocotools.coco import COCO",
        "with contextlib.redirect_stdout(io.StringIO()): c = COCO(sys.argv[1])",
    ),
)


def write(path: Path, n: int):
    "About 7 boxes an image, with outlines, as in instances_train2017.json"
    rng = np.random.default_rng(0)
    with open(path, "w") as f:
        f.write('{"info": {}, "licenses": [], "images": [')
        f.write(
            ", ".join(
                json.dumps(
                    dict(
                        license=3,
                        file_name=f"{k:012}.jpg",
                        coco_url=f"http://images.cocodataset.org/train2017/{k:012}.jpg",
                        height=480,
                        width=640,
                        date_captured="2013-11-14 11:18:45",
                        flickr_url="http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg",
                        id=k,
                    )
                )
                for k in range(n)
            )
        )
        f.write(
            '], "categories": '
            + json.dumps([dict(supercategory="x", id=k, name=f"c{k}") for k in range(1, 91)])
            + ', "annotations": ['
        )
        for k in range(n):
            own = [
                dict(
                    segmentation=[rng.uniform(0, 480, 50).round(2).tolist()],
                    area=5000.5,
                    iscrowd=0,
                    image_id=k,
                    bbox=[*rng.uniform(0, 200, 4).round(2).tolist()],
                    category_id=int(rng.integers(1, 91)),
                    id=7 * k + j,
                )
                for j in range(7)
            ]
            f.write((", " if k else "") + json.dumps(own)[1:-1])
        f.write("]}")


if __name__ == "__main__":
    n, rounds = (int(x) for x in [*sys.argv[1:], 118000, 2][:2]) if len(sys.argv) != 2 else (int(sys.argv[1]), 2)
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "instances_train2017.json"
        write(path, n)
        print(f"{n:,} images, {7 * n:,} annotations, {path.stat().st_size / 1e6:.0f} MB", flush=True)
        for r in range(rounds):
            got = {}
            for k, (imports, work) in KINDS.items():
                out = subprocess.run(
                    [sys.executable, "-c", RUN.format(imports=imports, work=work), str(path)],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
                got[k] = [float(x) for x in out.split()]
                print(
                    f"round {r + 1}: {k} {got[k][0]:.1f} CPU seconds, peak {got[k][1]:.2f} GB with all imports",
                    flush=True,
                )
            print(f"  {got['pycocotools'][0] / got['ours'][0]:.1f} times as fast (goal 3)", flush=True)
