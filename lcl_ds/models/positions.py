"""Resize position embeddings to the patches of many images at once.

Torch resizes a picture axis by axis. So the position of a patch is a sum over all rows and columns of positions, each
weighted by its row times its column, and one table of weights per axis serves images of every shape.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lcl_ds.grids import PackedImages


class AxisWeights:
    """How much of each of ``side`` positions goes into each of n patches along an axis, for every n.

    Args:
        side: rows, and columns, of the position embeddings.
        mode: of ``F.interpolate``.
        antialias: of ``F.interpolate``.
    """

    def __init__(self, side: int, mode: str, antialias: bool):
        self.side, self.mode, self.antialias = side, mode, antialias
        self._tables: dict[torch.device, Tensor] = {}
        """fp32 [1 + 2 + ... + n, side] by device, grown where a larger image comes."""

    def __call__(self, places: Tensor, images: PackedImages) -> Tensor:
        """Look weights up, fp32 [N, side].

        Args:
            places: int64 [N], the row places or the column places of ``images``.
        """
        longest = max(max(grid.rows, grid.columns) for grid in images.grids)
        table = self._tables.get(places.device)
        if table is None or len(table) < longest * (longest + 1) // 2:
            rows = [axis_weights(self.side, length, self.mode, self.antialias) for length in range(1, longest + 1)]
            table = self._tables[places.device] = torch.cat(rows).to(places.device)
        return table.index_select(0, places)


def axis_weights(side: int, length: int, mode: str, antialias: bool) -> Tensor:
    """Compute what ``F.interpolate`` takes of ``side`` positions for each of ``length``, fp32 [length, side]."""
    if length == side:
        return torch.eye(side)
    # A picture whose columns are alike is resized along its rows alone, in float64 to fp32's last bit.
    positions = torch.eye(side, dtype=torch.float64)[None, :, :, None].expand(-1, -1, -1, side)
    resized = F.interpolate(positions, size=(length, side), mode=mode, align_corners=False, antialias=antialias)
    return resized[0, :, :, 0].T.float().contiguous()
