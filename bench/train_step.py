"""A training step of distillation: ours against one put together from transformers' RT-DETR, in turns

python bench/train_step.py [canonical|toy] [rounds] [threads]

Ratios are of processor time, which other programs on the machine disturb little; wall-clock times are kept beside it.

canonical: R18 ← R50, 640 px, batch 2, float32, 300 queries, 80 classes, 7 boxes an image
toy: the toy student, 128 px, batch 16, float32, 5 classes; its fusion blocks as long as transformers' (which are fixed)
Each step: teacher, student with denoising, losses of all layers, backward, clipped gradients, AdamW, average of the
weights. Every student is float32; live_bf16 has its teacher in bfloat16 (teacher_precision). Ours is the learner's
own step; theirs takes the teacher's surest 100 queries, pairs them with the student's by the Hungarian algorithm once a
step, and compares scores, boxes and embeddings. Loading images is in neither."""

import copy, json, statistics, sys, tempfile, time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import nn

import rtdetr_kd.distill.cache
from rtdetr_kd.train.config import configure
from rtdetr_kd.data.dataset import loader
from rtdetr_kd.learner import Learner
from rtdetr_kd.model.sizes import SIZES

rtdetr_kd.distill.cache.verify = lambda *_: None  # an untrained teacher's surest queries are decided by rounding
CASES = dict(
    canonical=dict(size="r18", teacher="r50", side=640, batch=2, classes=80, boxes=7, images=4),
    toy=dict(size="toy", teacher="toy_teacher", side=128, batch=16, classes=5, boxes=3, images=32),
)


def folder_of_noise(folder: Path, side: int, classes: int, boxes: int, images: int):
    "A data set in COCO's format whose pictures mean nothing"
    rng = np.random.default_rng(0)
    for split in ("train", "select", "val"):
        (folder / split).mkdir(parents=True)
        anns = []
        for i in range(images):
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / split / f"{i}.png")
            for _ in range(boxes):
                w, h = rng.uniform(0.05, 0.4, 2) * side
                anns.append(
                    dict(
                        id=len(anns) + 1,
                        image_id=i,
                        category_id=int(rng.integers(classes)),
                        iscrowd=0,
                        area=w * h,
                        bbox=[float(rng.uniform(0, side - w)), float(rng.uniform(0, side - h)), float(w), float(h)],
                    )
                )
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / f"annotations/instances_{split}.json").write_text(
            json.dumps(
                dict(
                    images=[dict(id=i, file_name=f"{i}.png", width=side, height=side) for i in range(images)],
                    categories=[dict(id=c, name=f"class {c}") for c in range(classes)],
                    annotations=anns,
                )
            )
        )


def learner(case: dict, data: Path, runs: str, **more) -> Learner:
    "Ours, ready to step"
    c = configure(
        data=str(data),
        size=case["size"],
        image_size=case["side"],
        batch=case["batch"],
        teacher=f"random:{case['teacher']}",
        teacher_min_ap=0,
        photometric=0,
        zoom_out=0,
        iou_crop=0,
        hflip=0,
        lam="1",
        precision="float32",
        device="cpu",
        runs=runs,
        name="-".join(["run", *more.values()]),
        **more,
    )
    ours = Learner(c)
    ours.weigh()
    return ours


def hf_model(spec: dict, classes: int):
    "transformers' RT-DETR of one of our sizes"
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    depth = int(spec["backbone"][6:-2])
    blocks = {10: [1, 1, 1, 1], 18: [2, 2, 2, 2], 50: [3, 4, 6, 3]}[depth]
    w, d = spec.get("width", 64), spec.get("d", 256)
    sizes = [w * 2**i * (4 if depth == 50 else 1) for i in range(4)]
    body = RTDetrResNetConfig(
        embedding_size=w,
        hidden_sizes=sizes,
        depths=blocks,
        layer_type="bottleneck" if depth == 50 else "basic",
        downsample_in_bottleneck=False,
        out_features=["stage2", "stage3", "stage4"],
    )
    return RTDetrForObjectDetection(
        RTDetrConfig(
            backbone_config=body,
            encoder_in_channels=sizes[1:],
            encoder_hidden_dim=d,
            encoder_ffn_dim=spec.get("d_ff", 1024),
            d_model=d,
            decoder_in_channels=[d] * 3,
            decoder_ffn_dim=spec.get("d_ff", 1024),
            encoder_attention_heads=spec.get("heads", 8),
            decoder_attention_heads=spec.get("heads", 8),
            hidden_expansion=spec.get("expansion", 1.0),
            decoder_layers=spec.get("layers", 6),
            num_queries=spec["queries"],
            num_denoising=spec.get("denoising", 100),
            num_labels=classes,
            freeze_backbone_batch_norms=False,
        )
    )


