"""Textbook versions of the losses, with every matrix built. In float64 they are the truth the tests compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


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
) -> Tensor:
    """One rank's share of the symmetric InfoNCE loss, from the pairs of all ranks in one process.

    Args:
        x, y: [M, D], the features of all ranks one after the other; pair i is x[i], y[i].
        logit_scale: the multiplier, one element.
        counts: pairs per rank; None: one rank has them all.
        rank: whose share to return. The sum of the shares is what training minimises.
        normalize, detach_remote, detach_keys: as in `contrastive_loss`.

    Returns:
        A scalar, 0 for a rank without pairs. The loss of LCL (arXiv 2406.07543) and CLIP (arXiv 2103.00020).
    """
    counts = [len(x)] if counts is None else counts
    start = sum(counts[:rank])
    own = torch.arange(start, start + counts[rank], device=x.device)
    if detach_remote:
        local = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
        local[own] = True
        x, y = x.where(local, x.detach()), y.where(local, y.detach())
    scale = logit_scale.reshape(())
    rows, columns = scale * x @ y.T, scale * y @ x.T
    if detach_keys:
        rows, columns = scale * x @ y.detach().T, scale * y @ x.detach().T
    both = F.cross_entropy(rows[own], own, reduction="sum") + F.cross_entropy(columns[own], own, reduction="sum")
    pairs = len(x) if normalize == "global" else len(own)
    return both / (2 * max(pairs, 1))
