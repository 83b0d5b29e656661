"""Random patches of an image from its seed."""

import numpy as np
import pytest
import torch

from lcl_ds.models.patches import patch_order


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_computes_the_same():
    seeds = torch.randint(-(2**63), 2**63 - 1, (100,))
    assert torch.equal(patch_order(seeds.cuda(), 256).cpu(), patch_order(seeds, 256))
