"""Textbook versions of the losses, with every matrix built. In float64 they are the truth the tests compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lcl_kernels.similarity import PairStatistics


def reference_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    shift: int = 0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    normalizer: float | Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Cross entropy of `hidden @ weight.T + bias` against `labels`; arguments as in `linear_cross_entropy`.

    Args:
        hidden: [..., H], any float dtype, which is also the dtype of the computation.
        weight: [V, H]; bias, class_weight: [V] or None; labels, token_weight: [...].

    Returns:
        A scalar, or [...] with reduction "none" (0 at ignored rows). Where nothing counts, 0.
    """
    if shift:
        length = max(0, labels.shape[-1] - shift)
        hidden, labels = hidden[..., :length, :], labels[..., shift:]
        token_weight = None if token_weight is None else token_weight[..., shift:]
    logits = reference_logits(hidden, weight, bias, softcap).view(-1, len(weight))
    counted = labels.flatten() != ignore_index
    target = labels.flatten().where(counted, 0).long()
    class_weight = None if class_weight is None else class_weight.to(logits.dtype)
    loss = F.cross_entropy(logits, target, weight=class_weight, reduction="none", label_smoothing=label_smoothing)
    loss = loss + z_loss * logits.logsumexp(1).square()
    weights = torch.ones_like(loss) if token_weight is None else token_weight.flatten().to(loss.dtype)
    weights = weights.where(counted, 0)
    loss = weights * loss.where(counted, 0)
    if reduction == "none":
        return loss.view(labels.shape)
    if reduction == "sum":
        return loss.sum()
    if class_weight is not None:
        weights = weights * class_weight[target]
    divisor = weights.sum() if normalizer is None else torch.as_tensor(normalizer)
    nothing = ~counted.any() | (divisor == 0)
    return torch.where(nothing, 0 * loss.sum(), loss.sum() / divisor.where(~nothing, 1))


def reference_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """The logits [..., V] of hidden [..., H]."""
    logits = F.linear(hidden, weight, bias)
    return softcap * torch.tanh(logits / softcap) if softcap is not None and softcap < math.inf else logits


def reference_contrastive_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    *,
    counts: Sequence[int] | None = None,
    rank: int = 0,
    normalize: Literal["global", "per_rank"] = "global",
    detach_remote: bool = False,
    detach_keys: bool = False,
    group_ids: Tensor | None = None,
    same_group: Literal["ignore", "positive"] = "ignore",
    pair_weight: Tensor | None = None,
    return_statistics: bool = False,
) -> Any:
    """One rank's share of the symmetric InfoNCE loss, from the pairs of all ranks in one process.

    Args:
        x, y: [M, D], the features of all ranks one after the other; pair i is x[i], y[i].
        logit_scale: the multiplier, one element.
        counts: pairs per rank; None: one rank has them all.
        rank: whose share to return. The sum of the shares is what training minimises.
        group_ids, pair_weight: [M], of all ranks like the features, or None.
        normalize, detach_remote, detach_keys, same_group, return_statistics: as in `contrastive_loss`.

    Returns:
        A scalar, 0 for a rank without pairs. The loss of LCL (arXiv 2406.07543) and CLIP (arXiv 2103.00020). With
        `return_statistics` (loss, PairStatistics).
    """
    counts = [len(x)] if counts is None else counts
    start = sum(counts[:rank])
    own = torch.arange(start, start + counts[rank], device=x.device)
    if detach_remote:
        local = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
        local[own] = True
        x, y = x.where(local, x.detach()), y.where(local, y.detach())
    scale, similarity = logit_scale.reshape(()), (x * y).sum(1)
    rows, columns = scale * x @ y.T, scale * y @ x.T
    if detach_keys:
        rows, columns = scale * x @ y.detach().T, scale * y @ x.detach().T
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    same = itself if group_ids is None else group_ids[:, None] == group_ids
    left_out, positives = (same & ~itself, itself) if same_group == "ignore" else (itself & ~itself, same)
    losses = [_mean_over_positives(side.masked_fill(left_out, -math.inf), positives)[own] for side in (rows, columns)]
    loss = (losses[0] + losses[1]) / 2
    weight = torch.ones_like(similarity) if pair_weight is None else pair_weight.to(x.dtype)
    total = (weight if normalize == "global" else weight[own]).sum()
    share = (weight[own] * loss).sum() / torch.where(total > 0, total, 1)
    if not return_statistics:
        return share
    positive = (scale * similarity).unsqueeze(1)
    first = [(positive > side.masked_fill(same, -math.inf)).all(1)[own] for side in (rows, columns)]
    return share, PairStatistics(loss.detach(), similarity.detach()[own], *first)


def _mean_over_positives(logits: Tensor, positives: Tensor) -> Tensor:
    """The mean of -log softmax over the positives of each row."""
    costs = -logits.log_softmax(1)
    return costs.where(positives, 0).sum(1) / positives.sum(1)


def reference_sigmoid_contrastive_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    counts: Sequence[int] | None = None,
    rank: int = 0,
) -> Tensor:
    """One rank's share of the sigmoid loss, from the pairs of all ranks in one process.

    Args:
        x, y: [M, D], the features of all ranks one after the other; pair i is x[i], y[i].
        logit_scale, logit_bias: the multiplier and what is added, one element each.
        counts: pairs per rank; None: one rank has them all.
        rank: whose share to return. The sum of the shares is what training minimises.

    Returns:
        A scalar, 0 for a rank without pairs. The loss of SigLIP (arXiv 2303.15343).
    """
    counts = [len(x)] if counts is None else counts
    start = sum(counts[:rank])
    own = slice(start, start + counts[rank])
    logits = logit_scale.reshape(()) * x @ y.T + logit_bias.reshape(())
    sign = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
    return -F.logsigmoid(sign * logits)[own].sum() / max(len(x), 1)
