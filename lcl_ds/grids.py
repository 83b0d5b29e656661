"""Images that keep their aspect ratio: which grid of patches each one gets, and how a batch of them lies in memory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


def kept_count(patches: int, dropout: float) -> int:
    """Say how many of an image's patches training keeps; at least one."""
    return max(1, round(patches * (1 - dropout)))


class Grid(NamedTuple):
    """The patches of an image that keeps its aspect ratio."""

    rows: int
    columns: int
    tokens: int
    """Image tokens: as many as patches, or those that patch dropout keeps."""

    @property
    def patches(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class NativeResolution:
    """What decides the grid of an image that keeps its aspect ratio."""

    patch_size: int
    """In pixels."""
    least: int
    """Patches that a small image is enlarged to."""
    most: int
    """Patches of an image at most."""
    patch_dropout: float = 0.0
    """Fraction of an image's patches that training leaves out."""

    @property
    def most_tokens(self) -> int:
        """Return the image tokens of the largest grid."""
        return kept_count(self.most, self.patch_dropout)

    def grid(self, width: int, height: int) -> Grid:
        """Choose the grid of an upright image of so many pixels."""
        rows, columns = choose_grid(width, height, self.patch_size, self.least, self.most)
        return Grid(rows, columns, kept_count(rows * columns, self.patch_dropout))


@lru_cache(maxsize=65536)
def choose_grid(width: int, height: int, patch_size: int, least: int, most: int) -> tuple[int, int]:
    """Choose the rows and columns of patches that an image is resized to.

    The image keeps its own size, unless that has fewer than ``least`` patches or more than ``most``. Of the grids
    around that size it gets the one whose rows and columns miss it by the smallest factor.
    """
    area = min(max(width * height / patch_size**2, least), most)
    wanted_rows, wanted_columns = math.sqrt(area * height / width), math.sqrt(area * width / height)
    best, smallest = (1, 1), math.inf
    for near in (math.floor(wanted_rows), math.ceil(wanted_rows)):
        rows = min(max(1, near), most)
        columns = min(max(1, round(wanted_columns)), most // rows)
        # Of square roots and quotients alone, which every machine rounds alike.
        missed = _factor(rows, wanted_rows) * _factor(columns, wanted_columns)
        if missed < smallest:
            best, smallest = (rows, columns), missed
    return best


def _factor(count: int, wanted: float) -> float:
    return max(count / wanted, wanted / count)


@dataclass(frozen=True)
class PackedImages:
    """How images of different shapes lie end to end: M images of N patches, U of them kept as image tokens.

    In slots stand W image tokens.
    """

    grids: tuple[Grid, ...]
    """Of every image; known on the host."""
    row_places: Tensor
    """int64 [N], where each patch's row stands in a table of all rows of grids of 1, 2, ... rows: ``0, 0 1, 0 1 2``."""
    column_places: Tensor
    """int64 [N], the same of its column."""
    patch_images: Tensor
    """int64 [N], the image of each patch."""
    cu_patches: Tensor
    """int64 [M + 1], where images begin among the patches, and their end."""
    cu_tokens: Tensor
    """int32 [M + 1], where images begin among the image tokens, and their end."""
    token_images: Tensor
    """int64 [U], the image of each image token."""
    slot_tokens: Tensor
    """int64 [W], which image token stands there."""
    slot_places: Tensor
    """int64 [W], flat positions where they stand, slot by slot."""
    slot_numbers: Tensor
    """int64 [W], the slot that each of them is in."""
    beyond: int = 0
    """How many of these places lie behind the rows: those of the constant image of a rank without images."""

    @property
    def count(self) -> int:
        """Return M."""
        return len(self.grids)

    @property
    def shared_grid(self) -> Grid | None:
        """Return the grid of all images where they have but one."""
        return self.grids[0] if len(set(self.grids)) == 1 else None

    @property
    def longest(self) -> int:
        """Return the tokens of the largest image."""
        return max(grid.tokens for grid in self.grids)

    @property
    def drops_patches(self) -> bool:
        """Say whether the blocks see fewer tokens than there are patches."""
        return len(self.token_images) < len(self.row_places)

    def moved(self, function: Callable[[Tensor], Tensor]) -> "PackedImages":
        """Return the same with what ``function`` makes of each tensor."""
        tensors: dict[str, Any] = {f.name: function(getattr(self, f.name)) for f in fields(self) if f.type is Tensor}
        return replace(self, **tensors)


def pack_images(grids: Sequence[Grid], slots: Sequence[tuple[int, int]], beyond: int = 0) -> PackedImages:
    """Say how images of these grids lie end to end, on the CPU.

    Args:
        slots: of each one the flat position of its first image token, and the image that stands there.
        beyond: image tokens that stand behind the rows.
    """
    numbers = torch.arange(len(grids))
    starts = [0, *accumulate(grid.tokens for grid in grids)]
    lengths = [grids[image].tokens for _, image in slots]
    rows = [_places(grid.rows).repeat_interleave(grid.columns) for grid in grids]
    columns = [_places(grid.columns).repeat(grid.rows) for grid in grids]
    nothing = torch.zeros(0, dtype=torch.int64)
    return PackedImages(
        grids=tuple(grids),
        row_places=torch.cat(rows),
        column_places=torch.cat(columns),
        cu_patches=torch.tensor([0, *accumulate(grid.patches for grid in grids)]),
        cu_tokens=torch.tensor(starts, dtype=torch.int32),
        patch_images=numbers.repeat_interleave(torch.tensor([grid.patches for grid in grids])),
        token_images=numbers.repeat_interleave(torch.tensor([grid.tokens for grid in grids])),
        slot_tokens=torch.cat([nothing, *(torch.arange(starts[image], starts[image + 1]) for _, image in slots)]),
        slot_places=torch.cat(
            [nothing, *(torch.arange(at, at + n) for (at, _), n in zip(slots, lengths, strict=True))]
        ),
        slot_numbers=torch.arange(len(slots)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64)),
        beyond=beyond,
    )


def _places(length: int) -> Tensor:
    return torch.arange(length) + length * (length - 1) // 2


def cut_patches(pixels: np.ndarray, patch_size: int) -> np.ndarray:
    """Cut one image [3, H, W] into patches [N, 3, P, P], in raster order."""
    channels, height, width = pixels.shape
    tiles = pixels.reshape(channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return tiles.transpose(1, 3, 0, 2, 4).reshape(-1, channels, patch_size, patch_size)


def joined_patches(patches: Tensor, grid: Grid) -> Tensor:
    """Lay patches [N, 3, P, P] of images of one shape side by side, [M, 3, H, W]."""
    tiles = patches.unflatten(0, (-1, grid.rows, grid.columns))
    return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
