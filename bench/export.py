"""Speed of exported models, by alternating runs; prints ratios, and writes what is published.

    python bench/export.py r18 [--threads 2]          # our R18 at 640 px against transformers' export of the same weights
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python bench/export.py r18   # as on a CPU without AMX, whose bf16 units make INT8's lead small
    python bench/export.py table NAME WEIGHTS DATA    # every backend that is here, on the val split of DATA
    python bench/export.py figures                    # figures/deployment.png and .pdf, from the committed results
"""
import argparse, json, os, tempfile
from pathlib import Path

import numpy as np
import torch

from rtdetr_kd.files import root, write_json
from rtdetr_kd.data.split import part
from rtdetr_kd.data.dataset import load_data
from rtdetr_kd.deploy.export import write_onnx, write_openvino
from rtdetr_kd.deploy.latency import draw_published, machine, markdown_table, measure, race, rows_of, write_table
from rtdetr_kd.model.detector import RTDETR, Spec
from rtdetr_kd.model.sizes import SIZES
from rtdetr_kd.deploy.calibrate import calibrate
from rtdetr_kd.deploy.quantize import gate, sensitivity, write_int8
from rtdetr_kd.model.foreign_weights import COCO_NAMES, save_huggingface
from rtdetr_kd.model.weights import load_model, save_model

PUBLISHED = root() / "runs" / "published" / "latency"


def settled(side=640, seed=0) -> RTDETR:
    "An R18 of random weights whose batch norms have seen images and whose outputs are spread: for timing only"
    torch.manual_seed(seed)
    m = RTDETR(Spec(COCO_NAMES, **(SIZES["r18"] | dict(image_size=side)))).train()
    for b in m.modules():
        if isinstance(b, torch.nn.BatchNorm2d): b.momentum = None; b.reset_running_stats()
    with torch.no_grad():
        for _ in range(3): m.decoder.input_proj[0](m.encoder(m.backbone(torch.rand(1, 3, side, side)))[0])
        for p, x in zip(m.decoder.input_proj, m.encoder(m.backbone(torch.rand(1, 3, side, side)))): p(x)
        for h in (m.decoder.enc_score_head, *m.decoder.dec_score_head): torch.nn.init.normal_(h.weight, std=.1)
        for h in (m.decoder.enc_bbox_head, *m.decoder.dec_bbox_head): torch.nn.init.normal_(h.layers[-1].weight, std=.02)
        for l in m.decoder.decoder.layers: torch.nn.init.normal_(l.cross_attn.sampling_offsets.weight, std=.02)
    return m.eval()


def theirs(model, folder):
    "transformers' RT-DETR with the same weights, exported by the same exporter"
    from transformers import RTDetrForObjectDetection
    save_huggingface(model, folder / "hf")
    hf = RTDetrForObjectDetection.from_pretrained(folder / "hf").eval()
    class Outputs(torch.nn.Module):
        def __init__(self): super().__init__(); self.m = hf
        def forward(self, images): o = self.m(images); return o.logits, o.pred_boxes
    n = model.spec.image_size
    torch.onnx.export(Outputs().eval(), (torch.rand(1, 3, n, n),), dynamo=True, opset_version=18, input_names=["images"],
                      output_names=["logits", "boxes"], external_data=False, verbose=False).save(folder / "theirs.onnx", external_data=False)
    return folder / "theirs.onnx"


def session(path, threads, kind, hint="f32"):
    "A function of one image for one runtime; `images` as the file wants them"
    floats = path.name.startswith("theirs")
    ready = lambda x: np.ascontiguousarray(x.transpose(0, 3, 1, 2)).astype(np.float32) / 255 if floats else x
    if kind == "ort":
        import onnxruntime as ort
        o = ort.SessionOptions(); o.intra_op_num_threads = threads
        o.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle sessions must not slow the others down
        s = ort.InferenceSession(str(path), o, providers=["CPUExecutionProvider"])
        return lambda x: s.run(None, {"images": x}), ready
    import openvino as ov
    c = ov.Core()
    r = c.compile_model(c.read_model(str(path)), "CPU", dict(INFERENCE_NUM_THREADS=threads, INFERENCE_PRECISION_HINT=hint, PERFORMANCE_HINT="LATENCY")).create_infer_request()
    return lambda x: r.infer({0: x}), ready


