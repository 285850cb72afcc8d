"""Speed of exported models, by alternating runs; prints ratios, and writes what is published.

    python bench/export.py r18 [--threads 2]          # our R18 at 640 px against transformers' export of its weights
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python bench/export.py r18   # as on a CPU without AMX, whose bf16 units
                                                                     # make INT8's lead small
    python bench/export.py table NAME WEIGHTS DATA    # every backend that is here, on the val split of DATA
    python bench/export.py figures                    # figures/deployment.png and .pdf, from the committed results
"""
import argparse, json, os, tempfile
from pathlib import Path

import numpy as np
import torch

from rtdetr_kd.data.dataset import load_data
from rtdetr_kd.data.split import part
from rtdetr_kd.deploy.calibrate import calibrate
from rtdetr_kd.deploy.export import write_onnx, write_openvino
from rtdetr_kd.deploy.latency import draw_published, latency_rows, markdown_of, measure_files, race, write_table
from rtdetr_kd.deploy.quantize import ap_gate, sensitivity, write_int8
from rtdetr_kd.files import machine, root, write_json
from rtdetr_kd.model.detector import RTDETR, Spec
from rtdetr_kd.model.foreign_weights import COCO_NAMES, save_huggingface
from rtdetr_kd.model.sizes import SIZES
from rtdetr_kd.model.weights import load_model

PUBLISHED = root() / "runs" / "published" / "latency"
PAIRS = dict(  # name of a ratio -> (the slower, the faster)
    fp32_ort=("ort_theirs", "ort_ours"),
    fp32_openvino=("ov_theirs", "ov_ours"),
    bf16_openvino=("ov_theirs_bf16", "ov_ours_bf16"),
    int8_over_fp32_openvino=("ov_ours", "ov_int8_bf16"),
    int8_over_bf16_openvino=("ov_ours_bf16", "ov_int8_bf16"),
    int8_over_theirs_bf16_openvino=("ov_theirs_bf16", "ov_int8_bf16"),
    int8_over_fp32_ort=("ort_ours", "ort_int8"),
)


def settle_norms(m, side):
    "Batch norms see three images of noise"
    for b in m.modules():
        if isinstance(b, torch.nn.BatchNorm2d):
            b.momentum = None
            b.reset_running_stats()
    noise = lambda: m.encoder(m.backbone(torch.rand(1, 3, side, side)))
    for _ in range(3): m.decoder.input_proj[0](noise()[0])
    for p, x in zip(m.decoder.input_proj, noise()): p(x)


def spread_outputs(d):
    "Scores, boxes and sampling points that are not all alike"
    for h in (d.enc_score_head, *d.dec_score_head): torch.nn.init.normal_(h.weight, std=.1)
    for h in (d.enc_bbox_head, *d.dec_bbox_head): torch.nn.init.normal_(h.layers[-1].weight, std=.02)
    for l in d.decoder.layers: torch.nn.init.normal_(l.cross_attn.sampling_offsets.weight, std=.02)


def settled(side=640, seed=0) -> RTDETR:
    "An R18 of random weights whose batch norms have seen images and whose outputs are spread: for timing only"
    torch.manual_seed(seed)
    m = RTDETR(Spec(COCO_NAMES, **(SIZES["r18"] | dict(image_size=side)))).train()
    with torch.no_grad():
        settle_norms(m, side)
        spread_outputs(m.decoder)
    return m.eval()


class Outputs(torch.nn.Module):
    "Logits and boxes of transformers' RT-DETR"
    def __init__(self, m):
        super().__init__()
        self.m = m

    def forward(self, images):
        o = self.m(images)
        return o.logits, o.pred_boxes


def theirs(model, folder) -> Path:
    "transformers' RT-DETR with the same weights, exported by the same exporter"
    from transformers import RTDetrForObjectDetection
    save_huggingface(model, folder / "hf")
    net, n = Outputs(RTDetrForObjectDetection.from_pretrained(folder / "hf").eval()).eval(), model.spec.image_size
    program = torch.onnx.export(net, (torch.rand(1, 3, n, n),), dynamo=True, opset_version=18, input_names=["images"],
                                output_names=["logits", "boxes"], external_data=False, verbose=False)
    program.save(folder / "theirs.onnx", external_data=False)
    return folder / "theirs.onnx"


def ort_session(path, threads):
    "A function of what the file wants, in ONNX Runtime"
    import onnxruntime as ort
    o = ort.SessionOptions()
    o.intra_op_num_threads = threads
    o.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle sessions must not slow the others down
    s = ort.InferenceSession(str(path), o, providers=["CPUExecutionProvider"])
    return lambda x: s.run(None, {"images": x})


def ov_session(path, threads, hint):
    "A function of what the file wants, in OpenVINO"
    import openvino as ov
    c = ov.Core()
    options = dict(INFERENCE_NUM_THREADS=threads, INFERENCE_PRECISION_HINT=hint, PERFORMANCE_HINT="LATENCY")
    r = c.compile_model(c.read_model(str(path)), "CPU", options).create_infer_request()
    return lambda x: r.infer({0: x})


def timed(path, threads, kind, hint, image):
    "One image through one file in one runtime, as `race` calls it"
    run = ort_session(path, threads) if kind == "ort" else ov_session(path, threads, hint)
    floats = path.name.startswith("theirs")
    x = np.ascontiguousarray(image.transpose(0, 3, 1, 2)).astype(np.float32) / 255 if floats else image
    return lambda _: run(x)


