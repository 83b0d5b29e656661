"""Tile settings of the Triton kernels, and what they share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lcl_kernels._common import INTERPRETED

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


class Tile(NamedTuple):
    """Output tile, inner step and launch settings of one matrix product kernel."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


HIP = "hip"
BLACKWELL, HOPPER, AMPERE = 100, 90, 80
POINTERS = "pointers"
TILES: dict[str, dict[int | str, Tile]] = {
    # By the least compute capability, and for AMD; none of them spills registers (compile_check.py).
    "logits": {
        BLACKWELL: Tile(128, 128, 64, 8, 4),
        HOPPER: Tile(128, 256, 64, 8, 3),
        AMPERE: Tile(128, 64, 32, 8, 3),
        HIP: Tile(128, 128, 32, 8, 2),
    },
    "logits_general": {HOPPER: Tile(128, 128, 64, 8, 3), AMPERE: Tile(64, 128, 32, 4, 3), HIP: Tile(64, 128, 32, 8, 2)},
    # With ranks or a softcap, which take registers.
    "logits_crowded": {HOPPER: Tile(64, 128, 64, 8, 3), AMPERE: Tile(64, 64, 32, 4, 3), HIP: Tile(64, 64, 32, 8, 2)},
    "statistics": {HOPPER: Tile(128, 128, 64, 8, 3), AMPERE: Tile(128, 128, 32, 8, 3), HIP: Tile(128, 128, 32, 8, 2)},
    "gradient": {HOPPER: Tile(128, 128, 64, 8, 3), AMPERE: Tile(128, 64, 32, 8, 3), HIP: Tile(128, 128, 32, 8, 2)},
    # Where an operand's rows are not aligned; addresses then take registers.
    POINTERS: {HOPPER: Tile(64, 128, 32, 8, 3), AMPERE: Tile(64, 128, 32, 8, 3), HIP: Tile(64, 128, 32, 8, 2)},
}
FLOAT32_TILE = Tile(32, 64, 16, 4, 2)
INTERPRETER_TILE = Tile(64, 128, 64, 4, 1)
"""Few and large blocks: the interpreter takes the same time for each operation, whatever its size."""
MOST_ROWS = 128
"""Rows of the largest tile."""


def target_of(like: Tensor) -> int | str:
    """Compute capability (90: Hopper) of the GPU that `like` is on, or `HIP`."""
    if torch.version.hip:
        return HIP
    major, minor = torch.cuda.get_device_capability(like.device)
    return 10 * major + minor


def tile_on(kernel: str, a: Tensor, b: Tensor) -> Tile:
    """The tile setting of a kernel for the dtype, layout and device of its operands."""
    if INTERPRETED:
        return INTERPRETER_TILE
    if a.dtype == torch.float32:
        return FLOAT32_TILE
    settings, target = TILES[kernel if _aligned(a) and _aligned(b) else POINTERS], target_of(a)
    if isinstance(target, int):
        target = max(least for least in settings if isinstance(least, int) and (least <= target or least == AMPERE))
    return settings[target]


def _aligned(matrix: Tensor) -> bool:
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.itemsize % 16 == 0


def programs_on(like: Tensor) -> int:
    """How many programs of a persistent kernel to start: one for each multiprocessor."""
    return 2 if INTERPRETED else multiprocessors(like)


def multiprocessors(like: Tensor) -> int:
    return int(torch.cuda.get_device_properties(like.device).multi_processor_count)


def precision_of(like: Tensor) -> str:
    """How float32 products are made, following torch.set_float32_matmul_precision."""
    return "ieee" if INTERPRETED or torch.get_float32_matmul_precision() == "highest" else "tf32"


def operand(matrix: Tensor, block: tuple[int, int]) -> tuple[Tensor | TensorDescriptor, int, bool]:
    """(what the kernel loads from, row stride, whether it is a descriptor) of a matrix with unit column stride.

    Descriptors let Hopper's copy engine fill shared memory; they need rows that start at multiples of 16 bytes.
    """
    stride = matrix.stride(0)
    if _aligned(matrix):
        return TensorDescriptor(matrix, list(matrix.shape), [stride, 1], list(block)), stride, True
    return matrix, stride, False


def launch_options(tile: Tile) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}


@triton.jit
def tile_position(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a tile; tiles that run at the same time form a block, so that they share operands in L2."""
    in_group = GROUP * column_tiles
    first = (tile // in_group) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + (tile % in_group) % height, (tile % in_group) // height


@triton.jit
def load_operand(
    matrix, stride, first, rows, k, depth,
    DESCRIPTOR: tl.constexpr, SIZE: tl.constexpr, INNER: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """matrix[first : first + SIZE, k : k + INNER]; out of range counts as zero."""
    if DESCRIPTOR:
        values = matrix.load([first, k])
    else:
        r = first + tl.arange(0, SIZE)
        c = k + tl.arange(0, INNER)
        values = tl.load(
            matrix + r[:, None].to(tl.int64) * stride + c[None, :],
            mask=(r[:, None] < rows) & (c[None, :] < depth), other=0.0,
        )  # fmt: skip
    if UPCAST:  # the interpreter's bfloat16 product is wrong
        values = values.to(tl.float32)
    return values


@triton.jit
def tile_product(
    a, b, stride_a, stride_b, first_row, first_column, rows, columns, depth,
    A_DESCRIPTOR: tl.constexpr, B_DESCRIPTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """a[first_row:, :] @ b[first_column:, :].T, one tile, summed in float32."""
    product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in range(0, depth, INNER):
        left = load_operand(a, stride_a, first_row, rows, k, depth, A_DESCRIPTOR, ROWS, INNER, UPCAST)
        right = load_operand(b, stride_b, first_column, columns, k, depth, B_DESCRIPTOR, COLUMNS, INNER, UPCAST)
        product = tl.dot(left, right.T, product, input_precision=PRECISION)
    return product


@triton.jit
def round_to(values, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """Cast to `dtype`, to nearest even also in the interpreter, which would truncate to bfloat16."""
    if EMULATE and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        values = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return values.to(dtype)
