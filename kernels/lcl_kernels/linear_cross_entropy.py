"""Linear layer and cross entropy in one, without the [N, V] logits.

Rows whose label is ignored are left out first. The others go through in chunks: exponentials of the logits of a chunk,
then, when gradients are wanted, the gradient products of that chunk at once. So logits are computed once, and backward
only multiplies by the upstream gradient.
"""

from __future__ import annotations

import math
import numbers
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from lcl_kernels._common import (
    Backend,
    check_agreement,
    check_dtypes,
    check_same,
    refuse_dtensor,
    resolve_workspace,
    use_triton,
    wants_gradients,
)
from lcl_kernels.linear_operators import Settings, operator

Reduction = Literal["mean", "sum", "none"]
LARGEST_SOFTCAP = 1e30
"""A larger softcap moves no logit below 1e26 by as much as float32 can tell. The quotient would leave its range."""
SMALLEST_SOFTCAP = 1e-30


class TokenStatistics(NamedTuple):
    """What `linear_cross_entropy` can tell besides the loss. Ignored rows have 0, in `rank` and `predicted` -1.

    Without gradients, but for `lse` on request. Shapes are those of labels, `shift` shorter in the last dimension.
    """

    row_loss: Tensor
    """[...], the loss of each row, before reduction."""
    lse: Tensor
    """[...], log-sum-exp of the logits."""
    z_loss: Tensor
    """The part of the loss that is z_loss, reduced like the loss."""
    rank: Tensor
    """[...] int64, how many classes have a larger logit than the target: accuracy is the share of zeros."""
    predicted: Tensor | None = None
    """[...] int64 on request, the class with the largest logit, the first one of equals."""


@overload
def linear_cross_entropy(
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
    reduction: Reduction = "mean",
    counted_rows: int | None = None,
    return_statistics: Literal[False] = False,
    return_predicted: bool = False,
    differentiable_lse: bool = False,
    backend: Backend = "auto",
    workspace_mb: float | None = None,
) -> Tensor: ...


@overload
def linear_cross_entropy(
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
    reduction: Reduction = "mean",
    counted_rows: int | None = None,
    return_statistics: Literal[True],
    return_predicted: bool = False,
    differentiable_lse: bool = False,
    backend: Backend = "auto",
    workspace_mb: float | None = None,
) -> tuple[Tensor, TokenStatistics]: ...


