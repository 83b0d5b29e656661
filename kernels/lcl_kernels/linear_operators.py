"""The custom operators of `linear_cross_entropy`, which carry it through torch.compile.

`linear_cross_entropy_sum` makes gradients in its forward. `linear_cross_entropy_rows`, whose losses and log-sum-exps
per row can both be differentiated, makes them in its backward, by calling the first. Each has a second name,
`..._waiting`, for calls that read the number of counted rows from the device, which no CUDA graph can hold.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcl_kernels import torch_linear_cross_entropy
from lcl_kernels._common import compute_dtype, first_derivative_only, scaled
from lcl_kernels.sweep import Counted, Inputs, Options, Scan, Wanted, empty_rows


class Settings(NamedTuple):
    """The numbers that follow the tensors of both operators, in the order of their arguments."""

    shift: int
    ignore_index: int
    counted_rows: int | None
    z_loss: float
    softcap: float | None
    label_smoothing: float
    statistics: bool
    predicted: bool
    dtype: torch.dtype
    triton: bool
    workspace_mb: float

    def options(self) -> Options:
        return Options(
            self.ignore_index,
            self.z_loss,
            self.softcap,
            self.label_smoothing,
            self.statistics,
            self.predicted,
            self.workspace_mb,
        )


def operator(kind: str, counted_rows: int | None) -> Any:
    """The operator "sum" or "rows" for calls that know the number of counted rows, or do not."""
    return getattr(torch.ops.lcl_kernels, f"linear_cross_entropy_{kind}" + ("_waiting" if counted_rows is None else ""))


def _sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weight: Tensor | None,
    class_weight: Tensor | None,
    lse_grad: Tensor | None,
    shift: int,
    ignore_index: int,
    counted_rows: int | None,
    z_loss: float,
    softcap: float | None,
    label_smoothing: float,
    statistics: bool,
    predicted: bool,
    dtype: torch.dtype,
    triton: bool,
    workspace_mb: float,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum of the losses, row_loss, lse, rank, predicted, mass, d_hidden, d_weight, d_bias).

    Args:
        hidden: [..., H]; labels, token_weight: [...]; lse_grad and results of rows: [...], `shift` shorter at the end.
        dtype: what hidden, weight and bias, which may have other dtypes, are computed in.

    The gradients are those of the sum and of `lse_grad` times lse, in the compute dtype, empty where not wanted.
    `mass` is that of `Scan`.
    """
    settings = Settings(
        shift, ignore_index, counted_rows, z_loss, softcap, label_smoothing, statistics, predicted, dtype, triton,
        workspace_mb,
    )  # fmt: skip
    options, wanted = settings.options(), Wanted(want_hidden, want_weight, want_bias)
    if triton:
        from lcl_kernels import triton_linear_cross_entropy as backend
    else:
        backend = torch_linear_cross_entropy  # type: ignore[misc]
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        inputs = _inputs(hidden, weight, bias, labels, token_weight, class_weight, lse_grad, settings)
        rows_made = empty_rows(inputs, options)
        scan = backend.scan(inputs, options, counted_rows, rows_made)
        counted = _counted(scan, labels, shift, counted_rows, len(weight))
        gradients = backend.sweep(inputs, counted, options, wanted, rows_made)
    return (
        rows_made.row_loss.sum(),
        *(_of_positions(result, labels, shift) for result in rows_made),  # type: ignore[return-value]
        scan.mass,
        gradients.hidden.view(hidden.shape if want_hidden else (0,)),
        gradients.weight,
        gradients.bias,
    )


