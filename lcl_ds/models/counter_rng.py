"""Draw at random for an image, such as which patches are kept: the same on any device and number of ranks."""

import torch
from torch import Tensor

from lcl_ds.grids import PackedImages

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""Increment of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) as a signed 64-bit integer."""
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
"""Multipliers of SplitMix64's finaliser as signed 64-bit integers."""


def patch_order(seeds: Tensor, patches: int) -> Tensor:
    """Draw a random permutation of each image's patches.

    The permutation sorts a counter-based hash of (seed, patch), made of integer operations alone, so a seed gives the
    same one on the CPU and on any GPU.

    Args:
        seeds: int64 [M], one per image.
        patches: N.

    Returns:
        int64 [M, N].
    """
    return _hashes(seeds, patches).argsort(dim=1, stable=True)


def uniform(seeds: Tensor, count: int) -> Tensor:
    """Draw ``count`` numbers for each of ``seeds`` [M], uniform in (0, 1), fp32 [M, count]."""
    return (_shifted(_hashes(seeds, count), 41) + 0.5) * 2.0**-23


def _hashes(seeds: Tensor, count: int) -> Tensor:
    counters = torch.arange(1, count + 1, device=seeds.device, dtype=torch.int64)
    return _mixed(_mixed(seeds)[:, None] + counters * GOLDEN)


def kept_patches(seeds: Tensor, patches: int, count: int) -> Tensor:
    """Draw different patches of each image, int64 [M, count], in raster order, so that positions keep their meaning."""
    return patch_order(seeds, patches)[:, :count].sort(dim=1).values


def kept_of_packed(seeds: Tensor, images: PackedImages) -> Tensor:
    """Draw the patches that each of several images of different shapes keeps, int64 [U], as :func:`kept_patches` does.

    Args:
        seeds: int64 [M].
    """
    most = max(grid.patches for grid in images.grids)
    sizes, starts = images.cu_patches.diff(), images.cu_patches[:-1]
    absent = torch.arange(most, device=seeds.device) >= sizes[:, None]
    order = _hashes(seeds, most).masked_fill(absent, 2**63 - 1).argsort(dim=1, stable=True)
    image = images.token_images
    rank = torch.arange(len(image), device=seeds.device) - images.cu_tokens.long().index_select(0, image)
    kept = order.flatten().index_select(0, image * most + rank) + starts.index_select(0, image)
    return kept.sort().values


def _mixed(x: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser; products wrap around."""
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right logically: torch's own shift copies the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
