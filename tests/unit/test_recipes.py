"""Every shipped recipe is valid and describes the model that it says."""

import pytest

from lcl_ds.config import RECIPES, load_config
from lcl_ds.models.build import build_empty_model, tokens_per_image

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
CLIP_TEXT, CONTROL = 49_408, 5  # entries of CLIP's tokenizer, and our control tokens
PUBLISHED = {
    # recipe: (millions of parameters of the published model, its vocabulary, its context)
    "lcl_vit_b16_laion": (249.9, 49_411, 280),
    "lcl_vit_b32_laion": (177.7, 49_411, 128),
    "lcl_vit_b32_mmc4": (178.6, 49_411, 2048),
}


def model_of(name):
    config = load_config(RECIPES / f"{name}.yaml")
    return config, build_empty_model(config.model, CLIP_TEXT + CONTROL, config.data.row_tokens)


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_built(name):
    config, model = model_of(name)
    assert config.name == name
    assert all(weight.is_meta for weight in model.parameters())
    one_image = tokens_per_image(config.model) + 4
    assert config.data.row_images * one_image >= config.data.row_tokens / 2, "images, not tokens, would fill rows"
    assert one_image <= config.data.row_tokens


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_has_the_published_size_but_for_vocabulary_and_positions(name):
    config, model = model_of(name)
    millions, vocabulary, context = PUBLISHED[name]
    width = config.model.decoder.hf_keys["n_embd"]
    more_words = 2 * width * (CLIP_TEXT + CONTROL - vocabulary)  # embedding and head
    more_positions = width * (config.data.row_tokens - context)
    parameters = sum(weight.numel() for weight in model.parameters())
    assert round((parameters - more_words - more_positions) / 1e6, 1) == millions


def test_the_largest_vision_tower_is_vit_l14():
    _, model = model_of("lcl_vit_l14_laion_mmc4")
    assert sum(weight.numel() for weight in model.vision.parameters()) == 303_179_776
