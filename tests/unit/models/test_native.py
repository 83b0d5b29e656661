"""Images that keep their aspect ratio: packed end to end they give what each of them gives alone."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, Siglip2ImageProcessor, Siglip2VisionModel

from lcl_ds.assembly import attach_objective
from lcl_ds.errors import UserError
from lcl_ds.grids import cut_patches, pack_images
from lcl_ds.models.build import build_empty_model
from lcl_ds.models.counter_rng import kept_of_packed, kept_patches
from lcl_ds.models.initial import fill_weights
from lcl_ds.models.vision import family_inputs
from lcl_ds.models.weights.transfer import given_weights
from lcl_ds.objectives import NAMES, objective_module
from lcl_ds.objectives.base import local_normalizers
from tests.support.native import (
    NATIVE,
    PATCH,
    SQUARE,
    grids_of,
    native_batch,
    native_documents,
    native_sequence,
    pictures,
    rows_of_rank,
)
from tests.support.small import ROW_TOKENS, VISION_TOWERS, VOCABULARY, shake, small_config, small_model

SHAPES = [(1, 1), (2, 2), (1, 5), (4, 1), (3, 2), (2, 3), (2, 2)]
"""Rows and columns; the positions of the small towers are 2 x 2."""


def tower(family="clip_vision_model", *overrides):
    model = small_model(small_config(f"model.vision={VISION_TOWERS[family]}", *NATIVE, *overrides))
    shake(model.vision)
    return model.eval()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", VISION_TOWERS)
def test_squares_give_the_bits_of_a_run_of_squares_in_features_and_gradients(family, dtype):
    images, seeds = pictures([SQUARE] * 3), torch.arange(3)
    results = []
    for packed in (None, pack_images(grids_of([SQUARE] * 3, dropout=0.25), [])):
        way = NATIVE if packed else ()
        model = small_model(
            small_config(f"model.vision={VISION_TOWERS[family]}", "model.vision.patch_dropout=0.25", *way)
        )
        shake(model)
        model.to(dtype).train()
        pixels = end_to_end(images) if packed else torch.from_numpy(np.stack(images))
        pooled, tokens = model.encode_images(pixels, seeds, packed)
        (pooled.float().sin().sum() + tokens.float().cos().sum()).backward()
        gradients = [weight.grad for part in (model.vision, model.pooling) for weight in part.parameters()]
        results.append((pooled, tokens.flatten(0, -2), *gradients))
    squares, native = results
    assert len(squares) > 20
    assert all(torch.equal(one, other) for one, other in zip(squares, native, strict=True))


def test_patches_are_dropped_as_from_each_image_alone():
    grids = grids_of([(3, 4), (1, 1), (2, 5), (1, 2)], dropout=0.4)
    seeds = torch.tensor([5, 17, 5, 2**62])
    kept = kept_of_packed(seeds, pack_images(grids, []))
    starts = [0, 12, 13, 23]
    expected = [
        kept_patches(seeds[i : i + 1], grid.patches, grid.tokens)[0] + starts[i] for i, grid in enumerate(grids)
    ]
    assert [grid.tokens for grid in grids] == [7, 1, 6, 1]
    assert torch.equal(kept, torch.cat(expected))


@torch.no_grad()
def test_dropped_patches_are_not_seen():
    model = tower()
    images, packed = pictures([(2, 3), (3, 2)]), pack_images(grids_of([(2, 3), (3, 2)], dropout=0.5), [])
    seeds = torch.tensor([3, 4])
    kept = kept_of_packed(seeds, packed)
    patches = end_to_end(images)
    gone = [i for i in range(len(patches)) if i not in kept.tolist()]
    changed = patches.index_fill(0, torch.tensor(gone), 7)
    assert len(gone) == 6
    before, after = (model.encode_images(some, seeds, packed)[1] for some in (patches, changed))
    assert torch.equal(before, after)
    assert not torch.equal(before, model.encode_images(patches.index_fill(0, kept[:1], 7), seeds, packed)[1])


@torch.no_grad()
def test_a_given_naflex_tower_equals_the_padded_run_of_transformers(tmp_path):
    """Ten pictures of ten aspect ratios; positions of 16 x 16 are resized to at most 64 patches."""
    config = AutoConfig.for_model(
        "siglip2_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    torch.manual_seed(1)
    theirs = Siglip2VisionModel(config).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    bounds = ("model.vision.resolution=native", "model.vision.max_image_tokens=64", "data.row_tokens=96")
    settings = small_config(f"model.vision={{pretrained: {tmp_path}}}", *bounds).model
    model = build_empty_model(settings, VOCABULARY.size, 96)
    fill_weights(model, 0, given_weights(model, settings, 60, 0)[0])
    assert model.eval().vision.patch_tokens == config.num_patches == 256
    sizes = [(1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16), (2, 1), (1, 2), (5, 2)]
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40 * height, 40 * width, 3), dtype=np.uint8) for width, height in sizes]
    inputs = Siglip2ImageProcessor(patch_size=16, max_num_patches=64)(images=images, return_tensors="pt")
    shapes = [tuple(shape) for shape in inputs["spatial_shapes"].tolist()]
    assert len({*shapes}) == 10
    mask = inputs["pixel_attention_mask"].bool()
    expected = theirs(**inputs).last_hidden_state[mask]
    patches = inputs["pixel_values"][mask].unflatten(1, (16, 16, 3)).permute(0, 3, 1, 2)
    tokens = model.vision.packed(patches, pack_images(grids_of(shapes), []), torch.zeros(10))
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lcl", "generation"])
@pytest.mark.parametrize("both_ways", ["false", "true"])
def test_documents_packed_together_give_the_states_of_each_alone(name, both_ways):
    config = small_config(
        f"objective.name={name}", *NATIVE, f"model.decoder.bidirectional_images={both_ways}", "precision=fp32"
    )
    model = small_model(config).eval()
    rows = rows_of_rank("shapes", 0)
    together, pooled = model(native_batch(*rows))
    start = images = 0
    for number, row in enumerate(rows):
        start = number * ROW_TOKENS
        for sequence in row:
            alone, own = model(native_batch([sequence]))
            length, count = len(sequence.tokens.input_ids), len(sequence.grids)
            torch.testing.assert_close(together[start : start + length], alone[:length], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(pooled[images : images + count], own, rtol=1e-5, atol=1e-5)
            start, images = start + length, images + count
    assert images == 4


@pytest.mark.parametrize("name", NAMES)
def test_an_objective_trains_on_images_of_all_shapes_or_says_that_it_cannot(name):
    config = small_config(f"objective.name={name}", *NATIVE)
    if not objective_module(name).Objective.takes_native:
        with pytest.raises(UserError, match=f"resolution: native: the objective {name} needs as many tokens"):
            attach_objective(small_model(config), config)
        return
    objective, batch = attach_objective(small_model(config), config), native_documents(config)
    assert len({*batch.packed.grids}) == batch.image_count == 3
    objective(batch, *local_normalizers(objective, batch))["loss"].backward()
    assert [n for n, weight in objective.named_parameters() if weight.requires_grad and weight.grad is None] == []


def test_a_slot_of_another_length_than_its_image_is_noticed():
    sequence = native_sequence(["abc", 0, "d"], [(2, 3)])
    wrong = type(sequence)(sequence.key, sequence.tokens, sequence.pixels[:4], (0,), grids=tuple(grids_of([(1, 10)])))
    with pytest.raises(AssertionError, match="slots of other lengths"):
        native_batch([wrong])
