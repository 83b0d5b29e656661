"""Weights given for parts of the network: the features of their source, and no weight random unnoticed."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CLIPConfig, CLIPModel

from lcl_ds.errors import UserError
from lcl_ds.models.build import build_empty_model, build_model
from lcl_ds.models.encoders import IMAGE_MEAN
from lcl_ds.models.initial import fill_weights
from lcl_ds.models.settings import part_of
from lcl_ds.models.vision import released_patch_tokens
from lcl_ds.models.weights.transfer import given_weights, resize_positions, vocabulary_rows
from lcl_ds.release.full import write_weights
from lcl_ds.release.options import ReleaseOptions
from lcl_ds.release.origin import WeightOrigin, published_settings
from lcl_ds.release.vision import release_vision
from lcl_ds.tokens import Vocabulary
from tests.support.small import DECODERS, IMAGE_SIZE, ROW_TOKENS, VISION_TOWERS, shake, small_config

TEXT = 60
VOCABULARY = Vocabulary(TEXT)


def started(*overrides, row_tokens=ROW_TOKENS, seed=0):
    """A model with the weights that the overrides ask for, its settings and what is said about it."""
    config = small_config(*overrides)
    model = build_empty_model(config.model, VOCABULARY.size, row_tokens)
    given, said = given_weights(model, config.model, TEXT, seed)
    fill_weights(model, 0, given)
    return model.eval(), config.model, said


def refused(*overrides, row_tokens=ROW_TOKENS):
    with pytest.raises(UserError) as error:
        started(*overrides, row_tokens=row_tokens)
    return error.value.problems


def causal_model(folder, family, vocab_size=TEXT, tied=None, **keys):
    """A published decoder in a folder: random weights, all of them apart from their initial values."""
    keys = {**yaml.safe_load(DECODERS[family]), "vocab_size": vocab_size, **keys}
    keys |= {} if tied is None else {"tie_word_embeddings": tied}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**keys, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    )
    shake(model)
    model.save_pretrained(folder)
    return model.eval()


def vision_model(folder, family, **keys):
    torch.manual_seed(1)
    keys = {**yaml.safe_load(VISION_TOWERS[family]), **keys}
    if family == "siglip2_vision_model":
        keys["num_patches"] = (keys["image_size"] // keys.pop("patch_size")) ** 2
        keys |= {"patch_size": 8}
        del keys["image_size"]  # as published folders have it
    model = AutoModel.from_config(AutoConfig.for_model(**keys))
    shake(model)
    model.save_pretrained(folder)
    return model.eval()


def pixels(size=IMAGE_SIZE):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_pretrained_decoder_gives_the_loss_of_its_own_class(family, tied, tmp_path):
    theirs = causal_model(tmp_path, family, tied=tied, vocab_size=TEXT + 4)  # four rows that no token uses
    model, settings, sentences = started(f"model.decoder={{pretrained: {tmp_path}}}")
    assert settings.decoder.model_type == family
    assert sentences == [
        f"model.decoder.pretrained: {tmp_path}: {len(list(model.decoder.parameters())) + norms(model) + 1} weights"
    ]
    ids = torch.randint(0, TEXT, (1, 12), generator=torch.Generator().manual_seed(0))
    model.decoder.set_attn_implementation("eager")  # the decoder is called without the network that tells it of rows
    with torch.no_grad():
        states = model.decoder(inputs_embeds=model.decoder.get_input_embeddings()(ids)).last_hidden_state
        logits = model.lm_head.norm(states) @ model.lm_head.weight.T
        cap = model.lm_head.softcap
        logits = cap * torch.tanh(logits / cap) if cap else logits
        torch.testing.assert_close(logits[..., :TEXT], theirs(ids).logits[..., :TEXT], rtol=1e-4, atol=1e-4)
        ours = model.lm_head(states[0, :-1], ids[0, 1:], 11.0)
        expected = F.cross_entropy(logits[0, :-1], ids[0, 1:])
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def norms(model):
    return len(list(model.lm_head.norm.parameters()))


def test_a_tied_head_becomes_a_copy_and_both_norms_start_as_the_final_norm(tmp_path):
    theirs = causal_model(tmp_path, "gpt2")
    model, *_ = started(f"model.decoder.pretrained={tmp_path}", f"model.decoder={{pretrained: {tmp_path}}}")
    embedding = model.decoder.get_input_embeddings().weight
    assert torch.equal(embedding, model.lm_head.weight)
    assert embedding is not model.lm_head.weight
    for norm in (model.lm_head.norm, model.context_head.norm):
        assert torch.equal(norm.weight, theirs.transformer.ln_f.weight)
        assert torch.equal(norm.bias, theirs.transformer.ln_f.bias)
    assert model.context_head.norm is not model.lm_head.norm


@pytest.mark.parametrize(
    ("family", "shard_size"), [*((family, "50GB") for family in VISION_TOWERS), ("dinov2", "20KB")]
)
def test_a_released_encoder_starts_another_run_without_its_pooling(family, shard_size, tmp_path):
    theirs = build_model(
        small_config(f"model.vision={VISION_TOWERS[family]}").model, VOCABULARY.size, ROW_TOKENS, seed=5
    )
    shake(theirs.eval())
    origin = WeightOrigin("small", "", {}, np.zeros((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8), "noise")
    release_vision(theirs, origin, tmp_path, ReleaseOptions(shard_size=shard_size))
    model, *_ = started(f"model.vision={{pretrained: {tmp_path}}}")
    with torch.no_grad():
        assert torch.equal(model.vision(pixels()), theirs.vision(pixels()))


@pytest.mark.parametrize("published", [TEXT - 10, TEXT, TEXT + 10], ids=["fewer", "equal", "more"])
def test_rows_of_tokens_that_the_folder_knows_are_its_own_and_the_rest_resemble_them(published, tmp_path):
    theirs = causal_model(tmp_path, "llama", vocab_size=published, hidden_size=32)
    folder = f"model.decoder={{pretrained: {tmp_path}}}"
    model, _, (sentence,) = started(folder)
    assert sentence.endswith("; 10 tokens of the tokenizer are new to it") == (published < TEXT)
    again, *_ = started(folder)
    other, *_ = started(folder, seed=1)
    known = min(published, TEXT)
    for name in ("decoder.embed_tokens.weight", "lm_head.weight"):
        ours = model.get_parameter(name)
        given = theirs.get_parameter(name.replace("decoder", "model"))[:known]
        assert torch.equal(ours[:known], given)
        assert torch.equal(ours, again.get_parameter(name))
        assert not torch.equal(ours[known:], other.get_parameter(name)[known:])
    many = vocabulary_rows(given.detach(), TEXT, known + 20_000, torch.Generator().manual_seed(0))[known:]
    torch.testing.assert_close(many.mean(0), given.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(many.std(0), given.std(0), rtol=0.05, atol=0)


def test_the_architecture_comes_from_the_folder_and_is_saved_with_the_run(tmp_path):
    causal_model(tmp_path / "it", "qwen3", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    config = small_config(f"model.decoder={{pretrained: {tmp_path / 'it'}}}")
    assert config.model.decoder.hf_keys["rope_parameters"]["rope_theta"] == 5e5
    assert not any(key.endswith(("dropout", "pdrop")) for key in config.model.decoder.hf_keys)
    shutil.rmtree(tmp_path / "it")
    saved = type(config).model_validate(config.model_dump(mode="json"))  # a checkpoint's settings need no folder
    assert saved.model_dump(mode="json") == config.model_dump(mode="json")
    assert build_model(saved.model, VOCABULARY.size, ROW_TOKENS, 0).decoder.config.hidden_size == 32


def test_a_recipe_may_repeat_the_folder_but_not_contradict_it(tmp_path):
    causal_model(tmp_path, "gpt2")
    settings = small_config(f"model.decoder={{pretrained: {tmp_path}, hidden_size: 32, attn_pdrop: 0.2}}").model
    assert settings.decoder.hf_keys["attn_pdrop"] == 0.2
    with pytest.raises(UserError) as error:
        small_config(f"model.decoder={{pretrained: {tmp_path}, num_hidden_layers: 3, n_head: 4}}")
    (problem,) = error.value.problems
    assert f"n_head: the recipe says 4, {tmp_path}/config.json 2" in problem
    assert f"n_layer: the recipe says 3, {tmp_path}/config.json 2" in problem


def test_learned_positions_are_cut_to_a_row_and_refused_when_too_few(tmp_path):
    theirs = causal_model(tmp_path, "gpt2", n_positions=100)
    model, *_ = started(f"model.decoder={{pretrained: {tmp_path}}}")
    assert torch.equal(model.decoder.wpe.weight, theirs.transformer.wpe.weight[:ROW_TOKENS])
    (problem,) = refused(f"model.decoder={{pretrained: {tmp_path}}}", row_tokens=101)
    assert "wpe.weight: positions for 100 tokens, the model has 101; lower data.document_tokens" in problem


@pytest.mark.parametrize("family", VISION_TOWERS)
def test_a_pretrained_vision_tower_gives_the_features_of_its_own_class(family, tmp_path):
    theirs = vision_model(tmp_path, family)
    model, settings, _ = started(f"model.vision={{pretrained: {tmp_path}}}")
    assert settings.vision.model_type == family
    assert (settings.vision.image_mean == IMAGE_MEAN) == (family == "clip_vision_model")
    theirs.config.image_size = IMAGE_SIZE
    with torch.no_grad():
        expected = released_patch_tokens(theirs, pixels())
        torch.testing.assert_close(model.vision(pixels()), expected, rtol=1e-4, atol=1e-5)


def test_a_whole_clip_gives_its_vision_tower_and_the_text_tower_is_left_alone(tmp_path):
    vision = {**yaml.safe_load(VISION_TOWERS["clip_vision_model"]), "hidden_act": "gelu"}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    theirs = CLIPModel(CLIPConfig(vision_config=vision, text_config={**text, "vocab_size": 50}))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    model, settings, _ = started(f"model.vision={{pretrained: {tmp_path}}}")
    assert settings.vision.image_mean == (0.1, 0.2, 0.3)
    for name, weight in model.vision.model.named_parameters():
        assert torch.equal(weight, theirs.vision_model.get_parameter(name)), name


def test_sharded_folders_are_read(tmp_path):
    theirs = vision_model(tmp_path / "whole", "clip_vision_model")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    whole, *_ = started(f"model.vision={{pretrained: {tmp_path / 'whole'}}}")
    sharded, *_ = started(f"model.vision={{pretrained: {tmp_path / 'sharded'}}}")
    assert all(torch.equal(a, b) for a, b in zip(whole.vision.parameters(), sharded.vision.parameters(), strict=True))
    next((tmp_path / "sharded").glob("*.safetensors")).unlink()
    assert "cannot be read as safetensors" in refused(f"model.vision={{pretrained: {tmp_path / 'sharded'}}}")[0]


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_unexpected_and_misshapen_weights_are_all_named_and_allowed_by_pattern(tmp_path):
    vision_model(tmp_path, "clip_vision_model")
    norm, bias = "post_layernorm.weight", "encoder.layers.1.mlp.fc1.bias"

    def spoil(weights):
        del weights[norm], weights["post_layernorm.bias"]
        return {**weights, bias: torch.zeros(3), "adapter.a": torch.zeros(1), "embeddings.position_ids": torch.zeros(1)}

    rewrite(tmp_path, spoil)
    start = f"model.vision.pretrained: {tmp_path}: "
    tower = f"model.vision={{pretrained: {tmp_path}}}"
    misshapen = f"{start}{bias} is [3], the model has [64]"
    assert refused(tower) == [
        f"{start}post_layernorm.bias is missing; allow it with model.allow_missing to start from random values",
        f"{start}{norm} is missing; allow it with model.allow_missing to start from random values",
        f"{start}adapter.a is not in the model; allow it with model.allow_unexpected",
        misshapen,
    ]
    patterns = "model.allow_missing=[post_layernorm.*]", "model.allow_unexpected=['adapter.?']"
    assert refused(tower, *patterns) == [misshapen]
    rewrite(tmp_path, lambda weights: {**weights, bias: torch.zeros(64)})
    model, _, (sentence,) = started(tower, *patterns)
    assert sentence.endswith(": 37 weights; random: post_layernorm.bias, post_layernorm.weight")
    assert torch.equal(model.vision.model.post_layernorm.weight, torch.ones(32))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "config.json: cannot be read as JSON"),
        ({"config.json": "[]"}, "config.json: a JSON object is expected"),
        ({"config.json": '{"model_type": "resnext"}'}, "transformers has no model_type 'resnext'"),
        ({"config.json": '{"model_type": "dinov2", "hidden_size": "x"}'}, "Field 'hidden_size' expected int, got str"),
    ],
    ids=["no folder", "no object", "unknown model", "wrong type"],
)
def test_a_folder_without_an_architecture_is_refused_with_the_recipe(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="command line: model.vision: ") as error:
        small_config(f"model.vision={{pretrained: {tmp_path}}}")
    assert message in str(error.value)


def test_pickled_weights_are_never_opened(tmp_path):
    vision_model(tmp_path, "clip_vision_model")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04never")
    assert "no *.safetensors files" in refused(f"model.vision={{pretrained: {tmp_path}}}")[0]


@pytest.mark.parametrize("family", VISION_TOWERS)
def test_positions_are_resized_only_when_asked(family, tmp_path):
    theirs = vision_model(tmp_path, family)
    tower = f"pretrained: {tmp_path}, image_size: 32"
    (problem,) = refused(f"model.vision={{{tower}}}")
    assert problem.split(": ")[2].startswith("embeddings.position_embedding")
    assert "positions of 2 x 2 patches, image_size and patch_size here make 4 x 4; set " in problem
    assert "model.vision.interpolate_positions=true" in problem
    model, settings, _ = started(f"model.vision={{{tower}, interpolate_positions: true}}")
    assert model.vision.patch_tokens == 16
    if family == "siglip2_vision_model":  # what its own forward makes of a larger image
        theirs.config.image_size = 32
        with torch.no_grad():
            expected = released_patch_tokens(theirs, pixels(32))
            torch.testing.assert_close(model.vision(pixels(32)), expected, rtol=1e-4, atol=1e-5)
    release_vision(model, WeightOrigin("small", "", {}, np.zeros((1, 3, 32, 32), np.uint8), "noise"), tmp_path / "out")
    assert settings.vision.interpolate_positions


@pytest.mark.parametrize(("old", "new"), [(4, 7), (8, 5), (14, 16)])
def test_resized_positions_equal_those_of_an_image_library(old, new):
    positions = torch.randn(1 + old * old, 3, generator=torch.Generator().manual_seed(0))
    resized = resize_positions(positions, 1, new)
    assert torch.equal(resized[0], positions[0])  # the class token's stays
    for channel in range(3):
        grid = Image.fromarray(positions[1:, channel].reshape(old, old).numpy(), mode="F")
        expected = np.asarray(grid.resize((new, new), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(resized[1:, channel].reshape(new, new).numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def release(tmp_path):
    """A full release of a model whose every weight was moved, and that model."""
    config = small_config()
    model = build_model(config.model, VOCABULARY.size, ROW_TOKENS, seed=5)
    shake(model)
    settings = published_settings(config.model_dump(mode="json"))
    origin = WeightOrigin("small", "", settings, np.zeros((1, 3, 16, 16), np.uint8), "noise")
    (tmp_path / "release").mkdir()
    write_weights(model, origin, tmp_path / "release", ReleaseOptions())
    return model, tmp_path / "release"


@pytest.mark.parametrize("parts", [["vision", "pooling"], ["decoder"], ["heads"]], ids="+".join)
def test_chosen_parts_come_from_a_release_and_the_others_stay(release, parts):
    theirs, folder = release
    model, *_ = started(f"model.init_from={folder}", f"model.init_parts=[{', '.join(parts)}]")
    untouched, *_ = started()
    for name, weight in model.named_parameters():
        source = theirs if part_of(name) in parts else untouched
        assert torch.equal(weight, source.get_parameter(name)), name


def test_a_release_of_another_architecture_is_refused_even_where_shapes_agree(release):
    _, folder = release
    (problem,) = refused(
        f"model.init_from={folder}", "model.vision.num_attention_heads=4", "model.pooling.num_attention_heads=1"
    )
    assert f"model.vision.num_attention_heads: here 4, {folder} 2" in problem
    assert "model.pooling: here {'num_attention_heads': 1}" in problem
    model, *_ = started(f"model.init_from={folder}", "model.vision.num_attention_heads=4", "model.init_parts=[decoder]")
    assert torch.equal(model.decoder.embed_tokens.weight, release[0].decoder.embed_tokens.weight)


def test_a_release_with_another_vocabulary_is_refused(release):
    _, folder = release
    config = small_config(f"model.init_from={folder}")
    model = build_empty_model(config.model, VOCABULARY.size + 3, ROW_TOKENS)
    with pytest.raises(UserError) as error:
        given_weights(model, config.model, TEXT, 0)
    assert [p.split(f"{folder}: ")[1] for p in error.value.problems] == [
        "decoder.embed_tokens.weight is [65, 32], the model has [68, 32]",
        "lm_head.weight is [65, 32], the model has [68, 32]",
    ]


def test_a_part_has_one_source(tmp_path):
    vision_model(tmp_path, "clip_vision_model")
    overrides = f"model.vision={{pretrained: {tmp_path}}}", "model.init_from=somewhere"
    with pytest.raises(UserError, match="init_parts: vision would come from init_from and from a pretrained folder"):
        small_config(*overrides)
    assert small_config(*overrides, "model.init_parts=[decoder]").model.init_from == "somewhere"
    with pytest.raises(UserError, match="the folder in pretrained gives the architecture; leave shape out"):
        small_config(f"model.vision={{pretrained: {tmp_path}, shape: vit_b16}}")
