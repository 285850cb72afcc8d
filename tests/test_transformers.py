"Our RT-DETR against Hugging Face's, with the same random weights: outputs, training losses, and files both ways"

from dataclasses import replace

import pytest
import torch

from rtdetr_kd.model.losses import detection_losses
from rtdetr_kd.model.detector import RTDETR
from rtdetr_kd.model.foreign_weights import from_hf, infer_spec, save_huggingface
from rtdetr_kd.model.weights import load_state, read_weights

transformers = pytest.importorskip("transformers", reason="transformers is a test extra: pip install -e '.[dev]'")
SIZE = (128, 160)
# all cells of that size: with random weights the scores lie so close that the last of a top 300 is decided by rounding
QUERIES = 16 * 20 + 8 * 10 + 4 * 5
SHAPES = {
    18: ("basic", [2, 2, 2, 2], 3),
    34: ("basic", [3, 4, 6, 3], 4),
    50: ("bottleneck", [3, 4, 6, 3], 6),
    101: ("bottleneck", [3, 4, 23, 3], 6),
}


def theirs(depth: int, v2: bool = False, method: str = "default"):
    "A transformers model with every tensor shaken, so that nothing agrees by being zero"
    kind, depths, layers = SHAPES[depth]
    basic = kind == "basic"
    body = transformers.RTDetrResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512] if basic else [256, 512, 1024, 2048],
        depths=depths,
        layer_type=kind,
        downsample_in_bottleneck=False,
        out_features=["stage2", "stage3", "stage4"],
    )
    wide = dict(encoder_hidden_dim=384, encoder_ffn_dim=2048, decoder_in_channels=[384] * 3) if depth == 101 else {}
    config, model = (
        (transformers.RTDetrV2Config, transformers.RTDetrV2ForObjectDetection)
        if v2
        else (transformers.RTDetrConfig, transformers.RTDetrForObjectDetection)
    )
    if v2:
        wide["decoder_method"] = method
    torch.manual_seed(0)
    m = model(
        config(
            backbone_config=body,
            encoder_in_channels=[128, 256, 512] if basic else [512, 1024, 2048],
            hidden_expansion=0.5 if basic else 1.0,
            decoder_layers=layers,
            num_labels=80,
            num_queries=QUERIES,
            **wide,
        )
    ).eval()
    for k, v in m.state_dict().items():
        if v.is_floating_point() and "n_points_scale" not in k:
            v.add_(torch.randn_like(v).abs() * 0.02 if "running_var" in k else torch.randn_like(v) * 0.01)
    return m


def pair(depth, v2=False, method="default"):
    m = theirs(depth, v2, method)
    state = from_hf(m.state_dict())
    attention = "discrete" if method == "discrete" else "deformable"
    ours = RTDETR(replace(infer_spec(state), queries=QUERIES, attention=attention)).eval()
    load_state(ours, state, "transformers")
    return m, ours


@pytest.mark.parametrize(
    "depth, v2, method",
    [
        (18, False, "default"),
        (34, False, "default"),
        (50, False, "default"),
        (101, False, "default"),
        (18, True, "default"),
        (18, True, "discrete"),
    ],
)
def test_same_outputs(depth, v2, method):
    m, ours = pair(depth, v2, method)
    x = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        a, b = m(x), ours(x)
    # as sets: a tie may change two queries' places
    gap = (
        (torch.cat([a.logits, a.pred_boxes], -1)[:, :, None] - torch.cat([b.logits, b.boxes], -1)[:, None])
        .abs()
        .amax(-1)
    )
    assert gap.min(1).values.max() < 1e-4 and gap.min(2).values.max() < 1e-4


@pytest.mark.parametrize("depth, v2", [(18, False), (34, False), (50, False), (101, False), (18, True)])
def test_same_training_losses(depth, v2):
    "With the same random numbers for the denoising queries, every term of the loss agrees"
    m, ours = pair(depth, v2)
    m.train()
    ours.train()
    ours.backbone.eval()  # transformers freezes the backbone's norms
    x = torch.rand(2, 3, *SIZE)
    targets = [
        dict(
            labels=torch.tensor([3, 17, 3]),
            boxes=torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.6, 0.5, 0.4], [0.8, 0.2, 0.1, 0.1]]),
        ),
        dict(labels=torch.tensor([79]), boxes=torch.tensor([[0.5, 0.5, 0.3, 0.6]])),
    ]
    torch.manual_seed(1)
    a = m(x, labels=[dict(class_labels=t["labels"], boxes=t["boxes"]) for t in targets])
    torch.manual_seed(1)
    b = detection_losses(ours(x, targets), targets)
    n = ours.spec.layers
    at = [
        ("", ""),
        ("_enc", f"_aux_{n - 1}"),
        *((f"_aux{k}", f"_aux_{k}") for k in range(n - 1)),
        *((f"_dn{k}", f"_dn_{k}") for k in range(n)),
    ]
    names = dict(vfl="loss_vfl", l1="loss_bbox", giou="loss_giou")
    for k, name in names.items():
        for ours_at, theirs_at in at:
            assert b[k + ours_at].item() == pytest.approx(a.loss_dict[name + theirs_at].item(), rel=1e-4), (
                k + ours_at
            )


def test_files_both_ways(tmp_path):
    m, ours = pair(18)
    m.save_pretrained(tmp_path / "theirs")
    state, spec, _ = read_weights(tmp_path / "theirs")
    assert spec.layers == 3 and all(
        torch.equal(state[k], v) for k, v in ours.state_dict().items() if not k.endswith("num_batches_tracked")
    )
    save_huggingface(ours, tmp_path / "ours")
    again = transformers.RTDetrForObjectDetection.from_pretrained(tmp_path / "ours").eval()
    x = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        a, b = again(x), m(x)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.pred_boxes, b.pred_boxes)