def linear_cross_entropy(
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
    reduction: Reduction = "mean",
    counted_rows: int | None = None,
    return_statistics: bool = False,
    return_predicted: bool = False,
    differentiable_lse: bool = False,
    backend: Backend = "auto",
    workspace_mb: float | None = None,
) -> Tensor | tuple[Tensor, TokenStatistics]:
    """Cross entropy of z = hidden @ weight.T + bias against labels.

    Row i costs lse(z_i) - (1 - label_smoothing) z_i[label] - label_smoothing mean(z_i) + z_loss * lse(z_i)^2. With
    `softcap` c, z becomes c * tanh(z / c) first.

    Args:
        hidden: [..., H], float32, bfloat16, float16 or float64. Only rows that count are read; other layouts than
            that of one matrix are copied.
        weight: [V, H], same dtype. bias: [V], same dtype, or None. Under autocast all three are read as F.linear would,
            so not from float64, and a float32 weight still gets a float32 gradient that was never rounded. A bias of
            -inf hides its class; a row with such a label costs inf.
        labels: [...], int64 or int32, in [0, V), or `ignore_index`.
        shift: position t of the last dimension of labels predicts label t + shift: as hidden[..., :-shift, :] with
            labels[..., shift:], but without a copy of hidden.
        ignore_index: rows with this label count nowhere and cost nothing. A value inside [0, V) stays in the softmax.
        token_weight: [...], what the whole loss of each label is multiplied with, z_loss included. A constant; where
            it may be NaN or the loss infinite, use ignore_index instead of 0.
        class_weight: [V], `weight` of torch.nn.functional.cross_entropy, a constant: of the label, and with
            label_smoothing of each class in the smoothed part. z_loss is not weighted by class.
        z_loss: weight of the squared log-sum-exp (PaLM, arXiv 2204.02311, section 5).
        softcap: bound of the logits, at least 1e-30, or None (Gemma 2, arXiv 2408.00118, section 2).
        label_smoothing: in [0, 1], as in torch.nn.functional.cross_entropy. In Triton the logits are then computed
            twice.
        normalizer: with reduction "mean", what the sum is divided by instead of the number of counted rows: a number
            or a tensor of one element (a constant, never read on the host). Use the global token count here.
        reduction: "mean", "sum", or "none" for [...] with 0 at ignored rows. "mean" divides by the number of counted
            rows, with weights by the sum of token_weight * class_weight[label] over them. "none" computes the logits a
            second time in backward, because the gradient of each row is known only then.
        counted_rows: how many labels are not `ignore_index`, those left out by `shift` not counted, when the caller
            knows. On a GPU nothing then waits for the device, and the call can be captured in a CUDA graph.
        return_statistics: also return `TokenStatistics`, at the price of one comparison per logit.
        return_predicted: with return_statistics, also `TokenStatistics.predicted`.
        differentiable_lse: with return_statistics, let `TokenStatistics.lse` carry gradients. The logits are then
            computed a second time in backward.
        backend: "auto" (Triton on a GPU for bfloat16 and float16, else torch), "triton" or "torch".
        workspace_mb: bound of the logits kept at a time (one row at least); None: 2048 on a GPU, 128 on a CPU.

    Returns:
        The loss in float32 (float64 for float64 inputs), or (loss, TokenStatistics). Without any counted row the loss
        is 0, with zero gradients, whatever the normalizer; also where the weights it is divided by sum to 0. Gradients
        have the dtypes of their inputs; the same inputs give the same bits.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; a label out of range or a wrong `counted_rows` (on
            CUDA with `counted_rows` an asynchronous device assertion instead, so that nothing waits); an empty weight;
            a DTensor; weights that require a gradient; an unusable option.
        RuntimeError: backend "triton" where it cannot run; differentiating twice, forward or by torch.func.
    """
    _check_tensors(hidden, weight, labels, bias)
    _check_weights(weight, labels, token_weight, class_weight)
    _check_shift(shift, labels)
    _check_options(reduction, normalizer, ignore_index, softcap, z_loss, label_smoothing, counted_rows, labels.numel())
    if (return_predicted or differentiable_lse) and not return_statistics:
        raise ValueError("return_predicted and differentiable_lse are about the statistics: set return_statistics=True")
    dtype = _computed_in(hidden=hidden, weight=weight, bias=bias)
    settings = Settings(
        shift=shift,
        ignore_index=ignore_index,
        counted_rows=counted_rows,
        z_loss=z_loss,
        softcap=None if softcap is not None and softcap > LARGEST_SOFTCAP else softcap,
        label_smoothing=label_smoothing,
        statistics=return_statistics,
        predicted=return_predicted,
        dtype=dtype,
        triton=use_triton(backend, hidden, dtype),
        workspace_mb=resolve_workspace(workspace_mb, hidden),
    )
    wants = wants_gradients(hidden, weight, bias)
    tensors = (hidden, weight, bias, labels, token_weight, class_weight)
    if reduction == "none" or differentiable_lse:
        row_loss, lse, rank, predicted, mass = operator("rows", counted_rows)(*tensors, *settings)
        total = row_loss if reduction == "none" else row_loss.sum()
    else:
        total, row_loss, lse, rank, predicted, mass, *_ = operator("sum", counted_rows)(
            *tensors, None, *settings, *wants
        )
    divisor = _divisor(normalizer, mass) if reduction == "mean" else None
    loss = total if divisor is None else total / divisor
    if not return_statistics:
        return loss
    lse_or_constant = lse if differentiable_lse else lse.detach()
    z_part = z_loss * lse.detach() * lse.detach()  # a square alone might overflow
    if token_weight is not None:
        weights = token_weight[..., shift:] if shift else token_weight
        z_part = (z_part * weights.to(z_part.dtype)).where(rank >= 0, 0)
    if reduction != "none":
        z_part = z_part.sum() if divisor is None else z_part.sum() / divisor
    return loss, TokenStatistics(
        row_loss.detach(), lse_or_constant, z_part, rank, predicted if return_predicted else None
    )


