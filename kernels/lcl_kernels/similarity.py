"""What the two backends of `contrastive_loss` are asked for and give back: one block of similarities at a time.

S_ij = scale * x_i . y_j for the x of this rank and the y of one rank. In the block of the own y the positives, on the
diagonal, are left out of every sum.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class ExpSums(NamedTuple):
    """Sums of exp(S - top) over some of the negatives of each row or column."""

    top: Tensor  # [k], near the largest of these S; -inf without any
    total: Tensor  # [k]


class BlockFunctions(Protocol):
    """The module of a backend."""

    def statistics(
        self, x: Tensor, y: Tensor, scale: Tensor, *, diagonal: bool, workspace_mb: float
    ) -> tuple[ExpSums, ExpSums]:
        """Sums of the rows [m] and of the columns [c] of one block, x [m, D] against y [c, D], from one pass.

        Args:
            scale: a scalar in the compute dtype.
            diagonal: whether S_ii are positives (then m = c).
        """

    def gradients(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        row_shift: Tensor,
        column_shift: Tensor,
        *,
        diagonal: bool,
        d_x: Tensor | None,
        want_y: bool,
        workspace_mb: float,
    ) -> tuple[Tensor | None, Tensor]:
        """With G_ij = exp(S_ij - row_shift_i) + exp(S_ij - column_shift_j): adds G y to `d_x` [m, D], if given.

        Returns:
            G^T x [c, D] (None unless `want_y`) and the scalar sum_ij G_ij x_i . y_j.
        """


def merge(tops: Tensor, totals: Tensor) -> ExpSums:
    """Partial sums [parts, k] of the same rows or columns -> their sums [k]."""
    top = tops.amax(0)
    # Clamped, because -inf - -inf, of a row without negatives, would be NaN.
    factors = torch.exp(tops - top.clamp(min=torch.finfo(top.dtype).min))
    return ExpSums(top, (totals * factors).sum(0))
