"""Symmetric InfoNCE over the pairs of all ranks, without the [M, M] similarities.

With S_ij = scale * x_i . y_j and positives on the diagonal, row i of S gives the loss of x_i and column i that of y_i.
A rank walks through its own rows of S, block by block: its own x against the y of every rank. One pass gives the sums
of its rows and its part in the sums of all columns; these parts go to the owners of the columns, whose log-sum-exps
come back to everyone; a second pass makes the gradient of its own x and its part in the gradient of every y, which
goes home to the owner. All of that happens in forward: backward only multiplies by the upstream gradient.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lcl_kernels import torch_contrastive
from lcl_kernels._common import (
    Backend,
    compute_dtype,
    exclusive_cross_entropy,
    operand_dtype,
    resolve_workspace,
    separate_rows,
    use_triton,
    wants_gradients,
)
from lcl_kernels.exchange import (
    Exchange,
    FeatureBlocks,
    GradientReturn,
    Ranks,
    gather_rows,
    group_name,
    meet,
    send_rows_home,
)
from lcl_kernels.pairs import check_pairs, define_operators, kept, operator_of
from lcl_kernels.similarity import BlockFunctions, ExpSums, merge

Normalize = Literal["global", "per_rank"]


def contrastive_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    normalize: Normalize = "global",
    detach_remote: bool = False,
    detach_keys: bool = False,
    counts: Sequence[int] | None = None,
    exchange: Exchange = "auto",
    backend: Backend = "auto",
    workspace_mb: float | None = None,
) -> Tensor:
    """This rank's share of the symmetric InfoNCE loss over the pairs of all ranks (LCL, arXiv 2406.07543; CLIP).

    Pair i is x_i, y_i; every other feature of the opposite side, on any rank, is a negative. Let
    l_i = (-log softmax_j(S_ij)[i] - log softmax_j(S_ji)[i]) / 2, with S_ij = logit_scale * x_i . y_j over all M pairs.

    - normalize="global": the share is sum(l_i over own pairs) / M, so the SUM of the shares is the mean over all pairs.
    - normalize="per_rank": the share is the mean of l_i over the own pairs, as in the published code; what is minimised
      is again the sum of the shares over ranks.
    - The gradients of x and y are those of the sum of the shares over ranks, with the role of the local features as
      negatives on other ranks included. No reduction of feature gradients between ranks is needed or wanted.
    - The gradient of logit_scale is a part of that of the sum: the sum over ranks is the whole.
    - detach_remote=True: features of other ranks are constants, so feature gradients are those of this rank's share.
    - detach_keys=True: every feature is a constant where it stands in the softmax of others, on its own rank too, as in
      OpenCLIP's loss without --gather-with-grad; x_i then learns from the loss of its row only, y_i from its column.
      Features of other ranks are constants then too, so detach_remote changes nothing beside it.

    The upstream gradient has to be the same number on all ranks. Data parallel wrappers that average parameter
    gradients over W ranks give 1/W of the gradient of the sum: scale the loss by W to undo it.

    Args:
        x, y: [m, D], same dtype (float32, bfloat16, float16 or float64), taken as they are: L2-normalise before.
            m may differ between ranks and be 0.
        logit_scale: the multiplier itself (not its logarithm), a tensor of one element of any float dtype.
        group: process group; None is the default group, or this process alone when torch.distributed is not set up.
        normalize, detach_remote, detach_keys: see above.
        counts: pairs of every rank of the group, when the caller knows them: then they are not exchanged and nothing
            waits for the device, but for the first call on a group, in which all ranks meet. All ranks then have to
            want gradients, or none. After the first call nobody notices when ranks differ in their options.
        exchange: "gather" collects y of all ranks at once, "ring" passes it on block by block in less memory, "auto"
            gathers inside one machine and takes the ring across machines.
        backend: "auto" (Triton on a GPU, torch elsewhere and for float64), "triton" or "torch".
        workspace_mb: bound of the similarities kept at a time (one row at least); None: 1024 on a GPU, 128 on a CPU.

    Returns:
        A scalar in float32 (float64 for float64 features); 0, attached to the graph, on a rank without pairs.
        Gradients have the dtype of their inputs. The same inputs on the same ranks give the same bits.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, here or between ranks; a DTensor; an unusable option.
        RuntimeError: backend "triton" where it cannot run; differentiating twice, forward or by torch.func.

    Every rank of the group has to call it, with the same options.
    """
    check_pairs(x, y, exchange, logit_scale=logit_scale)
    if normalize not in ("global", "per_rank"):
        raise ValueError(f"normalize must be 'global' or 'per_rank', not {normalize!r}")
    wanted = wants_gradients(x, y, logit_scale)
    loss, *_ = operator_of("contrastive", group, counts)(
        x,
        y,
        logit_scale,
        group_name(group),
        normalize,
        "keys" if detach_keys else "remote" if detach_remote else "none",
        counts,
        exchange,
        use_triton(backend, x),
        resolve_workspace(workspace_mb, x),
        *wanted,
    )
    return loss


def _contrastive(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    group_name: str,
    normalize: str,
    detach: str,
    counts: Sequence[int] | None,
    exchange: str,
    triton: bool,
    workspace_mb: float,
    want_x: bool,
    want_y: bool,
    want_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, d_x, d_y, d_scale), the gradients in the compute dtype and empty where not wanted."""
    module = importlib.import_module("lcl_kernels.triton_contrastive") if triton else torch_contrastive
    backend = cast(BlockFunctions, module)
    wanted = _Wanted(want_x, want_y, want_scale)
    options = {"normalize": normalize, "detach": detach}
    ranks = meet(
        x,
        group_name,
        "contrastive_loss",
        options,
        exchange=exchange,
        counts=counts,
        wants_gradients=any(wanted),
    )
    with torch.autocast(x.device.type, enabled=False):
        scale = logit_scale.to(compute_dtype(x.dtype)).reshape(())
        left, right = (separate_rows(t.to(operand_dtype(t)).contiguous()) for t in (x, y))
        walk = _Walk(left, right, scale, ranks, FeatureBlocks(right, ranks), backend, workspace_mb)
        cosine = (x.to(scale.dtype) * y.to(scale.dtype)).sum(1)
        losses = _losses(walk, cosine * scale)
        unit = 0.5 / max(1, ranks.total)
        weight = 1.0 if normalize == "global" else max(1, ranks.total) / max(1, ranks.count)  # in that unit
        loss = (unit * weight) * (losses.row.sum() + losses.column.sum())
        if not ranks.wants_gradients:
            return loss, *(scale.new_empty(0) for _ in range(3))  # type: ignore[return-value]
        gradients = _gradients(walk, losses, cosine, weight, detach, wanted)
    d_x, d_y, d_scale = gradients
    made = [d_x.mul_(unit * scale), d_y.mul_(unit * scale), d_scale * unit]
    return loss, *kept(made, wanted, [x, y, logit_scale])  # type: ignore[return-value]


