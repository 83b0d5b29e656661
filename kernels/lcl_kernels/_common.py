"""What both losses share: backend choice, precision rules, row chunks and the exact softmax statistics."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backend = Literal["auto", "triton", "torch"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
"""Of features, weights and hidden states."""

WORKSPACE_MB = {"cpu": 128.0, "cuda": 2048.0}
"""Default bound of the [rows, V] or [rows, M] values kept at a time.

On a GPU every chunk beyond the first reads and writes the sum of the weight gradient once more, so chunks should have
some thousand rows; on a CPU chunks that stay near the caches are the faster ones.
"""

MATMUL_MULTIPLE = 8
"""Entries of two bytes in 16 bytes."""
SMALLEST_SPLIT = 1024
"""Shorter lengths are multiplied at once: there a second launch would cost more than it saves (an estimate)."""

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run in Triton's interpreter, on CPU tensors. Read when the package is imported, as Triton itself does."""


def use_triton(backend: str, like: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the Triton kernels run for tensors such as `like`, computed in `dtype` (None: their own).

    "auto" leaves float32 to torch, whose cuBLAS has TF32 products several times faster than these kernels'.

    Raises:
        ValueError: no such backend, or "triton" with float64.
        RuntimeError: "triton" where no kernel can run.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch', not {backend!r}")
    dtype = dtype or like.dtype
    if backend != "triton":
        return backend == "auto" and like.is_cuda and TRITON_INSTALLED and dtype in (torch.bfloat16, torch.float16)
    if dtype == torch.float64:
        raise ValueError("backend='triton' has no float64 kernels; use 'auto' or 'torch'")
    if not TRITON_INSTALLED:
        raise RuntimeError("backend='triton': the package triton is not installed; use 'auto' or 'torch'")
    if not (like.is_cuda or INTERPRETED):
        raise RuntimeError(
            f"backend='triton': these tensors are on {like.device}, where Triton runs only in its interpreter "
            "(TRITON_INTERPRET=1 before lcl_kernels is imported); use 'auto' or 'torch'"
        )
    return True


def resolve_workspace(workspace_mb: float | None, like: Tensor) -> float:
    if workspace_mb is None:
        return WORKSPACE_MB["cuda" if like.is_cuda else "cpu"]
    if not 0 < workspace_mb < math.inf:
        raise ValueError(f"workspace_mb must be positive and finite, got {workspace_mb}")
    return float(workspace_mb)


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
    check_agreement(attribute, {name: getattr(t, attribute) for name, t in tensors.items() if t is not None})


def check_agreement(attribute: str, values: dict[str, Any]) -> None:
    """All values, by the name of the argument that has them, must be equal."""
    if len(set(values.values())) > 1:
        listing = ", ".join(f"{name} {value}" for name, value in values.items())
        raise ValueError(f"{attribute}s do not match: {listing}")


def check_dtypes(**tensors: Tensor | None) -> None:
    """All given tensors must have one of `DTYPES`, and the same."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(f"{name} must have one of the dtypes {allowed}, got {tensor.dtype}")
    check_same("dtype", **tensors)


NO_FORWARD_MODE = (
    "this loss has no forward-mode derivative (torch.func.jvp, jacfwd, dual tensors); "
    "use backward(), or the reference_* function"
)


def wants_gradients(*tensors: Tensor | None) -> list[bool]:
    """Which of the tensors a gradient will be asked for.

    Has to be settled before an operator is called: inside, the grad mode is always off.

    Raises:
        RuntimeError: under forward-mode differentiation, whose tangents an operator would drop without a word, and
            under torch.func.grad and its relatives, which differentiate through the gradient.
    """
    return [tensor is not None and _requires_gradient(tensor) and torch.is_grad_enabled() for tensor in tensors]


def _requires_gradient(tensor: Tensor) -> bool:
    """Whether a tensor, or the one that torch.vmap wrapped in it, requires a gradient that an operator can give."""
    if torch.compiler.is_compiling():  # tensors do not tell their tangents then
        if forward_ad._current_level >= 0:
            raise RuntimeError(NO_FORWARD_MODE)
        return tensor.requires_grad
    functorch = torch._C._functorch
    while is_batched(tensor):
        tensor = functorch.get_unwrapped(tensor)
    if forward_ad.unpack_dual(tensor).tangent is not None:
        raise RuntimeError(NO_FORWARD_MODE)
    if not functorch.is_gradtrackingtensor(tensor):
        return tensor.requires_grad
    if tensor.requires_grad:
        raise RuntimeError(
            "this loss cannot be differentiated by torch.func (grad, vjp, jacrev, hessian), which differentiates "
            "through the gradient; use backward() or torch.autograd.grad, or the reference_* function"
        )
    return _requires_gradient(functorch.get_unwrapped(tensor))


def is_batched(tensor: Tensor) -> bool:
    """Whether torch.vmap, or autograd's is_grads_batched, runs over a dimension of this tensor."""
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor))