def _computed_in(**tensors: Tensor | None) -> torch.dtype:
    """The dtype that all of them have, or that F.linear reads all of them in under autocast."""
    dtypes = {name: _read_in(tensor) for name, tensor in tensors.items() if tensor is not None}
    check_agreement("dtype", dtypes)
    return dtypes["hidden"]


def _read_in(tensor: Tensor) -> torch.dtype:
    """The dtype that F.linear reads the tensor in: under autocast another one, except for float64."""
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(tensor.device.type):
        return tensor.dtype
    return torch.get_autocast_dtype(tensor.device.type)


def _divisor(normalizer: float | Tensor | None, mass: Tensor) -> Tensor:
    """What the sum of the losses is divided by, on the device: `Scan.mass`, or the normalizer where a row counts.

    It is inf where nothing counts, so that loss and gradients are 0.
    """
    if normalizer is None:
        return mass[0]
    unless_none_counts = mass[1]  # -inf, else inf
    if isinstance(normalizer, Tensor):
        return torch.maximum(normalizer.detach().to(mass.device, mass.dtype).reshape(()), unless_none_counts)
    if normalizer == 0:
        _check_no_row_counts(unless_none_counts)
    return unless_none_counts.clamp(min=float(normalizer))


def _check_no_row_counts(unless_none_counts: Tensor) -> None:
    """Refuse to divide by a normalizer of 0 when there is a loss to divide."""
    if torch.compiler.is_compiling():
        torch._assert_async(unless_none_counts > 0, "normalizer is 0, but labels count")
    elif unless_none_counts < 0:
        raise ValueError("normalizer is 0, but labels count")


def _check_tensors(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    refuse_dtensor(hidden=hidden, weight=weight, labels=labels, bias=bias)
    if weight.numel() == 0:
        raise ValueError(
            "weight is empty: under ZeRO-3 call this inside the forward of the module that owns the weight "
            "(or inside deepspeed.zero.GatheredParameters)"
        )
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [..., H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must have the dimensions of hidden but the last, {list(hidden.shape[:-1])}, "
            f"got {list(labels.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{weight.shape[0]}], got {list(bias.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels must be int64 or int32, got {labels.dtype}")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        check_dtypes(**{name: tensor})  # before autocast, which would take any floating point dtype
    check_same("device", hidden=hidden, weight=weight, labels=labels, bias=bias)


def _check_weights(weight: Tensor, labels: Tensor, token_weight: Tensor | None, class_weight: Tensor | None) -> None:
    refuse_dtensor(token_weight=token_weight, class_weight=class_weight)
    expected = (("token_weight", token_weight, labels.shape), ("class_weight", class_weight, weight.shape[:1]))
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        if tensor.is_complex():
            raise ValueError(f"{name} must have real numbers, got {tensor.dtype}")
        if any(wants_gradients(tensor)):
            raise ValueError(f"{name} is a constant without a gradient; pass {name}.detach()")
    check_same("device", labels=labels, token_weight=token_weight, class_weight=class_weight)


def _check_shift(shift: int, labels: Tensor) -> None:
    if shift < 0:
        raise ValueError(f"shift must not be negative, got {shift}")
    if shift and labels.dim() == 0:
        raise ValueError("shift needs labels with a sequence dimension, the last one; these are one number")


def _check_options(
    reduction: str,
    normalizer: float | Tensor | None,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    counted_rows: int | None,
    rows: int,
) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer replaces the count of reduction='mean'; it has no meaning with {reduction!r}")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must have one element, got {list(normalizer.shape)}")
    elif normalizer is not None and not 0 <= normalizer < math.inf:
        raise ValueError(f"normalizer must be a finite number that is not negative, got {normalizer}")
    if not isinstance(ignore_index, (int, numbers.Integral)):
        raise ValueError(
            f"ignore_index must be an integer, got {ignore_index!r}; where every label counts leave it at -100"
        )
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit into int64, got {ignore_index}")
    if softcap is not None and not softcap >= SMALLEST_SOFTCAP:
        raise ValueError(f"softcap must be positive, {SMALLEST_SOFTCAP} at least, got {softcap}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and must not be negative, got {z_loss}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if counted_rows is not None and not 0 <= counted_rows <= rows:
        raise ValueError(f"counted_rows must be in [0, {rows}], got {counted_rows}")
