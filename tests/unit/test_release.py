"""What is in a release beside the weights: the card, headers, other libraries' layouts; and nothing that is private."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoModel

from lcl_ds.assembly import attach_objective
from lcl_ds.convert import main
from lcl_ds.errors import UserError
from lcl_ds.evaluation.encoder import of_network, open_released
from lcl_ds.metrics import METRICS
from lcl_ds.models.pooling import POOLING_FILE
from lcl_ds.models.vision import family_inputs
from lcl_ds.objectives import NAMES, trained_losses
from lcl_ds.objectives.base import local_normalizers
from lcl_ds.release.exports import release_torch
from lcl_ds.release.options import ReleaseOptions
from lcl_ds.release.origin import WeightOrigin, pools, published_settings
from lcl_ds.release.parity import largest_difference
from lcl_ds.release.plain import plain_transformer, with_bias_in_positions
from lcl_ds.release.record import RunRecord, read_record
from lcl_ds.release.to_open_clip import open_clip_config, open_clip_weights
from lcl_ds.release.to_timm import timm_arguments, timm_weights
from lcl_ds.release.vision import release_vision
from tests.support.native import NATIVE
from tests.support.pages import blocks_of
from tests.support.ranks import ROOT
from tests.support.small import IMAGE_SIZE, VISION_TOWERS, shake, small_config, small_model, three_documents

CLIP = "clip_vision_model"
FIGURE = {"task": "linear", "dataset": "held-out documents", "metric": "accuracy", "value": 0.9125, "count": 500}


def shaken(family=CLIP, *overrides, seed=0):
    """A small model of which every weight that is released was moved."""
    model = small_model(small_config(f"model.vision={VISION_TOWERS[family]}", *overrides)).eval()
    shake(model.vision, model.pooling, seed=seed)
    return model


def origin(**facts):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    values = {
        "name": "small",
        "history": "in a test",
        "settings": {},
        "pixels": pixels,
        "pixels_kind": "images of noise",
    }
    return WeightOrigin(**{**values, **facts})


def images_of(model):
    return model.vision.normalize(torch.from_numpy(origin().pixels))


# The weights


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_a_release_that_computes_something_else_is_refused_by_name(wrong):
    ours = {"patches": torch.full((2, 3), 10.0), "pooled": torch.zeros(2)}
    theirs = {"patches": ours["patches"] + 0.9, "pooled": torch.full((2,), 0.05)}
    assert largest_difference(ours, theirs, 0.1, "it") == pytest.approx(0.9)
    with pytest.raises(RuntimeError, match=r"it differs from the training model: patches by .* \(allowed: 1.0e\+00\)$"):
        largest_difference(ours, theirs | {"patches": ours["patches"] + wrong}, 0.1, "it")


@pytest.mark.parametrize(("dtype", "largest"), [("bf16", 2e-2), ("fp16", 3e-3)])
def test_weights_have_the_dtype_that_was_asked_for_and_nearly_the_features(dtype, largest, tmp_path):
    model = shaken()
    assert f"allowed: {'5e-02' if dtype == 'bf16' else '1e-02'}" in release_vision(
        model, origin(), tmp_path, ReleaseOptions(dtype=dtype)
    )
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for code in (False, True):
        released = AutoModel.from_pretrained(tmp_path, trust_remote_code=code)
        assert {weight.dtype for weight in released.parameters()} == {wanted}
    with torch.no_grad():
        patches = released.float()(images_of(model)).last_hidden_state
        difference = (patches - model.vision(images_of(model))).abs().max()
    assert 1e-5 < difference < largest


def test_a_weight_that_fp16_cannot_hold_is_refused(tmp_path):
    model = shaken()
    with torch.no_grad():
        model.pooling.proj.weight[0, 0] = 1e5
    with pytest.raises(UserError, match="--dtype fp16: the weight proj.weight is too large for it; use bf16 or fp32"):
        release_vision(model, origin(), tmp_path, ReleaseOptions(dtype="fp16"))


def test_weights_in_several_files_load_as_one_and_every_header_says_where_they_come_from(tmp_path):
    model = shaken("dinov2")
    record = RunRecord(step=7, images=1234, commit="abc")
    release_vision(model, origin(record=record), tmp_path, ReleaseOptions(shard_size="20KB"))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 25_000 for file in files if file.name != "pooling.safetensors")
    for file in files:
        with safe_open(file, "pt") as opened:
            said = opened.metadata()
        assert said.items() >= {"recipe": "small", "step": "7", "images_seen": "1234", "git_commit": "abc"}.items()
        assert "lcl_ds" in said
    released = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(released(images_of(model)).last_hidden_state, model.vision(images_of(model)))


def test_pooling_leaves_out_the_patches_that_fill_up_a_narrow_picture(tmp_path):
    release_vision(shaken("siglip2_vision_model"), origin(), tmp_path)
    released = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    inputs = family_inputs(released, images_of(shaken("siglip2_vision_model")))
    inputs["spatial_shapes"] = torch.tensor([[1, 2]] * 3)
    inputs["pixel_attention_mask"] = torch.tensor([[1, 1, 0, 0]] * 3)
    with torch.no_grad():
        outputs = released(**inputs)
        alone = released.pooling(outputs.last_hidden_state[:, :2])
    torch.testing.assert_close(outputs.pooler_output, alone, rtol=1e-5, atol=1e-5)


# The pooling


@pytest.mark.parametrize("name", NAMES)
def test_a_pooling_is_claimed_exactly_where_training_moves_it(name):
    config = small_config(f"objective.name={name}")
    objective, batch = attach_objective(small_model(config), config), three_documents(config)
    objective(batch, local_normalizers(objective, batch)[0])["loss"].backward()
    assert pools(objective.model, config.objective) == (objective.model.pooling.query.grad is not None)


@pytest.mark.parametrize("family", [CLIP, "siglip2_vision_model"])
def test_evaluation_reads_the_pooling_of_a_release_and_runs_no_code_of_it(family, tmp_path):
    model = shaken(family)
    release_vision(model, origin(), tmp_path)
    (tmp_path / "modeling_lcl.py").write_text("raise SystemExit('the code of the folder ran')")
    encoder = open_released(str(tmp_path))
    pixels = torch.from_numpy(origin().pixels)
    with torch.no_grad():
        theirs, ours = encoder.encode(pixels), of_network(model, "trained").encode(pixels)
    for kind, vector in ours.vectors().items():
        torch.testing.assert_close(theirs.vectors()[kind], vector, rtol=1e-5, atol=1e-5)
    assert len(list(encoder.module.parameters())) == sum(
        len(list(p.parameters())) for p in (model.vision, model.pooling)
    )
    (tmp_path / "pooling.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="nor a vision model that transformers loads"):
        open_released(str(tmp_path))


def test_a_contrastive_loss_of_no_weight_trains_no_pooling():
    settings = small_config("objective.contrastive_weight=0").objective
    assert not pools(small_model(), settings)
    assert trained_losses(settings) == {"generation_loss"}


def test_without_a_trained_pooling_none_is_released_and_none_is_shown(tmp_path):
    model = shaken()
    record = RunRecord(figures=[{**FIGURE, "features": "head"}, {**FIGURE, "features": "mean"}])
    release_vision(model, origin(pools=False, record=record), tmp_path)
    assert not (tmp_path / POOLING_FILE).exists()
    released = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        outputs = released(images_of(model))
        assert torch.equal(released(images_of(model), return_dict=False)[0], outputs.last_hidden_state)
    assert outputs.pooler_output is None
    assert torch.equal(outputs.last_hidden_state, model.vision(images_of(model)))
    card = (tmp_path / "README.md").read_text()
    assert "attentive pooling" not in card.split("## Evaluation")[0]
    assert "pooler_output" not in card
    assert [figure.task_name for figure in ModelCard(card).data.eval_results] == ["linear mean"]


# The card


def test_the_card_tells_hugging_face_licence_and_figures(tmp_path):
    record = RunRecord(figures=[{**FIGURE, "features": "head", "label": "a|b", "low": 0.88, "high": 0.93}])
    release_vision(shaken(), origin(record=record), tmp_path, ReleaseOptions(license="apache-2.0"))
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    (figure,) = card.data.eval_results
    assert (figure.task_type, figure.metric_type, figure.metric_value) == ("image-classification", "accuracy", 0.9125)
    assert figure.task_name == "linear head a|b"
    assert "| linear | head | a\\|b | accuracy | 91.2 % | 88.0 to 93.0 |  | 500 |" in card.text
    assert "Licence of the weights: apache-2.0." in card.text


def test_what_nobody_stated_or_wrote_down_is_not_invented(tmp_path):
    release_vision(shaken(), origin(), tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license is None
    assert card.data.eval_results is None
    assert "Licence of the weights: not stated" in card.text
    assert "How much data it has seen is not recorded." in card.text
    assert "The run has no final evaluation of these weights." in card.text


def test_the_card_says_which_shapes_of_images_the_encoder_was_trained_with(tmp_path):
    cards = []
    for number, way in enumerate(((), NATIVE)):
        config, pixels = small_config(*way), np.zeros((2, 3, 16, 16), np.uint8)
        origin = WeightOrigin("small", "in a test", {}, pixels, "images", config=config)
        release_vision(small_model(config).eval(), origin, tmp_path / str(number))
        cards.append((tmp_path / str(number) / "README.md").read_text())
    assert "It was trained with squares of 16 px." in cards[0]
    assert "whole images in their own aspect ratio, of 6 to 6 patches" in cards[1]
    assert "(`interpolate_pos_encoding=True`)" in cards[1]


@pytest.mark.parametrize(("family", "dtype"), [("siglip2_vision_model", "fp32"), ("dinov2", "bf16")])
def test_the_code_in_the_card_runs_as_printed(family, dtype, tmp_path, monkeypatch):
    folder = tmp_path / 'é "so to\\say"'
    release_vision(shaken(family), origin(), folder, ReleaseOptions(dtype=dtype))
    monkeypatch.chdir(tmp_path)
    with_code, plain = (block.text for block in blocks_of(folder / "README.md") if block.language == "python")
    names: dict = {}
    exec(with_code, names)
    assert names["features"].shape == (1, 32)
    patches = names["patches"]
    exec(plain, names)
    assert patches.shape == names["patches"].shape == (1, 4, 32)
    torch.testing.assert_close(patches, names["patches"])


SECRET = "private-place"


def private_settings():
    """What may be shown of a run whose settings name places of every kind."""
    config = small_config(
        f"data.shards=[{{name: web, paths: 'pipe:curl {SECRET}'}}]",
        f"data.tokenizer=/home/{SECRET}/tokenizer",
        f"data.exclude=[/home/{SECRET}.txt]",
        f"evaluation.shards='https://host/a.tar?signature={SECRET}'",
        f"model.init_from={SECRET}",
        f"model.allow_missing=['{SECRET}*']",
    )
    return published_settings(config.model_dump(mode="json"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model, and the folder of its graph."""
    model, folder = shaken("siglip2_vision_model"), tmp_path_factory.mktemp("exported")
    assert "max abs difference 0.0e+00" in release_torch(model, origin(settings=private_settings()), folder)
    return model, folder


