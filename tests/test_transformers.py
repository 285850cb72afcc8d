"Our RT-DETR against Hugging Face's, with the same random weights: outputs, training losses, and files both ways"

from dataclasses import replace

import pytest
import torch

from rtdetr_kd.model.losses import detection_losses
from rtdetr_kd.model.detector import RTDETR, Spec
from rtdetr_kd.model.foreign_weights import COCO_IDS, COCO_NAMES, HUB_NAMES, from_hf, infer_spec, save_huggingface
from rtdetr_kd.model.weights import load_model, load_state, read_weights

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


def small(v2=False, **changes):
    "A narrow transformers model with shaken tensors"
    body = transformers.RTDetrResNetConfig(
        embedding_size=16, out_features=["stage2", "stage3", "stage4"],
        **dict(hidden_sizes=[16, 32, 64, 128], depths=[2, 2, 2, 2], layer_type="basic") | changes.pop("body", {}))
    kind = ("RTDetrV2" if v2 else "RTDetr")
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=body, encoder_hidden_dim=64, encoder_ffn_dim=64,
        d_model=64, decoder_in_channels=[64] * 3, decoder_ffn_dim=64, hidden_expansion=0.5,
        **dict(num_labels=5, decoder_layers=2, num_queries=84, encoder_in_channels=[32, 64, 128]) | changes)
    torch.manual_seed(0)
    m = getattr(transformers, f"{kind}ForObjectDetection")(config).eval()
    for k, v in m.state_dict().items():
        if v.is_floating_point() and "n_points_scale" not in k:
            v.add_(torch.randn_like(v).abs() * 0.1 if "running_var" in k else torch.randn_like(v) * 0.05)
    return m


def gap(theirs, ours):
    "Largest difference of logits and boxes, query by query, on one picture of 64 pixels: all cells are queries"
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        a, b = theirs(x), ours(x)
    a, b = torch.cat([a.logits, a.pred_boxes], -1)[0], torch.cat([b.logits, b.boxes], -1)[0]
    return (a[:, None] - b).abs().amax(-1).min(0).values.max().item()


@pytest.mark.parametrize("scale", [0.5, 0.25, 0.8, 1.0])
@pytest.mark.parametrize("method", ["default", "discrete"])
def test_the_reach_of_version_two(tmp_path, scale, method):
    small(True, decoder_offset_scale=scale, decoder_method=method).save_pretrained(tmp_path)
    again = transformers.RTDetrV2ForObjectDetection.from_pretrained(tmp_path).eval()
    assert gap(again, load_model(tmp_path)) < 1e-4


@pytest.mark.parametrize("changes", [
    dict(activation_function="relu"), dict(encoder_activation_function="relu"),
    dict(decoder_activation_function="gelu"), dict(layer_norm_eps=1e-3), dict(batch_norm_eps=1e-3),
    dict(positional_encoding_temperature=100), dict(encoder_attention_heads=4), dict(decoder_attention_heads=4),
    dict(normalize_before=True), dict(eval_size=64), dict(learn_initial_query=True),
    dict(encode_proj_layers=[1]), dict(body=dict(hidden_act="gelu")),
    dict(body=dict(downsample_in_first_stage=True))], ids=str)
