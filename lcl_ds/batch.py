"""What one rank hands to the model in one micro-step."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lcl_ds.grids import Grid, PackedImages, joined_patches
from lcl_ds.metrics import SourceCounts


@dataclass(frozen=True)
class Readouts:
    """Positions where an objective reads the decoder's state, each about one image."""

    positions: Tensor
    """int64 [P], flat."""
    images: Tensor
    """int64 [P], numbers of images of the batch."""
    documents: Tensor
    """int64 [P], which document each image is of: the same number on all ranks, and another one for any other."""

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class Batch:
    """Packed rows of interleaved documents; R rows of L tokens, M images in S slots, T labels.

    All index tensors are computed on the host when the batch is made, so that the step has neither boolean-mask
    gathers nor data-dependent shapes to wait for. "Flat" positions index the rows laid end to end (``row * L + t``).
    """

    input_ids: Tensor
    """int64 [R, L]."""
    position_ids: Tensor
    """int64 [R, L]; restart at 0 in every document, which is what keeps packed documents apart in attention."""
    cu_seqlens: Tensor
    """int32 [D + 1], flat positions where documents and paddings begin, and the end of the rows."""
    max_seqlen: int
    """Length in tokens of the longest document or padding."""
    images: Tensor
    """uint8 [M, 3, H, W], or float already normalised. A rank without images holds one constant image in a slot
    beyond the rows: under ZeRO-3 every rank must run the encoder once, and its features reach no token. Where there is
    ``packed``, the patches of all images end to end instead, [N, 3, P, P], each image in raster order."""
    image_seeds: Tensor
    """int64 [M], what anything drawn for an image on the device depends on; the same on any number of ranks."""
    slot_images: Tensor
    """int64 [S], which image stands in each slot."""
    slot_positions: Tensor
    """int64 [S], flat position of each slot's first image token."""
    readouts: dict[str, Readouts]
    """By the names that the objective's view gives them; ``context`` is the contrastive one: an image and the position
    of what describes it, such as the ``<soi>`` before it."""
    label_positions: Tensor
    """int64 [T], flat positions that carry generation loss."""
    labels: Tensor
    """int64 [T], the token that follows each label position."""
    image_count: int
    """Real images, without the constant one."""
    document_count: int
    token_count: int
    """Tokens that are not padding."""
    token_squares: int
    """Sum over documents and paddings of the square of their length: the pairs of tokens that attention looks at."""
    skipped_samples: int
    """Samples and images left out since the last batch, damaged or excluded."""
    keys: tuple[str, ...]
    """``source/shard/key`` of every document: names it among all of the run."""
    pieces: tuple[tuple[int, int], ...]
    """For each of them, which of how many pieces of that document it is: ``(1, 3)`` is the second of three."""
    sources: dict[str, SourceCounts]
    """Documents and images of each source that the batch has something of."""
    packed: PackedImages | None = None
    """How images lie that keep their aspect ratio; None where all images of a run are squares."""

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Return those of the real images where images keep their aspect ratio."""
        return self.packed.grids[: self.image_count] if self.packed else ()

    def picture(self, number: int) -> Tensor:
        """Return the pixels of one image, [3, H, W]."""
        if self.packed is None:
            return self.images[number]
        start, end = self.packed.cu_patches[number : number + 2].tolist()
        return joined_patches(self.images[start:end], self.packed.grids[number])[0]

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to ``device``; copies do not block the host when the memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Copy the batch into memory that a GPU copies from without the host."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors: dict[str, Any] = {k: function(v) for k, v in values.items() if isinstance(v, Tensor)}
        readouts = {
            name: Readouts(*(function(getattr(readout, field.name)) for field in fields(Readouts)))
            for name, readout in self.readouts.items()
        }
        packed = self.packed and self.packed.moved(function)
        return Batch(**(values | tensors | {"readouts": readouts, "packed": packed}))