define_operators("contrastive", _contrastive, 3)


class _Wanted(NamedTuple):
    x: bool
    y: bool
    scale: bool


class _Walk(NamedTuple):
    x: Tensor
    y: Tensor
    scale: Tensor
    ranks: Ranks
    blocks: FeatureBlocks
    backend: BlockFunctions
    workspace_mb: float


class _Losses(NamedTuple):
    """Of the own pairs, [m] each: cross entropy and log-sum-exp of their row and of their column."""

    row: Tensor
    column: Tensor
    row_lse: Tensor
    column_lse: Tensor


def _losses(walk: _Walk, positive: Tensor) -> _Losses:
    """The first pass. `positive` [m]: S_ii of the own pairs."""
    ranks = walk.ranks
    rows: list[ExpSums] = [ExpSums(positive.new_full(positive.shape, -math.inf), torch.zeros_like(positive))]
    columns = positive.new_zeros(ranks.total, 2)
    for owner, block in walk.blocks:
        diagonal = owner == ranks.rank
        row_sums, column_sums = walk.backend.statistics(
            walk.x, block, walk.scale, diagonal=diagonal, workspace_mb=walk.workspace_mb
        )
        rows = [merge(*map(torch.stack, zip(*rows, row_sums, strict=True)))] if len(rows[0].top) else rows
        columns[ranks.slice_of(owner)] = torch.stack(column_sums, 1)
    parts = send_rows_home(columns, ranks)
    (row_top, row_total), (column_top, column_total) = rows[0], merge(parts[:, :, 0], parts[:, :, 1])
    row = exclusive_cross_entropy(row_top - positive, row_total)
    column = exclusive_cross_entropy(column_top - positive, column_total)
    return _Losses(row, column, positive + row, positive + column)


def _gradients(
    walk: _Walk, losses: _Losses, cosine: Tensor, weight: float, detach: str, wanted: _Wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """The second pass: d sum of shares / d (scale * x), d (scale * y), d scale, in units of 1 / (2 M)."""
    ranks, scale = walk.ranks, walk.scale
    # exp(S_ij - shift) is a softmax times the weight of its row or column, so weights need not travel apart.
    row_shift = losses.row_lse - math.log(weight)
    column_shifts = gather_rows(losses.column_lse - math.log(weight), ranks)
    of_row, of_column = weight * torch.expm1(-losses.row), weight * torch.expm1(-losses.column)
    both = of_row + of_column
    # The positives, in full precision; everything else is added to them.
    d_x = (of_row if detach == "keys" else both).unsqueeze(1) * walk.y
    d_y = (of_column if detach == "keys" else both).unsqueeze(1) * walk.x
    d_scale = (both * cosine).sum()
    home = GradientReturn(ranks, d_y)
    common: dict[str, Any] = {"workspace_mb": walk.workspace_mb}
    for owner, block in walk.blocks.walk(home):
        own = owner == ranks.rank
        arguments = (walk.x, block, scale, row_shift, column_shifts[ranks.slice_of(owner)])
        if detach == "none" or (detach == "remote" and own):
            want_y = wanted.y or ranks.world_size > 1
            d_block, d_part = walk.backend.gradients(*arguments, diagonal=own, d_x=d_x, want_y=want_y, **common)
        else:  # own rows act on own x alone, and columns on the y of their owners
            nowhere = [torch.full_like(shift, math.inf) for shift in arguments[3:]]
            _, d_rows = walk.backend.gradients(
                *arguments[:4], nowhere[1], diagonal=own, d_x=d_x, want_y=False, **common
            )
            d_block, d_columns = walk.backend.gradients(
                *arguments[:3], nowhere[0], arguments[4], diagonal=own, d_x=None, want_y=True, **common
            )
            d_part = d_rows + d_columns
        d_scale = d_scale + d_part
        if d_block is not None:
            home.send(owner, d_block)
    return d_x, home.finish(), d_scale