def test_what_changes_the_function_is_refused(tmp_path, changes):
    small(**changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another network"):
        load_model(tmp_path)


def test_heads_are_read_where_both_have_them(tmp_path):
    m = small(encoder_attention_heads=4, decoder_attention_heads=4)
    m.save_pretrained(tmp_path)
    assert load_model(tmp_path).spec.heads == 4 and gap(m, load_model(tmp_path)) < 1e-4


@pytest.mark.parametrize("n", [0, 30])
def test_denoising_reads_back(tmp_path, n):
    small(num_denoising=n).save_pretrained(tmp_path)
    assert load_model(tmp_path).spec.denoising == n
    assert load_model(tmp_path / "model.safetensors").spec == load_model(tmp_path).spec  # by its file, the same


def test_the_processor_of_a_folder_is_read(tmp_path):
    small().save_pretrained(tmp_path)
    size = dict(height=320, width=320)
    transformers.RTDetrImageProcessor(size=size).save_pretrained(tmp_path)
    assert load_model(tmp_path).spec.image_size == 320 and load_model(tmp_path, image_size=256).spec.image_size == 256
    for more in (dict(do_normalize=True), dict(do_rescale=False), dict(resample=3),
                 dict(size=dict(height=320, width=640)), dict(size=dict(shortest_edge=320, longest_edge=640))):
        transformers.RTDetrImageProcessor(**dict(size=size) | more).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="other images"):
            load_model(tmp_path)


def test_a_folder_without_a_processor_says_so(tmp_path, capsys):
    small().save_pretrained(tmp_path)
    assert load_model(tmp_path).spec.image_size == 640 and "640 pixels are taken" in capsys.readouterr().out


def test_names_and_ids_of_a_folder(tmp_path):
    "80 classes of one's own are not COCO's; the Hub's spelling of COCO's is; ids go there and back"
    own = {k: f"part {k}" for k in range(80)}
    small(num_labels=80, id2label=own, label2id={v: k for k, v in own.items()}).save_pretrained(tmp_path / "own")
    spec = read_weights(tmp_path / "own")[1]
    assert spec.names == list(own.values()) and spec.category_ids == []
    hub = [dict(zip(HUB_NAMES.values(), HUB_NAMES)).get(n, n) for n in COCO_NAMES]
    named = dict(num_labels=80, id2label=dict(enumerate(hub)), label2id={n: k for k, n in enumerate(hub)})
    small(**named).save_pretrained(tmp_path / "hub")
    spec = read_weights(tmp_path / "hub")[1]
    assert spec.names == COCO_NAMES and spec.category_ids == COCO_IDS and "sofa" in hub
    ids = RTDETR(Spec(["x", "y"], width=16, d=64, d_ff=64, expansion=0.5, layers=2, image_size=320,
                      category_ids=[7, 900]))
    save_huggingface(ids, tmp_path / "ids")
    transformers.RTDetrForObjectDetection.from_pretrained(tmp_path / "ids").save_pretrained(tmp_path / "again")
    for folder in ("ids", "again"):
        assert load_model(tmp_path / folder).spec.category_ids == [7, 900]
    assert load_model(tmp_path / "ids").spec == ids.spec


def test_r50m_answers_the_same_there_and_back(tmp_path):
    "Its third layer of six answers; transformers' network answers with its last"
    torch.manual_seed(0)
    m = RTDETR(Spec(["x", "y"], "resnet50vd", width=16, d=64, d_ff=64, expansion=0.5, layers=6, answer=2, queries=84))
    m.eval()
    for k, v in m.state_dict().items():
        if v.is_floating_point():
            v.add_(torch.randn_like(v).abs() * 0.1 if "running_var" in k else torch.randn_like(v) * 0.05)
    save_huggingface(m, tmp_path)
    theirs, back = transformers.RTDetrForObjectDetection.from_pretrained(tmp_path).eval(), load_model(tmp_path)
    assert gap(theirs, m) < 1e-4 and gap(theirs, back) < 1e-4
    assert back.spec.answer == -1 and back.spec.layers == 3


def test_six_layers_of_transformers_answer_with_the_last(tmp_path):
    "The same shapes as R50-m's, read back as what they compute there"
    body = dict(layer_type="bottleneck", hidden_sizes=[64, 128, 256, 512], depths=[3, 4, 6, 3])
    m = small(decoder_layers=6, body=body, encoder_in_channels=[128, 256, 512])
    m.save_pretrained(tmp_path)
    assert load_model(tmp_path).spec.answer == -1 and gap(m, load_model(tmp_path)) < 1e-4