def write_r18(folder, side):
    "Ours, theirs, and ours in integers, as far as they are not there"
    ours = folder / "ours.onnx"
    if not (folder / "theirs.onnx").exists():
        model = settled(side)
        write_onnx(model, ours, batch=1)
        theirs(model, folder)
    if (folder / "ours.ov8.onnx").exists(): return
    recipe = calibrate(ours, part(load_data("toy")["select"], range(8)), 8, "minmax")
    for target, name in (("onnxruntime", "ort8"), ("openvino", "ov8")):
        write_int8(ours, folder / f"ours.{name}.onnx", recipe, target)


def r18(threads, rounds, side, keep) -> dict:
    "Times of one image, and their ratios"
    folder = Path(keep or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    write_r18(folder, side)
    ours, other, ort8, ov8 = (folder / f"{n}.onnx" for n in ("ours", "theirs", "ours.ort8", "ours.ov8"))
    made = dict(
        ort_theirs=(other, "ort", "f32"), ort_ours=(ours, "ort", "f32"), ort_int8=(ort8, "ort", "f32"),
        ov_theirs=(other, "ov", "f32"), ov_ours=(ours, "ov", "f32"), ov_theirs_bf16=(other, "ov", "bf16"),
        ov_ours_bf16=(ours, "ov", "bf16"), ov_int8_f32=(ov8, "ov", "f32"), ov_int8_bf16=(ov8, "ov", "bf16"))
    image = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    calls = {k: timed(path, threads, kind, hint, image) for k, (path, kind, hint) in made.items()}
    t = race(calls, None, rounds, 2, seconds=600)
    ms = {k: 1e3 * float(np.median(v)) for k, v in t.items()}
    best = {k: 1e3 * float(np.min(v)) for k, v in t.items()}
    ratios = {k: float(np.median(t[a] / t[b])) for k, (a, b) in PAIRS.items()}
    for k in ms: print(f"{k:16} median {ms[k]:7.1f} ms   least {best[k]:7.1f}")
    for k, (a, b) in PAIRS.items(): print(f"{k:32} {ratios[k]:.2f}x (of the least times {best[a] / best[b]:.2f}x)")
    about = dict(model="r18, random weights", side=side, isa=os.environ.get("ONEDNN_MAX_CPU_ISA", "all of the CPU's"),
                 rounds=len(t["ort_ours"]), machine=machine(threads))
    return dict(about=about, median_ms=ms, least_ms=best, ratios=ratios)


def export_all(model, folder, stem, splits) -> tuple:
    "The files of all backends; what the gate said; what each part costs"
    onnx, select = write_onnx(model, folder / f"{stem}.onnx"), splits["select"]
    write_openvino(onnx, folder / f"{stem}.xml")
    ends = dict(onnxruntime="onnx", openvino="xml")
    passed = {t: ap_gate(onnx, folder / f"{stem}.int8.{end}", select, select, t) for t, end in ends.items()}
    recipe = calibrate(onnx, select, method=passed["openvino"]["method"])
    return passed, sensitivity(onnx, recipe, select, folder)


def table(name, weights, data, threads, rounds, keep, again):
    "Every backend that is here"
    folder = Path(keep or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    splits, stem = load_data(data), Path(weights).stem
    if again:
        old = json.loads((PUBLISHED / f"{name}.json").read_text())["about"]
        passed, parts = old["gate"], old["sensitivity"]
    else: passed, parts = export_all(load_model(weights), folder, stem, splits)
    rows, absent = latency_rows(weights, folder, threads)
    t = measure_files(rows, splits["val"], rounds=rounds)
    about = dict(data=name, split="val", images=len(splits["val"]), weights=Path(weights).name, gate=passed,
                 sensitivity=parts, absent=sorted(absent), machine=machine(threads))
    write_table(t, PUBLISHED / name, about)
    print(markdown_of(t))
    print("absent:", ", ".join(sorted(absent)))
    for r in parts: print(f"{r['part']:18} AP {r['AP']:.3f}  costs {100 * r['loss']:5.2f} points")


def words():
    "What was asked for"
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("what", choices=["r18", "table", "figures"])
    for name in ("name", "weights", "data"): a.add_argument(name, nargs="?")
    a.add_argument("--threads", type=int, default=2)
    a.add_argument("--rounds", type=int, default=11)
    a.add_argument("--side", type=int, default=640)
    a.add_argument("--keep", help="folder for the exported files")
    a.add_argument("--publish", action="store_true")
    a.add_argument("--again", action="store_true",
                   help="time the files in --keep again; gate and sensitivity from the published table")
    return a.parse_args()


if __name__ == "__main__":
    a = words()
    if a.what == "figures": draw_published(root() / "figures" / "deployment")
    elif a.what == "table": table(a.name, a.weights, a.data, a.threads, a.rounds, a.keep, a.again)
    else:
        result = r18(a.threads, a.rounds, a.side, a.keep)
        if a.publish:
            PUBLISHED.mkdir(parents=True, exist_ok=True)
            held = "-avx512" * ("ONEDNN_MAX_CPU_ISA" in os.environ)
            write_json(PUBLISHED / f"r18-{a.side}{held}.json", result)
