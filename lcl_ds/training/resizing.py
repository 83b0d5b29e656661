"""Read a checkpoint whose images had another size: positions of the tower are resized, and so are their moments."""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from lcl_ds.models.encoders import family_of
from lcl_ds.models.vision import VisionEncoder
from lcl_ds.models.weights.transfer import resize_positions
from lcl_ds.training.slices import SliceReader


@dataclass(frozen=True)
class ResizingReader:
    """Reads slices like :class:`SliceReader`, of position embeddings those of ``tower``'s number of patches."""

    reader: SliceReader
    tower: VisionEncoder

    def read(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Return elements ``start .. stop`` of a flattened tensor of that shape. Raises: UserError: it is not held."""
        saved = self.reader.shapes.get(name, shape)
        family = family_of(self.tower.model.config)
        if saved == shape or not name.endswith(family.positions):
            return self.reader.read(name, shape, start, stop)
        # A mean of squares stays one only where no weight of the mean is negative.
        mode = "bilinear" if name.startswith("exp_avg_sq.") else family.position_mode
        patches = self.tower.patch_tokens
        positions = resize_positions(self.reader.whole(name, saved), shape[-2] - patches, math.isqrt(patches), mode)
        return positions.flatten()[start:stop]


def tower_of(model: nn.Module) -> VisionEncoder:
    """Find the vision tower of an objective."""
    return next(module for module in model.modules() if isinstance(module, VisionEncoder))
