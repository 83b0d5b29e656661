"""What the two backends of `contrastive_loss` are asked for and give back.

S_ij = scale * x_i . y_j for the x of this rank and the y of one rank: a block of similarities. In the block of the own
y the pairs themselves, on the diagonal, are left out of every sum, and added exactly by `BlockFunctions.pair_losses`.

Sums of rows or columns are a tensor [k, 2 to 4] in the compute dtype, one row or column of S each:

- 0: top, near the largest S that was summed; -inf without any;
- 1: the sum of exp(S - top);
- 2, if `Kind.highest`: the largest S of a negative; -inf without any;
- last, if `Kind.positives`: the sum of S over the other positives.

Logarithms (S, tops, shifts) are in nats or in units of log 2, as the backend likes.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lcl_kernels._common import compute_dtype


class PairStatistics(NamedTuple):
    """What `contrastive_loss` tells about the own pairs, [m] each, without gradients."""

    pair_loss: Tensor
    """l_i, not weighted; float32, or float64 for float64 features."""
    similarity: Tensor
    """x_i . y_i, not multiplied by the scale; dtype as `pair_loss`."""
    x_first: Tensor
    """bool: whether S_ii is larger than S_ij for every negative y_j, so that x_i finds y_i. The mean is recall@1.

    Pairs of one group are no negatives of each other. A positive that equals a negative, but for rounding (2e-6 |x_i|
    |y_i| in float32), is not first; one without negatives is.
    """
    y_first: Tensor
    """bool: the same among the S_ji of all negative x_j."""


class Kind(NamedTuple):
    """Which pairs are what to each other, and what is to be known of them."""

    ignored: bool = False
    """Pairs of one group are left out of each other's softmax."""
    positives: bool = False
    """Pairs of one group are positives of each other."""
    highest: bool = False
    """The largest negative of each row and column is wanted."""

    @classmethod
    def of(cls, same_group: str | None, statistics: bool) -> Kind:
        return cls(ignored=same_group == "ignore", positives=same_group == "positive", highest=statistics)

    @property
    def sums(self) -> int:
        """Numbers kept for each row and column."""
        return 2 + self.highest + self.positives


class Block(NamedTuple):
    """The similarities of the own x [m, D] and the y [c, D] of one rank."""

    x: Tensor
    y: Tensor
    scale: Tensor  # a scalar in the compute dtype
    x_norm: Tensor  # [m]
    x_groups: Tensor | None  # [m] int32
    y_groups: Tensor | None  # [c] int32
    diagonal: bool  # whether y is the own one; then m = c
    kind: Kind


class OwnPairs(NamedTuple):
    """What is known of the own pairs before a walk through S, [m] each."""

    x: Tensor  # [m, D]
    y: Tensor  # [m, D]
    scale: Tensor
    similarity: Tensor  # x_i . y_i
    x_norm: Tensor
    y_norm: Tensor
    weight: Tensor | float  # of l_i
    group_size: Tensor | None  # positives of a pair, itself among them, in the compute dtype; None: one
    kind: Kind


class PairLosses(NamedTuple):
    """What follows from the sums, of the own pairs, [m] each.

    `terms` of rows and of columns, [m, 1] or with other positives [m, 2], are what their softmax needs elsewhere:
    lse - log weight, and weight / group size.
    """

    weighted: Tensor  # weight * 2 l_i
    d_scale: Tensor  # the part of the pairs themselves in the derivative of the sum of `weighted`
    row_terms: Tensor
    column_terms: Tensor
    of_row: Tensor  # the derivative of the sum of `weighted` by S_ii, from its row
    of_column: Tensor
    pair_loss: Tensor | None  # l_i; this and the following if `Kind.highest`
    x_first: Tensor | None
    y_first: Tensor | None


class BlockFunctions(Protocol):
    """The module of a backend."""

    def pair_products(self, x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(x_i . y_i, |x_i|, |y_i|), [m] each, in the compute dtype `dtype`."""

    def statistics(self, block: Block, rows: Tensor, columns: Tensor, *, first: bool, workspace_mb: float) -> None:
        """Adds the sums of one block to those of the `rows` [m, ...] and writes those of its `columns` [c, ...].

        Args:
            first: `rows` is uninitialised; this is its first block.
        """

    def pair_losses(self, pairs: OwnPairs, rows: Tensor, columns: Tensor) -> PairLosses:
        """From sums of all `rows` [m, ...] and the parts of all ranks in those of the `columns` [ranks, m, ...]."""

    def pair_gradients(self, x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor) -> tuple[Tensor, Tensor]:
        """(of_x_i y_i, of_y_i x_i), [m, D] each, in the dtype of the factors [m]."""

    def gradients(
        self,
        block: Block,
        row_terms: Tensor | None,
        column_terms: Tensor | None,
        *,
        d_x: Tensor | None,
        d_y: Tensor | None,
        workspace_mb: float,
    ) -> Tensor:
        """Adds G y to `d_x` [m, D] and G^T x to `d_y` [c, D], if given.

        G_ij, 0 on the diagonal, is the sum over the row and the column, as far as their terms are given, of
        exp(S_ij - shift), less the share of each positive where i and j are positives of each other.

        Returns:
            [parts], which add up to sum_ij G_ij x_i . y_j.
        """


def rounding_of(x: Tensor) -> float:
    """What a positive has to beat its negatives by, as a fraction of |x_i| |y_i|: sums of the same products differ by
    so much where they are made in another order."""
    if x.dtype == torch.float32 and x.is_cuda and torch.get_float32_matmul_precision() != "highest":
        return 2.0**-9  # TF32
    return 16 * torch.finfo(compute_dtype(x.dtype)).eps


def clear(sums: Tensor, kind: Kind) -> None:
    """Sums of nothing."""
    sums.zero_()
    sums[:, 0] = -torch.inf
    if kind.highest:
        sums[:, 2] = -torch.inf


def merge(parts: Tensor, kind: Kind) -> Tensor:
    """Partial sums [parts, k, ...] of the same rows or columns, in nats -> their sums [k, ...]."""
    tops, merged = parts[..., 0], torch.empty_like(parts[0])
    merged[:, 0] = tops.amax(0)
    # Clamped, because -inf - -inf, of a row without negatives, would be NaN.
    factors = torch.exp(tops - merged[:, 0].clamp(min=torch.finfo(parts.dtype).min))
    merged[:, 1] = (parts[..., 1] * factors).sum(0)
    if kind.highest:
        merged[:, 2] = parts[..., 2].amax(0)
    if kind.positives:
        merged[:, -1] = parts[..., -1].sum(0)
    return merged
