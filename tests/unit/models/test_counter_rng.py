"""Random patches of an image from its seed, and training on a part of them."""

import numpy as np
import pytest
import torch

from lcl_ds.assembly import attach_objective
from lcl_ds.errors import UserError
from lcl_ds.grids import kept_count
from lcl_ds.models.build import tokens_per_image
from lcl_ds.models.counter_rng import kept_patches, patch_order
from lcl_ds.objectives import NAMES
from lcl_ds.objectives.base import local_normalizers
from tests.support.small import IMAGE_SIZE, IMAGE_TOKENS, VOCABULARY, small_config, small_model, three_documents


def split_mix(state: np.uint64) -> np.uint64:
    """SplitMix64 after its published definition, on unsigned integers."""
    z = state
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def test_it_sorts_split_mix_64():
    seeds = np.array([0, 1, -1, 2**62, -(2**63)], dtype=np.int64)
    order = patch_order(torch.from_numpy(seeds), 50)
    with np.errstate(over="ignore"):
        counters = np.arange(1, 51, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        keys = split_mix(split_mix(seeds.astype(np.uint64))[:, None] + counters).astype(np.int64)
    assert np.array_equal(order.numpy(), np.argsort(keys, axis=1, kind="stable"))


def test_every_row_is_a_permutation_of_its_own_and_depends_on_its_seed_alone():
    seeds = torch.arange(64)
    order = patch_order(seeds, 196)
    assert torch.equal(order.sort(dim=1).values, torch.arange(196).expand(64, -1))
    assert len({tuple(row) for row in order.tolist()}) == 64
    assert torch.equal(order[7:9], patch_order(seeds[7:9], 196))
    assert patch_order(seeds[:0], 196).shape == (0, 196)


def test_every_patch_comes_first_equally_often():
    images, patches = 20_000, 16
    counts = torch.bincount(patch_order(torch.arange(images), patches)[:, 0], minlength=patches).double()
    expected = images / patches
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 37.7  # 99.9 % of chi-squared with 15 degrees of freedom


@pytest.mark.parametrize(("patches", "dropout", "kept"), [(196, 0.5, 98), (4, 0.4, 2), (49, 0.75, 12), (4, 0.99, 1)])
def test_a_fixed_number_of_patches_is_kept_in_raster_order(patches, dropout, kept):
    assert kept_count(patches, dropout) == kept
    seeds = torch.arange(40)
    chosen = kept_patches(seeds, patches, kept)
    assert chosen.shape == (40, kept)
    assert (chosen.diff(dim=1) > 0).all()
    assert [set(row) for row in chosen.tolist()] == [set(row[:kept]) for row in patch_order(seeds, patches).tolist()]


DROPOUT = "model.vision.patch_dropout=0.5"


def test_training_drops_patches_before_the_first_block_and_evaluation_sees_all():
    config = small_config(DROPOUT)
    assert tokens_per_image(config.model, training=True) == IMAGE_TOKENS / 2
    assert tokens_per_image(config.model) == IMAGE_TOKENS
    model, batch = small_model(config), three_documents(config)
    assert (batch.input_ids == VOCABULARY.image).sum() == batch.image_count * IMAGE_TOKENS / 2
    lengths = []
    model.vision.model.encoder.layers[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    _, tokens = model.encode_images(batch.images, batch.image_seeds)
    _, every = model.eval().encode_images(batch.images, batch.image_seeds)
    assert lengths == [1 + IMAGE_TOKENS // 2, 1 + IMAGE_TOKENS]
    assert (tokens.shape[1], every.shape[1]) == (IMAGE_TOKENS // 2, IMAGE_TOKENS)


def test_which_patches_an_image_keeps_depends_on_its_seed_alone():
    model = small_model(small_config(DROPOUT))
    images, seeds = torch.randn(6, 3, IMAGE_SIZE, IMAGE_SIZE), torch.arange(6)
    with torch.no_grad():
        pooled, tokens = model.encode_images(images, seeds)
        alone = torch.cat([model.encode_images(images[i : i + 1], seeds[i : i + 1])[1] for i in range(6)])
        other = model.encode_images(images, seeds + 100)[1]
        by_hand = model.pooling(model.vision(images, kept_patches(seeds, IMAGE_TOKENS, 2)))
    torch.testing.assert_close(alone, tokens, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other, tokens, atol=1e-3)
    assert torch.equal(by_hand[0], pooled)
    assert torch.equal(by_hand[1], tokens)


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_learns_with_patch_dropout_or_refuses_it(name):
    config = small_config(f"objective.name={name}", DROPOUT)
    if name == "masked":
        with pytest.raises(UserError, match="model.vision.patch_dropout: the masked objective predicts every patch"):
            attach_objective(small_model(config), config)
        return
    objective, batch = attach_objective(small_model(config), config), three_documents(config)
    loss = objective(batch, *local_normalizers(objective, batch))["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(weight.grad is not None for weight in objective.parameters() if weight.requires_grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_computes_the_same():
    seeds = torch.randint(-(2**63), 2**63 - 1, (100,))
    assert torch.equal(patch_order(seeds.cuda(), 256).cpu(), patch_order(seeds, 256))