class Theirs:
    "The same step from transformers' models"

    def __init__(self, case: dict, distil: bool):
        torch.manual_seed(0)
        self.student = hf_model(SIZES[case["size"]], case["classes"]).train()
        self.teacher = (
            hf_model(SIZES[case["teacher"]], case["classes"]).eval().requires_grad_(False) if distil else None
        )
        d = (SIZES[case["size"]].get("d", 256), SIZES[case["teacher"]].get("d", 256))
        self.adapt, self.ema = nn.Linear(*d), copy.deepcopy(self.student)
        self.opt = torch.optim.AdamW([*self.student.parameters(), *self.adapt.parameters()], lr=1e-4, weight_decay=1e-4)

    def distil(self, s, t):
        "Scores, boxes and embeddings of the teacher's surest 100 queries"
        w, rows = t.logits.sigmoid().amax(-1).topk(min(100, t.logits.shape[1]), 1)  # (b,k)
        of = lambda x, r: x.gather(1, r[..., None].expand(-1, -1, x.shape[-1]))
        logits, boxes, states = (
            of(v, rows)
            for v in (
                t.logits,
                t.pred_boxes,
                t.decoder_hidden_states[-1] if t.decoder_hidden_states else t.last_hidden_state,
            )
        )
        with torch.no_grad():
            C = torch.cdist(s.logits.sigmoid(), logits.sigmoid(), p=1) + 5 * torch.cdist(
                s.pred_boxes, boxes, p=1
            )  # (b,q,k)
        pairs = [linear_sum_assignment(c.T) for c in C.numpy()]
        mine = torch.stack([torch.as_tensor(q) for _, q in pairs])  # (b,k)
        mean = lambda x: (w * x).sum() / w.sum()
        score = mean(F.binary_cross_entropy_with_logits(of(s.logits, mine), logits.sigmoid(), reduction="none").sum(-1))
        alike = F.cosine_similarity(self.adapt(of(s.last_hidden_state, mine)), states, dim=-1)
        return score + 5 * mean((of(s.pred_boxes, mine) - boxes).abs().sum(-1)) + mean(1 - alike)

    def one_step(self, parts):
        ((images, targets),) = parts
        x = images.float().div(255)
        s = self.student(x, labels=[dict(class_labels=t["labels"], boxes=t["boxes"]) for t in targets])
        loss = s.loss
        if self.teacher is not None:
            with torch.no_grad():
                t = self.teacher(x)
            loss = loss + self.distil(s, t)
        self.opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 0.1)
        self.opt.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.student.parameters()), 1e-3)


def contest(case: dict, rounds: int) -> tuple:  # name: seconds of each round, of the processor and by the clock
    "Every contestant once a round, after a round that does not count"
    with tempfile.TemporaryDirectory() as d:
        folder_of_noise(Path(d) / "noise", case["side"], case["classes"], case["boxes"], case["images"])
        make = lambda **more: learner(case, Path(d) / "noise", d, **more)
        all = dict(
            theirs_plain=Theirs(case, False),
            theirs=Theirs(case, True),
            plain=make(method="none"),
            live=make(method="query", cache="none"),
            live_bf16=make(method="query", cache="none", teacher_precision="bfloat16"),
            cached=make(method="query", cache="disk"),
        )
        sizes = {
            k: sum(p.numel() for p in (v.model if isinstance(v, Learner) else v.student).parameters())
            for k, v in all.items()
        }
        print(f"parameters of the student: ours {sizes['plain']:,}, theirs {sizes['theirs']:,}", flush=True)
        ours = all["plain"]
        batches, took, wall = list(loader(ours.images, ours.batches(0))), {k: [] for k in all}, {k: [] for k in all}
        for r in range(rounds + 1):
            for k, v in all.items():
                start = time.process_time(), time.perf_counter()
                v.one_step([batches[r % len(batches)]])
                took[k].append(time.process_time() - start[0])
                wall[k].append(time.perf_counter() - start[1])
            print(f"round {r}: " + "  ".join(f"{k} {v[-1]:.3f} s" for k, v in took.items()), flush=True)
    return {k: v[1:] for k, v in took.items()}, {k: v[1:] for k, v in wall.items()}


def ratios(took: dict) -> dict:
    "Medians over the rounds of one time by another"
    of = lambda a, b: round(statistics.median(x / y for x, y in zip(took[a], took[b])), 3)
    return dict(
        live_is_faster_by=of("theirs", "live"),
        live_bf16_is_faster_by=of("theirs", "live_bf16"),
        cached_is_faster_by=of("theirs", "cached"),
        plain_is_faster_by=of("theirs_plain", "plain"),
        cached_costs_of_plain=of("cached", "plain"),
        live_costs_of_plain=of("live", "plain"),
        live_bf16_costs_of_plain=of("live_bf16", "plain"),
    )


if __name__ == "__main__":
    which, rounds, threads = (sys.argv[1:] + ["canonical", "9", "1"][len(sys.argv) - 1 :])[:3]
    torch.set_num_threads(int(threads))
    if which == "toy":
        SIZES["toy"]["depth"] = 1.0  # transformers' fusion blocks have three RepVGG blocks, whatever the size
    case, middle = CASES[which], lambda took: {k: round(statistics.median(v), 4) for k, v in took.items()}
    took, wall = contest(case, int(rounds))
    found = dict(
        case=case,
        rounds=int(rounds),
        threads=int(threads),
        torch=torch.__version__,
        cpu_seconds=middle(took),
        wall_seconds=middle(wall),
        images_per_cpu_second={k: round(case["batch"] / v, 2) for k, v in middle(took).items()},
        ratios=ratios(took),
    )
    print(json.dumps(found, indent=1))
    (Path(__file__).parent / f"train_step_{which}.json").write_text(json.dumps(found, indent=1) + "\n")
