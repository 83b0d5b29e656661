"""Symmetric InfoNCE over the pairs of all ranks, without the [M, M] similarities.

With S_ij = scale * x_i . y_j and positives on the diagonal, row i of S gives the loss of x_i and column i that of y_i.
A rank walks in chunks through its own x against all y, and its own y against all x: once for the log-sum-exps, once
for the gradients. The gradient of a local feature needs from elsewhere only the features and, for its role as a
negative, the log-sum-exps of the other ranks. So three all-gathers in forward are all that travels (the counts, the
features, the log-sum-exps), and backward only multiplies by the upstream gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lcl_kernels._common import (
    DEFAULT_WORKSPACE_MB,
    Backend,
    check_same,
    choose_backend,
    compute_dtype,
    exp_excluding_target_,
    first_derivative_only,
    largest_chunk,
    matmul_,
    operand_dtype,
    refuse_dtensor,
    row_chunks,
    scaled,
)

Normalize = Literal["global", "per_rank"]


def contrastive_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    normalize: Normalize = "global",
    detach_remote: bool = False,
    backend: Backend = "auto",
    workspace_mb: float = DEFAULT_WORKSPACE_MB,
) -> Tensor:
    """This rank's share of the symmetric InfoNCE loss over the pairs of all ranks (LCL, arXiv 2406.07543; CLIP).

    Pair i is x_i, y_i; every other feature of the opposite side, on any rank, is a negative. Let
    l_i = (-log softmax_j(S_ij)[i] - log softmax_j(S_ji)[i]) / 2, with S_ij = logit_scale * x_i . y_j over all M pairs.

    - normalize="global": the share is sum(l_i over own pairs) / M, so the SUM of the shares is the mean over all pairs.
    - normalize="per_rank": the share is the mean of l_i over the own pairs, as in the published code; what is minimised
      is again the sum of the shares over ranks.
    - The gradients of x and y are those of the sum of the shares over ranks, with the role of the local features as
      negatives on other ranks included. No reduction of feature gradients between ranks is needed or wanted.
    - The gradient of logit_scale is that of this rank's share: summed over ranks it is the whole.
    - detach_remote=True: features of other ranks are constants, so all gradients are those of this rank's share.

    The upstream gradient has to be the same number on all ranks. Data parallel wrappers that average parameter
    gradients over W ranks give 1/W of the gradient of the sum: scale the loss by W to undo it.

    Args:
        x, y: [m, D], same dtype (float32, bfloat16, float16 or float64), taken as they are: L2-normalise before.
            m may differ between ranks and be 0.
        logit_scale: the multiplier itself (not its logarithm), a tensor of one element of any float dtype.
        group: process group; None is the default group, or this process alone when torch.distributed is not set up.
        normalize, detach_remote: see above.
        backend: "auto" or "torch"; "triton" is refused while this build has no Triton kernels.
        workspace_mb: bound of the similarities kept at a time (one row at least).

    Returns:
        A scalar in float32 (float64 for float64 features); 0, attached to the graph, on a rank without pairs.
        Gradients have the dtype of their inputs. The same inputs on the same ranks give the same bits.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, here or between ranks; a DTensor; an unusable option.
        RuntimeError: backend "triton", and differentiating twice.

    Every rank of the group has to call it, with the same options; the counts of pairs are read on the host once.
    """
    choose_backend(backend)
    _check(x, y, logit_scale, normalize, workspace_mb)
    # Inside a Function the grad mode is always off, so whether gradients are wanted has to be settled here.
    wanted = tuple(t.requires_grad and torch.is_grad_enabled() for t in (x, y, logit_scale))
    with torch.autocast(x.device.type, enabled=False):
        return _ContrastiveLoss.apply(x, y, logit_scale, group, normalize, detach_remote, wanted, workspace_mb)


class _ContrastiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        logit_scale: Tensor,
        group: dist.ProcessGroup | None,
        normalize: Normalize,
        detach_remote: bool,
        wanted: tuple[bool, bool, bool],
        workspace_mb: float,
    ) -> Tensor:
        ctx.dtypes, ctx.scale_shape = (x.dtype, y.dtype, logit_scale.dtype), logit_scale.shape
        scale = logit_scale.to(compute_dtype(x.dtype)).reshape(())
        ranks = _meet(x, group, any(wanted), normalize, detach_remote)
        own = ranks.own
        x_all, y_all = _gather_rows(torch.cat([x, y], 1), ranks).to(operand_dtype(x)).chunk(2, 1)

        row_loss, row_lse = _losses(x_all[own], y_all, scale, own.start, workspace_mb)
        column_loss, column_lse = _losses(y_all[own], x_all, scale, own.start, workspace_mb)
        weight = 0.5 / max(1, ranks.total if normalize == "global" else ranks.count)
        loss = weight * (row_loss.sum() + column_loss.sum())
        if not ranks.wants_gradients:
            return loss

        # exp(S_ij - shifted) is a softmax times the weight of its row or column, so weights need not travel apart.
        # An infinite shift makes the rows and columns of other ranks count for nothing.
        shifted = torch.stack([row_lse, column_lse], 1) - math.log(weight)
        if detach_remote:
            shifted_all = shifted.new_full((ranks.total, 2), math.inf)
            shifted_all[own] = shifted
        else:
            shifted_all = _gather_rows(shifted, ranks)
        rows = _Side(x_all, shifted_all[:, 0], weight * torch.expm1(-row_loss))
        columns = _Side(y_all, shifted_all[:, 1], weight * torch.expm1(-column_loss))

        d_x = d_y = d_scale = None
        if any(wanted) and ranks.alone:  # every row and every column is here: one walk serves both sides
            d_x, d_y, d_scale = _gradients(rows, columns, scale, own, workspace_mb, both_sides=True)
        elif any(wanted):
            d_x, _, d_scale_rows = _gradients(rows, columns, scale, own, workspace_mb)
            d_y, _, d_scale_columns = _gradients(columns, rows, scale, own, workspace_mb)
            d_scale = d_scale_rows + d_scale_columns
        ctx.save_for_backward(*(d if want else None for d, want in zip((d_x, d_y, d_scale), wanted, strict=True)))
        return loss

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_y, d_scale = (scaled(d, grad, dtype) for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        d_scale = None if d_scale is None else d_scale.reshape(ctx.scale_shape)
        return d_x, d_y, d_scale, None, None, None, None, None


def _losses(queries: Tensor, keys: Tensor, scale: Tensor, start: int, workspace_mb: float) -> tuple[Tensor, Tensor]:
    """Cross entropy [m] and log-sum-exp [m] of queries [m, D] against keys [M, D]; the positive of i is start + i."""
    m, total = len(queries), len(keys)
    loss, lse = scale.new_empty(m, 1), scale.new_empty(m, 1)
    positives = torch.arange(start, start + m, device=keys.device).unsqueeze(1)
    limits = (total * scale.dtype.itemsize, workspace_mb)
    workspace = scale.new_empty(largest_chunk(m, *limits), total)
    for chunk in row_chunks(m, *limits):
        logits = matmul_(workspace[: chunk.stop - chunk.start], queries[chunk], keys.t()).mul_(scale)
        loss[chunk], lse[chunk], _ = exp_excluding_target_(logits, positives[chunk])
    return loss.squeeze(1), lse.squeeze(1)


class _Side(NamedTuple):
    features: Tensor  # [M, D], of all ranks
    shifted: Tensor  # [M], log-sum-exp minus the logarithm of the weight
    at_positive: Tensor  # [m], own pairs: d loss / d S_ii from this side, weight * (softmax_ii - 1)


def _gradients(
    side: _Side, other: _Side, scale: Tensor, own: slice, workspace_mb: float, *, both_sides: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of the own features of `side` [m, D], and of the logit scale from the losses of their rows.

    G_ij = d loss / d S_ij has a part from the loss of row i and a part from the loss of column j. With `both_sides`
    the same walk, which then must have all rows, also gives the gradients of the features of `other`, and that of the
    scale from the losses of both sides.
    """
    queries, keys = side.features[own], other.features
    m, total = len(queries), len(keys)
    d_queries = scale.new_zeros(queries.shape)
    d_keys = scale.new_zeros(keys.shape) if both_sides else None
    d_scale = scale.new_zeros(())
    own_shifted = side.shifted[own].unsqueeze(1)
    positives = torch.arange(own.start, own.stop, device=keys.device).unsqueeze(1)
    limits = (3 * total * scale.dtype.itemsize, workspace_mb)
    workspaces = scale.new_empty(3, largest_chunk(m, *limits), total)
    for chunk in row_chunks(m, *limits):
        cosines, row_part, column_part = workspaces[:, : chunk.stop - chunk.start]
        matmul_(cosines, queries[chunk], keys.t())
        torch.mul(cosines, scale, out=row_part).sub_(own_shifted[chunk]).exp_()
        torch.mul(cosines, scale, out=column_part).sub_(other.shifted).exp_()
        # 1 - softmax of a positive comes from its loss: a difference would lose the digits of confident pairs.
        row_part.scatter_(1, positives[chunk], side.at_positive[chunk].unsqueeze(1))
        column_part.scatter_(1, positives[chunk], other.at_positive[chunk].unsqueeze(1))
        gradient = column_part.add_(row_part)
        d_scale += cosines.mul_(gradient if both_sides else row_part).sum()
        matmul_(d_queries[chunk], gradient, keys)
        if d_keys is not None:
            matmul_(d_keys, gradient.t(), queries[chunk], accumulate=True)
    return d_queries.mul_(scale), None if d_keys is None else d_keys.mul_(scale), d_scale