def test_nothing_private_is_in_a_release(exported, tmp_path):
    release_vision(shaken(), origin(settings=private_settings()), tmp_path)
    for folder in (tmp_path, exported[1]):
        files = [file for file in folder.rglob("*") if file.is_file()]
        assert len(files) > 2
        for file in files:
            assert SECRET.encode() not in file.read_bytes(), file
            assert str(ROOT).encode() not in file.read_bytes(), file
        assert "learning_rate: 0.001" in (folder / "README.md").read_text()


# What a run wrote down


def a_run(folder, steps):
    """The folder of a checkpoint in a run of which only the text files are there."""
    rows = [
        {"step": step, "images": 10, "tokens": 100, "step_s": 36.0, "sources": {"web": {"documents": 5, "images": 10}}}
        for step in steps
    ]
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, gpu in enumerate([None, "H100", "H100"], 1):
        start = folder / "history" / f"{number:04d}"
        start.mkdir(parents=True)
        (start / "environment.json").write_text(json.dumps({"world_size": 8, "gpu": gpu, "git_commit": f"c{number}"}))
    (folder / "evaluation.json").write_text(json.dumps({"step": 3, "figures": [FIGURE, "no figure", {"value": 1}]}))
    return folder / "checkpoints" / "step_00000003"


def test_the_record_counts_the_steps_of_the_checkpoint_and_no_later_ones(tmp_path):
    record = read_record(a_run(tmp_path, range(1, 6)), 3)
    assert (record.images, record.tokens, record.hours) == (30, 300, 0.03)
    assert record.sources == {"web": {"documents": 15, "images": 30}}
    assert (record.hardware, record.commit) == ("8 processes on a CPU, then 8 x H100", "c3")
    assert record.figures == [FIGURE]
    assert read_record(tmp_path / "checkpoints" / "step_00000002", 2).figures == []


