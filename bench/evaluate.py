"""AP of 300 detections an image: ours against pycocotools and, where installed, faster-coco-eval, in turns

python bench/evaluate.py [images, default 5000] [rounds]"""

import contextlib, copy, io, sys, time

import numpy as np

from rtdetr_kd.model.evaluate import coco_ap


def made(n: int, per: int = 300, classes: int = 80) -> tuple:
    "Annotations with about 7 boxes an image, 1 % crowds; detections: several near each true box, the rest anywhere"
    rng, anns, found = np.random.default_rng(0), [], []
    for i in range(1, n + 1):
        m = int(rng.poisson(7))
        b = np.concatenate([rng.uniform(0, 400, (m, 2)), np.exp(rng.uniform(2, 5.7, (m, 2)))], 1)
        c = rng.choice(rng.integers(1, classes + 1, 3), m)
        anns += [
            dict(
                id=len(anns) + j + 1,
                image_id=i,
                category_id=int(c[j]),
                bbox=b[j].tolist(),
                area=float(b[j, 2] * b[j, 3] * 0.7),
                iscrowd=int(rng.random() < 0.01),
            )
            for j in range(m)
        ]
        near = rng.integers(0, m, 25 * m) if m else np.zeros(0, int)
        near = near[: per - 80]
        boxes = np.concatenate(
            [
                b[near] * rng.normal(1, 0.06, (len(near), 4)),
                np.concatenate(
                    [rng.uniform(0, 400, (per - len(near), 2)), rng.uniform(8, 200, (per - len(near), 2))], 1
                ),
            ]
        )
        kinds = np.concatenate([c[near], rng.integers(1, classes + 1, per - len(near))]).astype(int)
        found += [
            dict(image_id=i, category_id=k, bbox=x, score=s)
            for k, x, s in zip(kinds.tolist(), boxes.tolist(), rng.random(per).astype(np.float32).tolist())
        ]
    return dict(
        info={},
        images=[dict(id=i) for i in range(1, n + 1)],
        categories=[dict(id=k, name=str(k)) for k in range(1, classes + 1)],
        annotations=anns,
    ), found


def reference(COCO, Eval, gt, found):
    with contextlib.redirect_stdout(io.StringIO()):
        g = COCO()
        g.dataset = gt
        g.createIndex()
        e = Eval(g, g.loadRes(found), "bbox")
        e.evaluate()
        e.accumulate()
        e.summarize()
    return [float(x) for x in e.stats[:12]]


if __name__ == "__main__":
    args = [int(x) for x in sys.argv[1:]]
    n, rounds = (args + [5000, 2][len(args) :])[:2]
    gt, found = made(n)
    print(f"{n:,} images, {len(gt['annotations']):,} true boxes, {len(found):,} detections", flush=True)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    others = dict(pycocotools=(COCO, COCOeval))
    try:
        import faster_coco_eval as f

        others["faster-coco-eval"] = f.COCO, lambda *a: f.COCOeval_faster(*a, print_function=lambda *b: None)
    except ImportError:
        pass
    for r in range(rounds):
        start = time.process_time()
        ours = list(coco_ap(gt, found).values())
        mine = time.process_time() - start
        print(f"round {r + 1}: ours {mine:.1f} CPU seconds, AP {ours[0]:.6f}", flush=True)
        for name, (C, E) in others.items():
            g, d = copy.deepcopy((gt, found))
            start = time.process_time()
            theirs = reference(C, E, g, d)
            s = time.process_time() - start
            gap = max(abs(a - b) for a, b in zip(ours, theirs))
            print(f"  {name} {s:.1f}: {s / mine:.1f} times as long; largest difference {gap}", flush=True)
