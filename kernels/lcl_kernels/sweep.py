"""What the two backends of `linear_cross_entropy` are asked for and give back.

A backend has two functions: `scan(inputs, options, counted_rows, rows_made)` reads the labels, `sweep(inputs, counted,
options, wanted, rows_made)` goes through the rows that count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lcl_kernels._common import compute_dtype


class Options(NamedTuple):
    ignore_index: int = -100
    z_loss: float = 0.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    statistics: bool = False
    """Whether the rank of the target is wanted."""
    predicted: bool = False
    """Whether the class with the largest logit is wanted."""
    workspace_mb: float = 64.0


class Wanted(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class Inputs(NamedTuple):
    """Of N rows; hidden, weight and bias have one dtype, weights of the loss have its compute dtype.

    What has one entry for each class is contiguous, everything else may have any strides.

    The loss of row i is, with y its label, t = `token_weight`, c = `class_weight` and e the label smoothing,
    t_i ((1 - e) c_y (lse - z_y) + e / V sum_j c_j (lse - z_j) + z_loss lse^2). Gradients are those of its sum over the
    rows that count, plus `lse_grad` times lse.
    """

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    labels: Tensor  # [N] int64 or int32
    token_weight: Tensor | None = None  # [N]
    class_weight: Tensor | None = None  # [V]
    lse_grad: Tensor | None = None  # [N]


class Scan(NamedTuple):
    """What the labels say, read on the device."""

    rows: Tensor  # [N] (or [n] where nothing had to be sized beforehand), first the n rows that count, in order
    labels: Tensor  # the label of each of them, within [0, V) whatever it was
    summary: Tensor  # [2] int64: n, the first row whose label is out of range (N without one)
    right: Tensor  # [2] bool: no label is out of range, n is `counted_rows`
    mass: Tensor  # [2] compute dtype: divisor of the mean (inf for 0, which gives 0), inf where no row counts else -inf


class Counted(NamedTuple):
    """The n rows that count."""

    rows: Tensor  # [n] int64 or int32
    labels: Tensor  # [n] int64 or int32


class RowResults(NamedTuple):
    """Of N rows. `scan` fills in those that do not count, with 0 or -1, and `sweep` the others."""

    row_loss: Tensor  # [N]
    lse: Tensor  # [N]
    rank: Tensor  # [N] int64, how many classes have a larger logit than the target; empty where not wanted
    predicted: Tensor  # [N] int64, the class with the largest logit, the first of equals; empty where not wanted


class Gradients(NamedTuple):
    """In the compute dtype, empty where they are not wanted."""

    hidden: Tensor  # [N, H], 0 at rows that do not count
    weight: Tensor  # [V, H]
    bias: Tensor  # [V]


def empty_rows(inputs: Inputs, options: Options) -> RowResults:
    n, dtype = len(inputs.labels), compute_dtype(inputs.hidden.dtype)
    return RowResults(
        row_loss=inputs.hidden.new_empty(n, dtype=dtype),
        lse=inputs.hidden.new_empty(n, dtype=dtype),
        rank=inputs.labels.new_empty(n if options.statistics else 0, dtype=torch.int64),
        predicted=inputs.labels.new_empty(n if options.predicted else 0, dtype=torch.int64),
    )


def empty_gradients(inputs: Inputs, counted: Counted, wanted: Wanted) -> Gradients:
    """Room for the gradients: 0 at rows that do not count, else not initialised; all of it 0 when no row counts."""
    dtype = compute_dtype(inputs.hidden.dtype)
    new_hidden = inputs.hidden.new_empty if len(counted.rows) == len(inputs.hidden) else inputs.hidden.new_zeros
    new_sums = inputs.hidden.new_empty if len(counted.rows) else inputs.hidden.new_zeros
    return Gradients(
        hidden=new_hidden(inputs.hidden.shape if wanted.hidden else (0,), dtype=dtype),
        weight=new_sums(inputs.weight.shape if wanted.weight else (0,), dtype=dtype),
        bias=new_sums(len(inputs.weight) if wanted.bias else 0, dtype=dtype),
    )