def test_the_figures_of_the_weights_are_not_those_of_their_average(tmp_path):
    record = read_record(a_run(tmp_path, range(1, 6)), 3, ema=True)
    assert record.figures == []
    assert "not of their moving average" in record.no_figures


def test_what_is_missing_or_damaged_in_a_run_is_unknown_and_stops_nothing(tmp_path):
    record = read_record(a_run(tmp_path, [1, 3]), 3)
    assert (record.images, record.sources, record.hours) == (None, {}, None)
    for strange in ({"sources": 5}, {"sources": {"web": {"documents": "many"}}}, {"sources": {"web": None}}, {}):
        (tmp_path / METRICS).write_text(json.dumps({"step": 1, **strange}))
        assert read_record(tmp_path / "checkpoints" / "x", 1).sources == {}
    for strange in ([1], {"step": 3, "figures": 7}, {"step": 3, "figures": [{**FIGURE, "low": "deep"}]}):
        (tmp_path / "evaluation.json").write_text(json.dumps(strange))
        assert read_record(tmp_path / "checkpoints" / "x", 3).figures == []
    (tmp_path / METRICS).write_bytes(b"\0\n{}\n{")
    (tmp_path / "evaluation.json").write_text("[1")
    for file in tmp_path.rglob("environment.json"):
        file.write_text("7")
    assert read_record(tmp_path / "checkpoints" / "x", 3) == RunRecord(step=3)
    assert read_record(tmp_path / "nowhere" / "x" / "y", 3) == RunRecord(step=3)