def _inputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weight: Tensor | None,
    class_weight: Tensor | None,
    lse_grad: Tensor | None,
    settings: Settings,
) -> Inputs:
    """One row for each position of `hidden`, with the label that it predicts; no label for the last `shift` ones."""
    dtype = compute_dtype(settings.dtype)
    if settings.shift:
        shift = min(settings.shift, labels.shape[-1])
        labels = torch.nn.functional.pad(labels.long()[..., shift:], (0, shift), value=settings.ignore_index)
        if token_weight is not None:
            token_weight = torch.nn.functional.pad(token_weight[..., shift:], (0, shift))
        if lse_grad is not None:
            lse_grad = torch.nn.functional.pad(lse_grad, (0, shift))
    return Inputs(
        hidden=hidden.to(settings.dtype).reshape(-1, hidden.shape[-1]),
        weight=weight.to(settings.dtype),
        bias=None if bias is None else bias.to(settings.dtype).contiguous(),
        labels=labels.reshape(-1),
        token_weight=None if token_weight is None else token_weight.to(dtype).reshape(-1),
        class_weight=None if class_weight is None else class_weight.to(dtype).contiguous(),
        lse_grad=None if lse_grad is None else lse_grad.to(dtype).reshape(-1),
    )


def _counted(scan: Scan, labels: Tensor, shift: int, counted_rows: int | None, vocab: int) -> Counted:
    """The rows that count.

    Raises:
        ValueError: a label is out of range or `counted_rows` is wrong; where it is given and the labels are on a GPU,
            an asynchronous device assertion instead.
    """
    if labels.is_cuda and counted_rows is not None:
        in_range, as_told = scan.right.unbind()
        torch._assert_async(in_range, f"a label is outside [0, {vocab}) and is not ignore_index")
        torch._assert_async(as_told, f"counted_rows={counted_rows} is not what labels say")
        return Counted(scan.rows[:counted_rows], scan.labels[:counted_rows])
    count, first_bad = scan.summary.tolist()
    if first_bad < labels.numel():
        index = _index(first_bad, labels.shape, shift)
        value = int(labels[tuple(index)])
        raise ValueError(f"labels{index or ''} = {value} is outside [0, {vocab}) and is not ignore_index")
    if counted_rows is not None and count != counted_rows:
        raise ValueError(f"counted_rows is {counted_rows}, but {count} labels count")
    return Counted(scan.rows[:count], scan.labels[:count])


def _index(row: int, shape: torch.Size, shift: int) -> list[int]:
    """Where the label of a row is in `labels` of this shape."""
    index: list[int] = []
    for length in reversed(shape):
        row, at = divmod(row, length)
        index.insert(0, at)
    if shift:
        index[-1] += shift
    return index


def _of_positions(result: Tensor, labels: Tensor, shift: int) -> Tensor:
    """The results [N] of rows as [...], without the last `shift` positions, which predict nothing."""
    if len(result) != labels.numel():  # not wanted
        return result
    result = result.view(labels.shape)
    return result[..., : max(0, labels.shape[-1] - shift)].contiguous() if shift else result