@dataclass(frozen=True)
class _Ranks:
    """Who has how many pairs."""

    group: dist.ProcessGroup | None
    counts: list[int]
    rank: int
    wants_gradients: bool  # on any rank: then all take part in the exchange of log-sum-exps

    @property
    def alone(self) -> bool:
        return len(self.counts) == 1

    @property
    def count(self) -> int:
        return self.counts[self.rank]

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def own(self) -> slice:
        start = sum(self.counts[: self.rank])
        return slice(start, start + self.count)


def _meet(
    x: Tensor, group: dist.ProcessGroup | None, wants_gradients: bool, normalize: Normalize, detach_remote: bool
) -> _Ranks:
    """Exchanges the counts, and what has to be the same everywhere, so that a mismatch is an error and not a hang."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return _Ranks(group, [len(x)], 0, wants_gradients)
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not a member of the group it passed to contrastive_loss")
    common = (x.shape[1], _DTYPES.index(x.dtype), normalize == "global", detach_remote)
    mine = torch.tensor([len(x), wants_gradients, *common], device=x.device)
    table = [row.tolist() for row in _all_gather(mine, group)]
    if any(row[2:] != table[0][2:] for row in table):
        listing = ", ".join(
            f"rank {r}: D {d} {_DTYPES[t]} normalize {'global' if g else 'per_rank'} detach_remote {bool(c)}"
            for r, (_, _, d, t, g, c) in enumerate(table)
        )
        raise ValueError(f"contrastive_loss was called differently by the ranks of the group: {listing}")
    return _Ranks(group, [row[0] for row in table], rank, any(row[1] for row in table))


def _gather_rows(rows: Tensor, ranks: _Ranks) -> Tensor:
    """[m, K] of each rank -> [M, K], in the order of the ranks."""
    if ranks.alone or ranks.total == 0:
        return rows
    # Gloo cannot gather pieces of different lengths. Bytes, because not every backend knows every dtype.
    padded = rows.new_zeros(max(ranks.counts), rows.shape[1])
    padded[: len(rows)] = rows
    pieces = _all_gather(padded.view(torch.uint8), ranks.group)
    return torch.cat([piece[:n] for piece, n in zip(pieces, ranks.counts, strict=True)]).view(rows.dtype)


def _all_gather(tensor: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    pieces = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(pieces, tensor, group=group)
    return pieces


_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _check(x: Tensor, y: Tensor, logit_scale: Tensor, normalize: str, workspace_mb: float) -> None:
    refuse_dtensor(x=x, y=y, logit_scale=logit_scale)
    if x.dim() != 2 or x.shape != y.shape:
        raise ValueError(f"x and y must both be [m, D], got {list(x.shape)} and {list(y.shape)}")
    check_same("dtype", x=x, y=y)
    if x.dtype not in _DTYPES:
        raise ValueError(f"x and y must be one of {_DTYPES}, got {x.dtype}")
    if not isinstance(logit_scale, Tensor) or logit_scale.numel() != 1 or not logit_scale.is_floating_point():
        raise ValueError("logit_scale must be a floating point tensor of one element, the multiplier itself")
    check_same("device", x=x, y=y, logit_scale=logit_scale)
    if normalize not in ("global", "per_rank"):
        raise ValueError(f"normalize must be 'global' or 'per_rank', not {normalize!r}")
    if not workspace_mb > 0:
        raise ValueError(f"workspace_mb must be positive, got {workspace_mb}")
