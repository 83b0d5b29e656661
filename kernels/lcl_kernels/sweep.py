"""What the two backends of `linear_cross_entropy` are asked for and give back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lcl_kernels._common import compute_dtype


class Options(NamedTuple):
    z_loss: float
    softcap: float | None
    label_smoothing: float
    statistics: bool
    """Whether the rank of the target is wanted."""
    workspace_mb: float


class Wanted(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class Swept(NamedTuple):
    """Of n counted rows; gradients are in the compute dtype and empty where they are not wanted."""

    row_loss: Tensor  # [n]
    lse: Tensor  # [n]
    rank: Tensor  # [n] int64, how many classes have a larger logit than the target
    d_hidden: Tensor  # [N, H], 0 at rows that do not count
    d_weight: Tensor  # [V, H]
    d_bias: Tensor  # [V]


def empty_results(hidden: Tensor, weight: Tensor, labels: Tensor, options: Options, wanted: Wanted) -> Swept:
    """Room for the results of the rows that `labels` [n] belong to; d_weight is not initialised."""
    n, dtype = len(labels), compute_dtype(hidden.dtype)
    return Swept(
        row_loss=hidden.new_empty(n, dtype=dtype),
        lse=hidden.new_empty(n, dtype=dtype),
        rank=labels.new_empty(n if options.statistics else 0, dtype=torch.int64),
        d_hidden=(hidden.new_empty if n == len(hidden) else hidden.new_zeros)(
            hidden.shape if wanted.hidden else (0,), dtype=dtype
        ),
        d_weight=hidden.new_empty(weight.shape if wanted.weight else (0,), dtype=dtype),
        d_bias=hidden.new_zeros(len(weight) if wanted.bias else 0, dtype=dtype),
    )
