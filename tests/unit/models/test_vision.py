"""Vision towers: what comes out is what the transformers class computes, and every weight takes part."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, CLIPVisionModel, Dinov2Model, SiglipVisionModel
from transformers import Siglip2VisionModel as Siglip2

from lcl_ds.errors import UserError
from lcl_ds.evaluation.encoder import of_network
from lcl_ds.evaluation.features import vectors_of_pixels
from lcl_ds.models.build import build_empty_model, image_size, tokens_per_image
from lcl_ds.models.settings import ModelSettings
from lcl_ds.models.vision import SHAPES, build_vision_config, flat_patches
from lcl_ds.objectives.base import local_normalizers
from lcl_ds.release.origin import WeightOrigin
from lcl_ds.release.vision import release_vision
from tests.support.small import (
    IMAGE_SIZE,
    IMAGE_TOKENS,
    VISION_TOWERS,
    batch_with_images,
    lcl_objective,
    small_config,
    small_model,
)

CLASSES = {
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "siglip2_vision_model": Siglip2,
    "dinov2": Dinov2Model,
}


def tower(family):
    return small_model(small_config(f"model.vision={VISION_TOWERS[family]}"))


def pictures(count=3):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)


@pytest.mark.parametrize("family", VISION_TOWERS)
def test_every_weight_has_a_gradient(family):
    objective, batch = lcl_objective(tower(family)), batch_with_images()
    (normalizers,) = local_normalizers(objective, batch)
    objective(batch, normalizers)["loss"].backward()
    assert [name for name, weight in objective.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("family", VISION_TOWERS)
def test_size_and_tokens_follow_from_the_settings(family):
    settings = small_config(f"model.vision={VISION_TOWERS[family]}").model
    assert (image_size(settings), tokens_per_image(settings)) == (IMAGE_SIZE, IMAGE_TOKENS)
    assert vectors_of_pixels(of_network(tower(family), "small"), pictures())["mean"].shape == (3, 32)


@pytest.mark.parametrize("family", VISION_TOWERS)
def test_the_released_folder_loads_with_its_class_and_processor_and_gives_the_same_features(family, tmp_path):
    model = tower(family).eval()
    origin = WeightOrigin("small", "in a test", {}, pictures(), "images of noise")
    assert "over 3 images of noise" in release_vision(model, origin, tmp_path)
    released = CLASSES[family].from_pretrained(tmp_path).eval()
    assert {n: w.shape for n, w in released.named_parameters()} == {
        n: w.shape for n, w in model.vision.model.named_parameters()
    }
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    images = [Image.fromarray(picture.transpose(1, 2, 0)) for picture in pictures()]
    with torch.no_grad():
        tokens = released(**processor(images=images, return_tensors="pt")).last_hidden_state[:, -IMAGE_TOKENS:]
        tokens = released.post_layernorm(tokens) if family == "clip_vision_model" else tokens
        ours = model.vision(model.vision.normalize(torch.from_numpy(pictures())))
    torch.testing.assert_close(ours, tokens, rtol=1e-4, atol=1e-4)
    code = (tmp_path / "README.md").read_text().split("patches = ")[2].split("  #")[0]
    assert ("post_layernorm" in code) == (family == "clip_vision_model")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    assert type(AutoModel.from_pretrained(tmp_path)) is CLASSES[family]


def test_siglip_2_patches_lie_as_its_processor_lays_them(tmp_path):
    model = tower("siglip2_vision_model").eval()
    release_vision(model, WeightOrigin("small", "", {}, pictures(), "noise"), tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    images = [Image.fromarray(picture.transpose(1, 2, 0)) for picture in pictures()]
    inputs = processor(images=images, return_tensors="pt")
    ours = flat_patches(model.vision.normalize(torch.from_numpy(pictures())), 8)
    torch.testing.assert_close(ours, inputs["pixel_values"], rtol=1e-5, atol=1e-5)
    assert inputs["spatial_shapes"].tolist() == [[2, 2]] * 3
    assert inputs["pixel_attention_mask"].all()


@pytest.mark.parametrize("family", VISION_TOWERS)
def test_kept_patches_alone_go_through_the_blocks(family):
    encoder = tower(family).vision.eval()
    pixels = encoder.normalize(torch.from_numpy(pictures()))
    every = torch.arange(IMAGE_TOKENS).expand(3, -1)
    seen = []
    blocks = next(module for module in encoder.model.encoder.children() if isinstance(module, torch.nn.ModuleList))
    blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    with torch.no_grad():
        assert torch.equal(encoder(pixels, every), encoder(pixels))
        some = torch.tensor([[0, 3], [1, 2], [2, 3]])
        kept = encoder(pixels, some)
        gone = pixels.clone()  # what the first image shows in patches 1 and 2 cannot matter
        gone[0, :, :8, 8:], gone[0, :, 8:, :8] = 9.0, -9.0
        assert torch.equal(encoder(gone, some)[0], kept[0])
    prefix = seen[0] - IMAGE_TOKENS
    assert kept.shape == (3, 2, 32)
    assert seen == [prefix + 4, prefix + 4, prefix + 2, prefix + 2]


def test_a_family_that_is_not_supported_is_named():
    with pytest.raises(UserError, match="model.vision vit: not supported; use clip_vision_model, "):
        tokens_per_image(small_config("model.vision={model_type: vit}").model)


def test_images_must_divide_into_patches():
    with pytest.raises(UserError, match="image_size 20 is not a multiple of patch_size 8"):
        tokens_per_image(small_config("model.vision.image_size=20").model)


PUBLISHED = {
    # Millions of parameters: OpenCLIP's model_profile.csv without its projection; DINOv2 and InternVL's model cards.
    "vit_b32": 87.85 - 768 * 512 / 1e6,
    "vit_b16": 86.19 - 768 * 512 / 1e6,
    "vit_l14": 303.97 - 1024 * 768 / 1e6,
    "vit_h14": 632.08 - 1280 * 1024 / 1e6,
    "vit_g14": 1012.65 - 1408 * 1024 / 1e6,
    "vit_1b14": 1136.48,
    "vit_bigg14": 1844.91 - 1664 * 1280 / 1e6,
    "vit_6b14": 5903.0,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_named_shape_has_the_published_number_of_parameters(shape):
    settings = small_config(f"model.vision={{shape: {shape}}}").model
    vision = build_empty_model(settings, 65, 512).vision
    size = SHAPES[shape]
    width, mlp, patch = size["hidden_size"], size["intermediate_size"], size["patch_size"]
    block = 4 * width * (width + 1) + 2 * width * mlp + mlp + width + 4 * width
    embeddings = width * (3 * patch**2 + 1 + (224 // patch) ** 2 + 1)
    expected = size["num_hidden_layers"] * block + embeddings + 4 * width
    parameters = sum(weight.numel() for weight in vision.parameters())
    assert parameters == expected
    assert parameters / 1e6 == pytest.approx(PUBLISHED[shape], rel=0.01 if shape in ("vit_1b14", "vit_6b14") else 1e-4)
    assert settings.vision.hf_keys["hidden_act"] == "gelu"


def test_keys_override_a_shape_and_other_families_take_it_too():
    vision = small_config("model.vision={shape: vit_b16, num_hidden_layers: 2, image_size: 256}").model.vision
    assert (vision.model_type, vision.hf_keys["num_hidden_layers"]) == ("clip_vision_model", 2)
    settings = small_config("model.vision={shape: vit_l14, model_type: siglip2_vision_model}").model
    assert tokens_per_image(settings) == 256
    config = build_vision_config(settings.vision.model_type, settings.vision.hf_keys)
    assert (config.hidden_size, config.num_patches, config.image_size) == (1024, 256, 224)


def test_a_mistyped_shape_is_named():
    with pytest.raises(UserError, match=r"model.vision: shape: there is no 'vit_h15' \(did you mean 'vit_h14'\?\)"):
        small_config("model.vision={shape: vit_h15}")


def test_settings_of_a_shape_survive_a_round_trip():
    settings = small_config("model.vision={shape: vit_b16, image_size: 256}").model
    assert ModelSettings.model_validate(settings.model_dump(mode="json")) == settings
