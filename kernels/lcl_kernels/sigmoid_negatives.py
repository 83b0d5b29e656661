"""What the two backends of `sigmoid_contrastive_loss` are asked for and give back: one block of negatives at a time.

z_ij = scale * x_i . y_j + bias for the x of this rank and the y of one rank, G_ij = sigmoid(z_ij). In the block of the
own y the positives, on the diagonal, are left out.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Block(NamedTuple):
    """The logits of the own x and the y of one rank."""

    x: Tensor  # [m, D]
    y: Tensor  # [c, D]
    scale: Tensor  # a scalar in the compute dtype
    bias: Tensor  # the same
    diagonal: bool  # whether z_ii are positives (then m = c)


class Negatives(NamedTuple):
    """Of one block, in the compute dtype."""

    sums: Tensor  # [3], over the negatives: of log(1 + exp(z_ij)), G_ij, G_ij x_i . y_j; without gradients the first
    d_y: Tensor | None  # gradient_unit * G^T x [c, D] in the compute dtype, if wanted


class BlockFunction(Protocol):
    """The module of a backend."""

    def negatives(
        self, block: Block, *, gradients: bool, d_x: Tensor | None, want_y: bool, workspace_mb: float
    ) -> Negatives:
        """Sums of one block, from one pass; adds gradient_unit * G y to `d_x` [m, D], if given.

        Args:
            gradients: whether to make anything beside the losses.
        """


def gradient_unit(operand: Tensor) -> float:
    """The multiple of G that products are made with.

    Most G are near exp(bias), 4.5e-5 for SigLIP: below the normal numbers of float16, whose digits they would lose.
    """
    return 2.0**15 if operand.dtype == torch.float16 else 1.0
