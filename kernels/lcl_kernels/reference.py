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
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    normalizer: float | Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Cross entropy of `hidden @ weight.T + bias` against `labels`; arguments as in `linear_cross_entropy`.

    Args:
        hidden: [N, H], any float dtype, which is also the dtype of the computation.
        weight: [V, H]; bias: [V] or None; labels: [N] int64.

    Returns:
        A scalar, or [N] with reduction "none" (0 at ignored rows). Without any counted row the sum 0.
    """
    logits = F.linear(hidden, weight, bias)
    if softcap is not None and softcap < math.inf:
        logits = softcap * torch.tanh(logits / softcap)
    counted = labels != ignore_index
    loss = F.cross_entropy(logits, labels.where(counted, 0).long(), reduction="none", label_smoothing=label_smoothing)
    loss = (loss + z_loss * logits.logsumexp(1).square()).where(counted, 0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (counted.sum().clamp(min=1) if normalizer is None else normalizer)


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
