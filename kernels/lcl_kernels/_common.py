"""What both losses share: backend choice, precision rules, row chunks and the exact softmax statistics."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]

DEFAULT_WORKSPACE_MB = 128.0
"""Upper bound of the logits kept at a time. Larger chunks pass over the weight less often, with little left to gain."""


def choose_backend(backend: str) -> Literal["torch"]:
    """The implementation to run. "auto" is the torch one everywhere until this build has Triton kernels."""
    if backend == "triton":
        raise RuntimeError("backend='triton': this build of lcl_kernels has no Triton kernels; use 'auto' or 'torch'")
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch', not {backend!r}")
    return "torch"


def refuse_dtensor(**tensors: Tensor | None) -> None:
    # A DTensor can exist only once its module is loaded; importing it here would slow every start for nothing.
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, module.DTensor):
            raise ValueError(f"{name} is a DTensor; pass a plain tensor, for example {name}.full_tensor()")


def check_same(attribute: Literal["dtype", "device"], **tensors: Tensor | None) -> None:
    """All given tensors must agree in dtype or device."""
    found = {name: getattr(tensor, attribute) for name, tensor in tensors.items() if tensor is not None}
    if len(set(found.values())) > 1:
        listing = ", ".join(f"{name} {value}" for name, value in found.items())
        raise ValueError(f"{attribute}s do not match: {listing}")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where logits, softmax and gradient sums live: float64 for float64 inputs, float32 for every other float."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of matrix product operands: low precision only on a GPU, whose matrix units sum in float32.

    On a CPU without matrix units a bfloat16 product is several times slower than the float32 one.
    """
    return tensor.dtype if tensor.is_cuda else compute_dtype(tensor.dtype)


def matmul_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, summed in the dtype of `out`; `a` is rounded to the operand dtype of `b`."""
    if b.dtype == out.dtype:
        return out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)
    product = torch.mm(a.to(b.dtype), b, out_dtype=out.dtype)  # type: ignore[call-overload, unused-ignore]
    return out.add_(product) if accumulate else out.copy_(product)


def row_chunks(rows: int, bytes_per_row: int, workspace_mb: float) -> Iterator[slice]:
    """Slices of nearly equal length that cover `rows`, each at most `workspace_mb` large (but at least one row)."""
    most = max(1, int(workspace_mb * 2**20) // max(1, bytes_per_row))
    count = -(-rows // most)
    for i in range(count):
        yield slice(rows * i // count, rows * (i + 1) // count)


def largest_chunk(rows: int, bytes_per_row: int, workspace_mb: float) -> int:
    return max((c.stop - c.start for c in row_chunks(rows, bytes_per_row, workspace_mb)), default=0)


class RowStatistics(NamedTuple):
    cross_entropy: Tensor  # [rows, 1]
    lse: Tensor  # [rows, 1]
    total: Tensor  # [rows, 1], the sum of the exponentials relative to the row maximum, target included


def exp_excluding_target_(logits: Tensor, target: Tensor) -> RowStatistics:
    """Turns logits [rows, columns] in place into exp(logits - row maximum) with the target column [rows, 1] zeroed.

    Summing without the target keeps confident rows exact. With gap = max - z_target and others = sum of the rest,
    cross entropy = gap + log(others + exp(-gap)) has no cancellation, whereas lse - z_target loses every digit of a
    small loss; and 1 - p_target is -expm1(-cross entropy).
    """
    top = logits.amax(1, keepdim=True)
    gap = top - logits.gather(1, target)
    others = logits.sub_(top).exp_().scatter_(1, target, 0.0).sum(1, keepdim=True)
    total = others + torch.exp(-gap)
    return RowStatistics(gap + torch.log1p(others + torch.expm1(-gap)), top + total.log(), total)


def scaled(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A new tensor, so that a graph kept with retain_graph=True can be used again; rounded to `dtype` once."""
    if gradient is None:
        return None
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Like `once_differentiable`, but says so at once.

    The stock decorator returns constants when the upstream gradient is one, so that a gradient penalty would silently
    train on nothing.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grad_outputs: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this loss can be differentiated once only: its gradient is computed without a graph of its own "
                "(create_graph=True is not supported; use the reference_* function for second derivatives)"
            )
        with torch.autocast(grad_outputs[0].device.type, enabled=False):
            return backward(ctx, *grad_outputs)

    return wrapper