# Other libraries


ENDS = ("weight", "bias")


def vit(weights, arguments, images, eps, prefix):
    """A vision transformer as timm computes it, written down from its arguments."""
    x = F.conv2d(
        images, weights["patch_embed.proj.weight"], weights.get("patch_embed.proj.bias"), arguments["patch_size"]
    )
    x = x.flatten(2).transpose(1, 2)
    if arguments["class_token"]:
        x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + weights["pos_embed"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    activation = {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    }[arguments["act_layer"]]
    if arguments["pre_norm"]:
        x = norm(x, "norm_pre")
    for number in range(arguments["depth"]):
        block = f"blocks.{number}"
        scales = [weights.get(f"{block}.ls{k}.gamma", 1.0) for k in (1, 2)]
        heads = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(-1, (3, arguments["num_heads"], -1))
        attended = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
        x = x + scales[0] * linear(attended, f"{block}.attn.proj")
        hidden = activation(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        assert hidden.shape[-1] == int(arguments["embed_dim"] * arguments["mlp_ratio"])
        x = x + scales[1] * linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")[:, prefix:]


PLAIN = [
    *((family, "hidden_act=gelu") for family in VISION_TOWERS),
    *((CLIP, f"hidden_act={act}") for act in ("quick_gelu", "gelu_pytorch_tanh")),
    ("dinov2", "qkv_bias=false"),
]


@pytest.mark.parametrize(("family", "setting"), PLAIN)
def test_every_family_is_a_plain_vision_transformer(family, setting):
    model = shaken(family, f"model.vision.{setting}")
    plain = plain_transformer(model.vision.model, "timm")
    arguments = timm_arguments(plain)
    with torch.no_grad():
        theirs = vit(timm_weights(plain), arguments, images_of(model), plain.eps, int(plain.has_class_token))
        torch.testing.assert_close(theirs, model.vision(images_of(model)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["siglip_vision_model", "dinov2"])
def test_a_bias_of_the_patches_may_lie_in_their_positions(family):
    model = shaken(family)
    plain = plain_transformer(model.vision.model, "timm")
    weights = with_bias_in_positions(plain)
    assert "patch_embed.proj.bias" not in weights
    with torch.no_grad():
        theirs = vit(weights, timm_arguments(plain), images_of(model), plain.eps, int(plain.has_class_token))
        torch.testing.assert_close(theirs, model.vision(images_of(model)), rtol=1e-4, atol=1e-5)


def test_open_clip_finds_the_names_of_its_own_tower():
    plain = plain_transformer(shaken("dinov2").vision.model, "open_clip")
    block = {f"{part}.{kind}" for part in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj") for kind in ENDS}
    block |= {"attn.in_proj_weight", "attn.in_proj_bias", "ls_1.gamma", "ls_2.gamma"}
    expected = {f"transformer.resblocks.{number}.{name}" for number in (0, 1) for name in block}
    expected |= {"class_embedding", "positional_embedding", "conv1.weight", "ln_post.weight", "ln_post.bias", "proj"}
    weights = open_clip_weights(plain)
    assert weights.keys() == expected
    assert weights["class_embedding"].shape == (32,)
    assert weights["positional_embedding"].shape == (5, 32)
    tower = open_clip_config(plain)["vision_cfg"]
    assert (tower["no_ln_pre"], tower["norm_kwargs"], tower["ls_init_value"] > 0) == (True, {"eps": 1e-6}, True)


def test_what_is_no_plain_vision_transformer_is_refused_in_a_sentence():
    other = shaken("dinov2", "model.vision.use_swiglu_ffn=true").vision.model
    with pytest.raises(
        UserError, match=r"--format timm: .* no place for the weight blocks.0.mlp.down_proj.* use --format hf"
    ):
        plain_transformer(other, "timm")
    other = shaken(CLIP, "model.vision.hidden_act=relu", "model.vision.layer_norm_eps=1.0e-7").vision.model
    with pytest.raises(UserError, match="norms with epsilon 1e-07 and the activation relu of this clip_vision_model"):
        plain_transformer(other, "open_clip")


def test_an_exported_graph_takes_any_number_of_images_by_name(exported, monkeypatch):
    model, folder = exported
    program = torch.export.load(folder / "model.pt2").module()
    images = images_of(model).repeat(3, 1, 1, 1)
    with torch.no_grad():
        outputs = program(pixel_values=images)
        patches = model.vision(images)
        torch.testing.assert_close(outputs["patches"], patches, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs["pooled"], model.pooling(patches)[0], rtol=1e-4, atol=1e-5)
    monkeypatch.chdir(folder.parent)
    (code,) = [block.text for block in blocks_of(folder / "README.md") if block.language == "python"]
    names: dict = {}
    exec(code, names)
    assert (names["patches"].shape, names["features"].shape) == ((1, 4, 32), (1, 32))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--format", "timm", "--part", "full"], "--format timm: it holds the encoder alone; leave out --part full"),
        (["--format", "torch", "--dtype", "bf16"], "--dtype bf16: this release is written in fp32"),
        (["--format", "reference", "--dtype", "bf16"], "--dtype bf16: this release is written in fp32"),
        (["--format", "torch", "--shard_size", "1GB"], "--shard_size: this release has one file of weights"),
    ],
)
def test_arguments_that_contradict_each_other_are_named_before_anything_is_read(arguments, sentence, tmp_path, capsys):
    assert main([str(tmp_path / "no run"), str(tmp_path / "out"), *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


@pytest.mark.parametrize(("layout", "module"), [("timm", "timm"), ("open_clip", "open_clip"), ("onnx", "onnxscript")])
def test_a_missing_library_is_named_with_its_extra(layout, module, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)  # as if it were not installed
    assert main([str(tmp_path / "no run"), str(tmp_path / "out"), "--format", layout]) == 2
    said = capsys.readouterr().err
    assert f"--format {layout}: {module}, which checks what is written, cannot be loaded" in said
    assert f"pip install 'lcl_ds[{layout}]'" in said
