"""Draw at random for an image, such as which patches are kept: the same on any device and number of ranks."""

import torch
from torch import Tensor

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


def kept_count(patches: int, dropout: float) -> int:
    """Say how many of an image's patches training keeps; at least one."""
    return max(1, round(patches * (1 - dropout)))


def kept_patches(seeds: Tensor, patches: int, count: int) -> Tensor:
    """Draw different patches of each image, int64 [M, count], in raster order, so that positions keep their meaning."""
    return patch_order(seeds, patches)[:, :count].sort(dim=1).values


def _mixed(x: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser; products wrap around."""
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right logically: torch's own shift copies the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