def separate_rows(matrix: Tensor) -> Tensor:
    """The matrix, copied unless its columns have a stride of one and its rows do not overlap.

    Kernels and the copy engine of a GPU read such matrices only. `Tensor.contiguous` would not do: it keeps any row
    stride when there is one row.
    """
    if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where logits, softmax and gradient sums live: float64 for float64 inputs, float32 for every other float."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of matrix product operands: low precision only on a GPU, whose matrix units sum in float32.

    On a CPU without matrix units a bfloat16 product is several times slower than the float32 one.
    """
    return tensor.dtype if tensor.is_cuda else compute_dtype(tensor.dtype)


def matmul_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, summed in the dtype of `out`; `a` is rounded to the dtype of `b` first."""
    a = a.to(b.dtype)
    if not out.is_cuda:  # torch has no mixed products on a CPU; only the interpreter's tests come here
        a, b = a.to(out.dtype), b.to(out.dtype)
    low = out.is_cuda and b.itemsize == 2
    for part, left, right, adds in aligned_products(out, a, b) if low else [(out, a, b, False)]:
        if b.dtype == out.dtype:
            part.addmm_(left, right) if accumulate or adds else torch.mm(left, right, out=part)
        elif accumulate or adds:
            torch.addmm(part, left, right, out_dtype=out.dtype, out=part)  # type: ignore[call-overload, unused-ignore]
        else:
            torch.mm(left, right, out_dtype=out.dtype, out=part)  # type: ignore[call-overload, unused-ignore]
    return out


def aligned_products(out: Tensor, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor, Tensor, bool]]:
    """Products that together make out = a @ b: (part of out, left, right, whether it is added to what is there).

    cuBLAS takes its fast kernels only where the length of `a` along its contiguous dimension is a multiple of 16 bytes,
    even if its rows start at such multiples: on an H100 the product of 8192 x 49411 exponentials with a weight of width
    768 ran at 129 TFLOP/s of 777. So the few entries beyond a multiple are a product of their own. Where rows start
    elsewhere nothing is to be gained.

    Args:
        out: [N, H].
        a: [N, K]; its rows or its columns are contiguous.
        b: [K, H].
    """
    rows, inner = a.shape
    if a.stride(1) == 1 and _is_worth_a_split(inner, a.stride(0)):
        whole = inner - inner % MATMUL_MULTIPLE
        return [(out, a[:, :whole], b[:whole], False), (out, a[:, whole:], b[whole:], True)]
    if a.stride(0) == 1 and _is_worth_a_split(rows, a.stride(1)):
        whole = rows - rows % MATMUL_MULTIPLE
        return [(out[:whole], a[:whole], b, False), (out[whole:], a[whole:], b, False)]
    return [(out, a, b, False)]


def _is_worth_a_split(length: int, stride: int) -> bool:
    return length >= SMALLEST_SPLIT and length % MATMUL_MULTIPLE > 0 and stride % MATMUL_MULTIPLE == 0


def row_chunks(rows: int, bytes_per_row: int, workspace_mb: float, multiple: int = 1) -> Iterator[slice]:
    """Slices of nearly equal length that cover `rows`, each at most `workspace_mb` large (but at least one row).

    Where the bound allows it, all but the last have a length that is a multiple of `multiple`.
    """
    most = max(1, int(workspace_mb * 2**20) // max(1, bytes_per_row))
    if most >= multiple:
        most -= most % multiple
    count = -(-rows // most)
    length = -(-rows // max(1, count))
    if most >= multiple:
        length += -length % multiple
    for start in range(0, rows, max(1, length)):
        yield slice(start, min(rows, start + length))


def largest_chunk(rows: int, bytes_per_row: int, workspace_mb: float, multiple: int = 1) -> int:
    return max((c.stop - c.start for c in row_chunks(rows, bytes_per_row, workspace_mb, multiple)), default=0)


def exclusive_cross_entropy(gap: Tensor, others: Tensor) -> Tensor:
    """-log softmax of a target from `others`, the sum of exp(z_j - reference) without the target.

    `gap` is reference - z_target, in nats. Leaving the target out of the sum keeps confident rows exact: lse - z_target
    loses every digit of a small loss, log1p(others * exp(gap)) none.
    """
    half = torch.exp(0.5 * gap.clamp(max=170))  # in two steps, so that only a huge product can overflow
    odds = others * half * half
    return torch.where(odds < 1e30, torch.log1p(odds), gap + torch.log(others + torch.exp(-gap)))


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor, so that a graph kept with retain_graph=True can be used again; rounded to `dtype` once."""
    if torch.compiler.is_compiling() or is_batched(scale):
        return (gradient * scale).to(dtype)
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
        return backward(ctx, *grad_outputs)

    return wrapper
