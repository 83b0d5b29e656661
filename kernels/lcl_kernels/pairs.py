"""What the losses over the pairs of all ranks share: their arguments are checked, their operators defined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lcl_kernels._common import (
    DTYPES,
    check_dtypes,
    check_same,
    compute_dtype,
    first_derivative_only,
    refuse_dtensor,
    scaled,
)


def check_pairs(x: Tensor, y: Tensor, exchange: str, **scalars: Tensor) -> None:
    """Refuse features, exchanges and scalars of the logits (by name) that no loss over pairs can use.

    Raises:
        ValueError: which argument is wrong, and what it has to be.
    """
    refuse_dtensor(x=x, y=y, **scalars)
    if x.dim() != 2 or x.shape != y.shape:
        raise ValueError(f"x and y must both be [m, D], got {list(x.shape)} and {list(y.shape)}")
    check_dtypes(x=x, y=y)
    for name, scalar in scalars.items():
        if not isinstance(scalar, Tensor) or scalar.numel() != 1 or not scalar.is_floating_point():
            raise ValueError(f"{name} must be a floating point tensor of one element")
        if scalar.dtype not in DTYPES:
            check_dtypes(**{name: scalar})
    check_same("device", x=x, y=y, **scalars)
    if exchange not in ("auto", "gather", "ring"):
        raise ValueError(f"exchange must be 'auto', 'gather' or 'ring', not {exchange!r}")


def kept(gradients: Sequence[Tensor | None], wanted: Sequence[bool], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradients in the shapes of their inputs, empty where not wanted: what an operator returns after its loss."""
    dtype = compute_dtype(inputs[0].dtype)
    return [
        gradient.reshape(tensor.shape) if want and gradient is not None else tensor.new_empty(0, dtype=dtype)
        for gradient, want, tensor in zip(gradients, wanted, inputs, strict=True)
    ]


def define_operators(
    name: str,
    function: Callable[..., Any],
    differentiable: int,
    others: Callable[..., Sequence[Tensor]] = lambda *arguments: (),
) -> None:
    """Make custom operators of a function that makes the gradients with the loss.

    It returns the loss, the gradients of its first arguments, `differentiable` in number with x the first, as `kept`
    gives them, and results without gradients. Its last arguments, as many, say which gradients are wanted.

    Args:
        others: fake tensors like the results without gradients, from all arguments.
    """

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        x, dtype = arguments[0], compute_dtype(arguments[0].dtype)
        tensors, wanted = arguments[:differentiable], arguments[-differentiable:]
        shapes = [tensor.shape if want else (0,) for tensor, want in zip(tensors, wanted, strict=True)]
        return (*(x.new_empty(shape, dtype=dtype) for shape in ((), *shapes)), *others(*arguments))

    def context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.wanted, ctx.arguments = inputs[-differentiable:], len(inputs)
        ctx.dtypes = [tensor.dtype for tensor in inputs[:differentiable]]
        ctx.save_for_backward(*output[1 : differentiable + 1])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @first_derivative_only
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * ctx.arguments
        if grad is not None:
            for i, (gradient, want, dtype) in enumerate(zip(ctx.saved_tensors, ctx.wanted, ctx.dtypes, strict=True)):
                gradients[i] = scaled(gradient, grad, dtype) if want else None
        return tuple(gradients)

    # Where the ranks have to tell each other their counts the host waits for the device, which no CUDA graph can hold.
    # Tags belong to an operator and not to a call, hence two names.
    for suffix, tags in (("", []), ("_waiting", [torch.Tag.cudagraph_unsafe])):
        operator = torch.library.custom_op(f"lcl_kernels::{name}{suffix}", function, mutates_args=(), tags=tags)
        operator.register_fake(fake)
        operator.register_autograd(backward, setup_context=context)


def operator_of(name: str, group: dist.ProcessGroup | None, counts: Sequence[int] | None) -> Any:
    """The operator of `define_operators` for a call: the one that waits, unless one rank knows all counts."""
    alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1
    return getattr(torch.ops.lcl_kernels, name if alone or counts is not None else f"{name}_waiting")
