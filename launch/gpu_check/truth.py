"""The losses and their gradients in float64, a chunk of rows at a time, so that real shapes fit a GPU."""

from typing import Any

import torch
from lcl_kernels import reference_linear_cross_entropy
from torch import Tensor

CHUNK_BYTES = 2**29
"""Of one [rows, V] or [rows, M] matrix in float64; some five of them live at a time."""

Truth = dict[str, Tensor]


def chunks(rows: int, columns: int) -> list[slice]:
    """Slices of rows whose [rows, columns] float64 matrix has about `CHUNK_BYTES`."""
    size = max(1, CHUNK_BYTES // (8 * max(1, columns)))
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]


def exact_linear(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, upstream: Tensor, **options: Any
) -> Truth:
    """Of the sum of upstream[i] * loss of row i: ``row_loss``, ``d_hidden``, ``d_weight`` and, with a bias, ``d_bias``.

    Args:
        hidden: [N, H], weight: [V, H], bias: [V], labels: [N], upstream: [N]; any float dtype.
        options: of `reference_linear_cross_entropy`.
    """
    wide = weight.detach().double().requires_grad_()
    offset = None if bias is None else bias.detach().double().requires_grad_()
    row_loss, d_hidden = [], []
    for rows in chunks(len(hidden), len(weight)):
        part = hidden[rows].detach().double().requires_grad_()
        loss = reference_linear_cross_entropy(part, wide, labels[rows], bias=offset, reduction="none", **options)
        (loss * upstream[rows]).sum().backward()
        assert part.grad is not None
        row_loss.append(loss.detach())
        d_hidden.append(part.grad)
    assert wide.grad is not None
    truth = {"row_loss": torch.cat(row_loss), "d_hidden": torch.cat(d_hidden), "d_weight": wide.grad}
    if offset is not None:
        assert offset.grad is not None
        truth["d_bias"] = offset.grad
    return truth


def exact_contrastive(x: Tensor, y: Tensor, scale: Tensor) -> Truth:
    """Symmetric InfoNCE, the mean over all pairs: ``loss``, ``d_x``, ``d_y``, ``d_scale``."""
    x, y, scale = (tensor.detach().double() for tensor in (x, y, scale))
    m = len(x)
    own = (x * y).sum(1)
    row_lse, column_lse = torch.empty_like(own), torch.full_like(own, -torch.inf)
    for rows in chunks(m, m):
        s = scale * (x[rows] @ y.T)
        row_lse[rows] = s.logsumexp(1)
        column_lse = torch.logaddexp(column_lse, s.logsumexp(0))
    loss = ((row_lse + column_lse) / 2 - scale * own).mean()
    d_x, d_y, d_scale = torch.zeros_like(x), torch.zeros_like(y), torch.zeros_like(scale)
    for rows in chunks(m, m):
        cosine = x[rows] @ y.T
        s = scale * cosine
        g = (torch.exp(s - row_lse[rows, None]) + torch.exp(s - column_lse)) / (2 * m)
        index = torch.arange(rows.start, rows.stop, device=x.device)
        g[index - rows.start, index] -= 1 / m
        d_x[rows] = scale * (g @ y)
        d_y += scale * (g.T @ x[rows])
        d_scale += (g * cosine).sum()
    return {"loss": loss, "d_x": d_x, "d_y": d_y, "d_scale": d_scale}


def exact_sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Truth:
    """Pairwise sigmoid loss divided by the number of pairs: ``loss``, ``d_x``, ``d_y``, ``d_scale``, ``d_bias``."""
    x, y, scale, bias = (tensor.detach().double() for tensor in (x, y, scale, bias))
    m = len(x)
    loss = torch.zeros_like(scale)
    d_x, d_y, d_scale, d_bias = (torch.zeros_like(tensor) for tensor in (x, y, scale, bias))
    for rows in chunks(m, m):
        cosine = x[rows] @ y.T
        sign = -torch.ones_like(cosine)
        index = torch.arange(rows.start, rows.stop, device=x.device)
        sign[index - rows.start, index] = 1
        z = sign * (scale * cosine + bias)
        loss += torch.nn.functional.softplus(-z).sum() / m
        g = -sign * torch.sigmoid(-z) / m
        d_x[rows] = scale * (g @ y)
        d_y += scale * (g.T @ x[rows])
        d_scale += (g * cosine).sum()
        d_bias += g.sum()
    return {"loss": loss, "d_x": d_x, "d_y": d_y, "d_scale": d_scale, "d_bias": d_bias}