def _fake_rows(hidden: Tensor, labels: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(settings.dtype)
    shape = [*labels.shape]
    if settings.shift:
        shape[-1] = max(0, shape[-1] - settings.shift)
    return (
        hidden.new_empty(shape, dtype=dtype),
        hidden.new_empty(shape, dtype=dtype),
        labels.new_empty(shape if settings.statistics else (0,), dtype=torch.int64),
        labels.new_empty(shape if settings.predicted else (0,), dtype=torch.int64),
    )


def _fake_sum(hidden, weight, bias, labels, token_weight, class_weight, lse_grad, *arguments):  # type: ignore[no-untyped-def]
    settings, (want_hidden, want_weight, want_bias) = Settings(*arguments[:-3]), arguments[-3:]
    dtype = compute_dtype(settings.dtype)
    return (
        hidden.new_empty((), dtype=dtype),
        *_fake_rows(hidden, labels, settings),
        hidden.new_empty(2, dtype=dtype),
        hidden.new_empty(hidden.shape if want_hidden else (0,), dtype=dtype),
        hidden.new_empty(weight.shape if want_weight else (0,), dtype=dtype),
        hidden.new_empty(weight.shape[0] if want_bias else 0, dtype=dtype),
    )


def _sum_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted = inputs[-3:]
    ctx.dtypes, ctx.inputs = _dtypes(inputs), len(inputs)
    ctx.save_for_backward(*output[6:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _dtypes(inputs: tuple[Any, ...]) -> list[torch.dtype | None]:
    """Of hidden, weight and bias, and so of their gradients."""
    return [None if tensor is None else tensor.dtype for tensor in inputs[:3]]


@first_derivative_only
def _sum_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * ctx.inputs
    if grad is not None:
        for i, (gradient, dtype, want) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)):
            gradients[i] = scaled(gradient, grad, dtype) if want else None
    return tuple(gradients)


def _rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weight: Tensor | None,
    class_weight: Tensor | None,
    shift: int,
    ignore_index: int,
    counted_rows: int | None,
    z_loss: float,
    softcap: float | None,
    label_smoothing: float,
    statistics: bool,
    predicted: bool,
    dtype: torch.dtype,
    triton: bool,
    workspace_mb: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row_loss, lse, rank, predicted, mass); see `_sum`."""
    results = _sum(
        hidden, weight, bias, labels, token_weight, class_weight, None, shift, ignore_index, counted_rows, z_loss,
        softcap, label_smoothing, statistics, predicted, dtype, triton, workspace_mb, False, False, False,
    )  # fmt: skip
    return results[1:6]


def _fake_rows_op(hidden, weight, bias, labels, token_weight, class_weight, *arguments):  # type: ignore[no-untyped-def]
    settings = Settings(*arguments)
    mass = hidden.new_empty(2, dtype=compute_dtype(settings.dtype))
    return *_fake_rows(hidden, labels, settings), mass


def _rows_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.settings, ctx.inputs = Settings(*inputs[6:]), len(inputs)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


@first_derivative_only
def _rows_backward(ctx: Any, row_grad: Tensor | None, lse_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * ctx.inputs
    if row_grad is None and lse_grad is None:
        return tuple(gradients)
    hidden, weight, bias, labels, token_weight, class_weight = ctx.saved_tensors
    settings, wanted = ctx.settings._replace(statistics=False, predicted=False), ctx.needs_input_grad[:3]
    weights = _upstream_weights(row_grad, token_weight, labels, settings)
    results = operator("sum", settings.counted_rows)(
        hidden, weight, bias, labels, weights, class_weight, lse_grad, *settings, *wanted
    )
    for i, (gradient, tensor, want) in enumerate(zip(results[6:], (hidden, weight, bias), wanted, strict=True)):
        gradients[i] = gradient.to(tensor.dtype) if want else None
    return tuple(gradients)


def _upstream_weights(
    row_grad: Tensor | None, token_weight: Tensor | None, labels: Tensor, settings: Settings
) -> Tensor:
    """[...], what the gradient of each label's loss is multiplied with: a weight known only in backward."""
    dtype = compute_dtype(settings.dtype)
    if row_grad is None:
        return torch.zeros(labels.shape, dtype=dtype, device=labels.device)
    if settings.shift:
        row_grad = torch.nn.functional.pad(row_grad, (labels.shape[-1] - row_grad.shape[-1], 0))
    return row_grad if token_weight is None else row_grad * token_weight.to(dtype)


def _register(kind: str, function: Any, fake: Any, backward: Any, context: Any) -> None:
    """Two operators of one function, as a tag belongs to an operator and not to a call."""
    name = f"lcl_kernels::linear_cross_entropy_{kind}"
    for suffix, tags in (("", ()), ("_waiting", (torch.Tag.cudagraph_unsafe,))):
        made = torch.library.custom_op(name + suffix, mutates_args=(), tags=tags)(function)
        made.register_fake(fake)
        made.register_autograd(backward, setup_context=context)


_register("sum", _sum, _fake_sum, _sum_backward, _sum_context)
_register("rows", _rows, _fake_rows_op, _rows_backward, _rows_context)
