"""What the losses over the pairs of all ranks share: their arguments are checked, their gradients given to autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    """The gradients in the shapes of their inputs, empty where not wanted: what an operator returns beside its loss."""
    return [
        gradient.reshape(tensor.shape)
        if want and gradient is not None
        else tensor.new_empty(0, dtype=compute_dtype(inputs[0].dtype))
        for gradient, want, tensor in zip(gradients, wanted, inputs, strict=True)
    ]


def register_gradients(operator: Any, count: int) -> None:
    """Tell torch.compile and autograd of an operator that makes the gradients with the loss.

    It returns the loss and, in the compute dtype, the gradients of its first `count` arguments (`kept`), of which x is
    the first; its last `count` arguments say which are wanted. backward multiplies by the upstream gradient.
    """

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        x, dtype = arguments[0], compute_dtype(arguments[0].dtype)
        shapes = [t.shape if want else (0,) for t, want in zip(arguments[:count], arguments[-count:], strict=True)]
        return tuple(x.new_empty(shape, dtype=dtype) for shape in ((), *shapes))

    def context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.wanted, ctx.arguments = inputs[-count:], len(inputs)
        ctx.dtypes = [tensor.dtype for tensor in inputs[:count]]
        ctx.save_for_backward(*output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @first_derivative_only
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * ctx.arguments
        if grad is not None:
            for i, (gradient, want, dtype) in enumerate(zip(ctx.saved_tensors, ctx.wanted, ctx.dtypes, strict=True)):
                gradients[i] = scaled(gradient, grad, dtype) if want else None
        return tuple(gradients)

    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=context)