def r18(threads, rounds, side, keep):
    folder = Path(keep or tempfile.mkdtemp()); folder.mkdir(parents=True, exist_ok=True)
    ours, other = folder / "ours.onnx", folder / "theirs.onnx"
    if not other.exists():
        model = settled(side)
        write_onnx(model, ours, batch=1); theirs(model, folder)
    if not (folder / "ours.ov8.onnx").exists():
        noise = part(load_data("toy")["select"], range(8))
        recipe = calibrate(ours, noise, 8, "minmax")
        for target, name in (("onnxruntime", "ort8"), ("openvino", "ov8")): write_int8(ours, folder / f"ours.{name}.onnx", recipe, target)
    made = dict(ort_theirs=(other, "ort", "f32"), ort_ours=(ours, "ort", "f32"), ort_int8=(folder / "ours.ort8.onnx", "ort", "f32"),
                ov_theirs=(other, "ov", "f32"), ov_ours=(ours, "ov", "f32"), ov_theirs_bf16=(other, "ov", "bf16"), ov_ours_bf16=(ours, "ov", "bf16"),
                ov_int8_f32=(folder / "ours.ov8.onnx", "ov", "f32"), ov_int8_bf16=(folder / "ours.ov8.onnx", "ov", "bf16"))
    image = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    calls = {}
    for k, (path, kind, hint) in made.items():
        run, ready = session(path, threads, kind, hint)
        x = ready(image)
        calls[k] = lambda _, run=run, x=x: run(x)
    t = race(calls, None, rounds, 2, seconds=600)
    ms = {k: 1e3 * float(np.median(v)) for k, v in t.items()}
    best = {k: 1e3 * float(np.min(v)) for k, v in t.items()}
    pairs = dict(fp32_ort=("ort_theirs", "ort_ours"), fp32_openvino=("ov_theirs", "ov_ours"), bf16_openvino=("ov_theirs_bf16", "ov_ours_bf16"),
                 int8_over_fp32_openvino=("ov_ours", "ov_int8_bf16"), int8_over_bf16_openvino=("ov_ours_bf16", "ov_int8_bf16"),
                 int8_over_theirs_bf16_openvino=("ov_theirs_bf16", "ov_int8_bf16"), int8_over_fp32_ort=("ort_ours", "ort_int8"))
    ratios = {k: float(np.median(t[a] / t[b])) for k, (a, b) in pairs.items()}
    for k in ms: print(f"{k:16} median {ms[k]:7.1f} ms   least {best[k]:7.1f}")
    for k, v in ratios.items(): print(f"{k:32} {v:.2f}x (of the least times {best[pairs[k][0]] / best[pairs[k][1]]:.2f}x)")
    return dict(about=dict(model="r18, random weights", side=side, isa=os.environ.get("ONEDNN_MAX_CPU_ISA", "all of the CPU's"), rounds=len(t["ort_ours"]), machine=machine(threads)), median_ms=ms, least_ms=best, ratios=ratios)


def export_all(model, folder, stem, splits):
    "The files of all backends; what the gate said; what each part costs"
    onnx = write_onnx(model, folder / f"{stem}.onnx")
    write_openvino(onnx, folder / f"{stem}.xml")
    passed = {t: gate(onnx, folder / f"{stem}.int8.{end}", splits["select"], splits["select"], t) for t, end in (("onnxruntime", "onnx"), ("openvino", "xml"))}
    recipe = calibrate(onnx, splits["select"], method=passed["openvino"]["method"])
    parts = sensitivity(onnx, recipe, splits["select"], folder)
    return passed, parts


def table(name, weights, data, threads, rounds, keep, again):
    folder = Path(keep or tempfile.mkdtemp()); folder.mkdir(parents=True, exist_ok=True)
    splits, stem, model = load_data(data), Path(weights).stem, load_model(weights)
    if again: old = json.loads((PUBLISHED / f"{name}.json").read_text())["about"]; passed, parts = old["gate"], old["sensitivity"]
    else: passed, parts = export_all(model, folder, stem, splits)
    rows, absent = rows_of(weights, folder, threads)
    t = measure(rows, splits["val"], rounds=rounds)
    about = dict(data=name, split="val", images=len(splits["val"]), weights=Path(weights).name, gate=passed, sensitivity=parts, absent=sorted(absent), machine=machine(threads))
    write_table(t, PUBLISHED / name, about)
    print(markdown_table(t)); print("absent:", ", ".join(sorted(absent)))
    for r in parts: print(f"{r['part']:18} AP {r['AP']:.3f}  costs {100 * r['loss']:5.2f} points")


if __name__ == "__main__":
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("what", choices=["r18", "table", "figures"]); a.add_argument("name", nargs="?"); a.add_argument("weights", nargs="?"); a.add_argument("data", nargs="?")
    a.add_argument("--threads", type=int, default=2); a.add_argument("--rounds", type=int, default=11); a.add_argument("--side", type=int, default=640)
    a.add_argument("--keep", help="folder for the exported files"); a.add_argument("--publish", action="store_true")
    a.add_argument("--again", action="store_true", help="time the files in --keep again; gate and sensitivity from the published table")
    a = a.parse_args()
    if a.what == "figures": draw_published(root() / "figures" / "deployment")
    elif a.what == "table": table(a.name, a.weights, a.data, a.threads, a.rounds, a.keep, a.again)
    else:
        result = r18(a.threads, a.rounds, a.side, a.keep)
        if a.publish: PUBLISHED.mkdir(parents=True, exist_ok=True); write_json(PUBLISHED / f"r18-{a.side}{'-avx512' * ('ONEDNN_MAX_CPU_ISA' in os.environ)}.json", result)
