"""Images that keep their aspect ratio: packed end to end they give what each of them gives alone."""

import numpy as np
import pytest
import torch

from lcl_ds.grids import Grid, cut_patches, kept_count, pack_images
from lcl_ds.models.vision import family_inputs
from tests.support.small import VISION_TOWERS, shake, small_config, small_model

PATCH = 8
SHAPES = [(1, 1), (2, 2), (1, 5), (4, 1), (3, 2), (2, 3), (2, 2)]
"""Rows and columns; the positions of the small towers are 2 x 2."""
LARGEST = 6


def grids_of(shapes, dropout=0.0):
    return [Grid(rows, columns, kept_count(rows * columns, dropout)) for rows, columns in shapes]


def tower(family="clip_vision_model", *overrides):
    settings = [f"model.vision={VISION_TOWERS[family]}", "model.vision.resolution=native"]
    model = small_model(small_config(*settings, f"model.vision.max_image_tokens={LARGEST}", *overrides))
    shake(model.vision)
    return model.eval()


def pictures(shapes, seed=0):
    """uint8 [3, H, W] for each of ``shapes``."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (3, rows * PATCH, columns * PATCH), dtype=np.uint8) for rows, columns in shapes]


def end_to_end(images):
    return torch.from_numpy(np.concatenate([cut_patches(image, PATCH) for image in images]))


def alone(model, pixels):
    """What the family's class in transformers makes of one normalised image [3, H, W]: patch tokens after the norm."""
    transformer = model.vision.model
    if transformer.config.model_type == "siglip2_vision_model":
        inputs = family_inputs(transformer, pixels[None])
        inputs["spatial_shapes"] = torch.tensor([[size // PATCH for size in pixels.shape[1:]]])
        return transformer(**inputs).last_hidden_state[0]
    keys = {} if transformer.config.model_type == "dinov2" else {"interpolate_pos_encoding": True}
    states = transformer(pixel_values=pixels[None], **keys).last_hidden_state[0]
    count = pixels.shape[1] * pixels.shape[2] // PATCH**2
    final_norm = getattr(transformer, "post_layernorm", None)
    return final_norm(states[-count:]) if transformer.config.model_type == "clip_vision_model" else states[-count:]


@pytest.mark.parametrize("family", VISION_TOWERS)
@torch.no_grad()
def test_packed_images_give_what_transformers_makes_of_each_alone(family):
    model = tower(family)
    # On a CPU torch 2.13 gives every row of an antialiased picture of one column the value of the first.
    shapes = [shape for shape in SHAPES if family != "siglip2_vision_model" or shape != (4, 1)]
    images, packed = pictures(shapes), pack_images(grids_of(shapes), [])
    tokens = model.vision.packed(model.vision.normalize(end_to_end(images)), packed, torch.zeros(len(shapes)))
    expected = [alone(model, model.vision.normalize(torch.from_numpy(image))) for image in images]
    torch.testing.assert_close(tokens, torch.cat(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
@torch.no_grad()
def test_an_image_depends_on_no_other_in_any_attention(attention):
    model = tower("clip_vision_model", f"model.vision.attention={attention}")
    seeds = torch.arange(len(SHAPES))
    together = model.encode_images(end_to_end(pictures(SHAPES)), seeds, pack_images(grids_of(SHAPES), []))
    one_by_one = [
        model.encode_images(end_to_end([image]), seeds[:1], pack_images(grids_of([shape]), []))
        for shape, image in zip(SHAPES, pictures(SHAPES), strict=True)
    ]
    for all_images, each in zip(together, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(all_images, torch.cat(each), rtol=1e-6, atol=1e-6)
