"""Loading and augmenting JPEGs of COCO size, in turns: ours against torchvision's transforms on PIL images

python bench/loading.py [rounds]"""

import sys, tempfile, time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import tv_tensors
from torchvision.transforms import v2

from rtdetr_kd.data.dataset import Images
from rtdetr_kd.data.augment import augmentation
from rtdetr_kd.data.split import pack_split

SIDE, N = 640, 24


def made(folder: Path):
    "Photographs of 640×480 pixels, seven boxes each"
    rng, ims, rows = np.random.default_rng(0), [], []
    for k in range(N):
        p = Image.fromarray(load_sample_images().images[k % 2]).crop((k % 5, k % 7, 620, 420)).resize((640, 480))
        p.save(folder / f"{k}.jpg", quality=92)
        ims.append(dict(id=k, file_name=f"{k}.jpg", width=640, height=480))
        for x, y, w, h in rng.uniform([0, 0, 20, 20], [440, 280, 200, 200], (7, 4)):
            rows.append((k, x, y, x + w, y + h, 0, 0, w * h))
    return pack_split("train", folder, ims, rows, [(1, "x")])


class Reference(torch.utils.data.Dataset):
    "RT-DETR's list of torchvision transforms, on PIL images"

    def __init__(self, split):
        self.s = split
        self.t = v2.Compose(
            [
                v2.RandomPhotometricDistort(p=0.5),
                v2.RandomZoomOut(fill=0, p=0.5),
                v2.RandomApply([v2.RandomIoUCrop()], p=0.8),
                v2.SanitizeBoundingBoxes(min_size=1, labels_getter=lambda x: x[2]),
                v2.RandomHorizontalFlip(),
                v2.Resize((SIDE, SIDE)),
                v2.ToImage(),
            ]
        )

    def __getitem__(self, k):
        im = Image.open(self.s.folder / self.s.files[k]).convert("RGB")
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(self.s.boxes[self.s.of(k)]), format="XYXY", canvas_size=(im.height, im.width)
        )
        return self.t(im, boxes, torch.from_numpy(self.s.labels[self.s.of(k)]))


def seconds(f) -> float:
    start = time.process_time()
    for k in range(N):
        f(k)
    return time.process_time() - start


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        split = made(Path(tmp))
        ours, theirs = Images(split, SIDE, augmentation()), Reference(split)
        ours[0, 0], theirs[0]
        ratios = []
        for r in range(int(sys.argv[1]) if len(sys.argv) > 1 else 4):
            a, b = seconds(lambda k: ours[r, k]), seconds(lambda k: theirs[k])
            ratios.append(b / a)
            rates = f"ours {N / a:.0f} images a CPU second, torchvision {N / b:.0f}"
            print(f"round {r + 1}: {rates}: {b / a:.2f} times as many", flush=True)
        print(f"median {np.median(ratios):.2f} (goal 1.5)")
