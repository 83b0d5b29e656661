"""Tile settings of the Triton kernels, and what they share."""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
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
    programs: int = 1
    """Persistent programs to start on each multiprocessor; compile_check.py tells how many fit."""
    group: int = 8
    """Height, in tiles, of the blocks of tiles that run at the same time (`tile_position`)."""


class TunedTile(NamedTuple):
    """The fastest tile that was measured on a device, for operands of one width and number of columns."""

    device: str
    """As torch.cuda.get_device_name says."""
    kernel: str
    """A key of `TILES`."""
    width: int
    columns: int
    tile: Tile


TUNED_FILE = Path(__file__).with_name("tuned.json")
SPARE_MULTIPROCESSORS = 8
"""Left free when there are other ranks. The programs of a collective need multiprocessors of their own; where none is
free, a persistent kernel and the collective run one after the other."""

REGISTERS = 65_536
"""Of a multiprocessor of any NVIDIA GPU."""

HIP = "hip"
BLACKWELL, HOPPER, AMPERE = 100, 90, 80
POINTERS = "pointers"
TILES: dict[str, dict[int | str, Tile]] = {
    # By the least compute capability, and for AMD; none of them spills registers (compile_check.py). Those of logits,
    # statistics and gradient on Hopper won on an H100 (bench_results/gpu_tune_h100.json); the others are not measured.
    "logits": {
        BLACKWELL: Tile(128, 128, 64, 8, 4),
        HOPPER: Tile(128, 256, 64, 8, 3, group=32),
        AMPERE: Tile(128, 64, 32, 8, 3),
        HIP: Tile(128, 128, 32, 8, 2),
    },
    "logits_general": {HOPPER: Tile(128, 128, 64, 8, 3), AMPERE: Tile(64, 128, 32, 4, 3), HIP: Tile(64, 128, 32, 8, 2)},
    # With ranks or a softcap, which take registers.
    "logits_crowded": {HOPPER: Tile(64, 128, 64, 8, 3), AMPERE: Tile(64, 64, 32, 4, 3), HIP: Tile(64, 64, 32, 8, 2)},
    "statistics": {
        HOPPER: Tile(128, 128, 64, 8, 3, programs=2, group=32),
        AMPERE: Tile(128, 128, 32, 8, 3),
        HIP: Tile(128, 128, 32, 8, 2),
    },
    # With two exponentials, because |S| is not bounded.
    "statistics_two": {
        BLACKWELL: Tile(128, 128, 64, 8, 3),
        HOPPER: Tile(128, 128, 64, 8, 3, programs=2),
        AMPERE: Tile(128, 128, 32, 8, 3),
        HIP: Tile(128, 128, 32, 8, 2),
    },
    # With groups or maxima, which take registers.
    "statistics_crowded": {
        BLACKWELL: Tile(128, 64, 64, 8, 3),
        HOPPER: Tile(64, 128, 64, 8, 3),
        AMPERE: Tile(128, 128, 32, 8, 3),
        HIP: Tile(128, 128, 32, 8, 2),
    },
    "gradient": {
        BLACKWELL: Tile(128, 128, 64, 8, 3),
        HOPPER: Tile(64, 128, 64, 4, 4, programs=2),
        AMPERE: Tile(128, 64, 32, 8, 3),
        HIP: Tile(128, 128, 32, 8, 2),
    },
    # With groups, which take registers.
    "gradient_crowded": {
        HOPPER: Tile(128, 128, 64, 8, 3),
        AMPERE: Tile(64, 64, 32, 8, 3),
        HIP: Tile(128, 128, 32, 8, 2),
    },
    "sigmoid": {HOPPER: Tile(128, 128, 64, 8, 3), AMPERE: Tile(128, 64, 32, 8, 3), HIP: Tile(128, 128, 32, 8, 2)},
    # Where an operand's rows are not aligned; addresses then take registers.
    POINTERS: {HOPPER: Tile(64, 128, 32, 8, 3), AMPERE: Tile(64, 64, 32, 8, 3), HIP: Tile(64, 128, 32, 8, 2)},
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
    aligned = _aligned(a) and _aligned(b)
    if aligned and (tuned := nearest_tuned(tuned_tiles(), device_name(a), kernel, a.shape[1], b.shape[0])):
        return tuned.tile
    settings, target = TILES[kernel if aligned else POINTERS], target_of(a)
    if isinstance(target, int):
        target = max(least for least in settings if isinstance(least, int) and (least <= target or least == AMPERE))
    return settings[target]


@functools.cache
def tuned_tiles() -> tuple[TunedTile, ...]:
    """What was measured on GPUs: the records of the package, then those of the file that LCL_KERNELS_TUNED names.

    Raises:
        ValueError: a file is not a list of such records.
    """
    extra = os.environ.get("LCL_KERNELS_TUNED")
    return tuple(record for path in (TUNED_FILE, *([Path(extra)] if extra else [])) for record in read_tuned(path))


def read_tuned(path: Path) -> list[TunedTile]:
    """The records of a JSON file: a list of objects with the fields of `TunedTile`, and more that are not read."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(records, list):
            raise TypeError(f"a {type(records).__name__}")
        return [
            TunedTile(**{name: record[name] for name in TunedTile._fields[:-1]}, tile=Tile(**record["tile"]))
            for record in records
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a list of tuned tiles: {type(error).__name__}: {error}") from error


def nearest_tuned(
    records: tuple[TunedTile, ...], device: str, kernel: str, width: int, columns: int
) -> TunedTile | None:
    """The record of this device and kernel whose shape is nearest, as factors go; the last of equals. None without any.

    The width decides first: it is the length of the inner loop.
    """

    def distance(record: TunedTile) -> tuple[float, float]:
        return abs(math.log(record.width / max(1, width))), abs(math.log(record.columns / max(1, columns)))

    own = [record for record in records if (record.device, record.kernel) == (device, kernel)]
    return min(reversed(own), key=distance, default=None)


def device_name(like: Tensor) -> str:
    return torch.cuda.get_device_name(like.device) if like.is_cuda else "cpu"


def _aligned(matrix: Tensor) -> bool:
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.itemsize % 16 == 0


def programs_on(like: Tensor, tile: Tile) -> int:
    """How many programs of a persistent kernel to start, so that all of them run at once."""
    if INTERPRETED:
        return 2
    spare = SPARE_MULTIPROCESSORS if _other_ranks() else 0
    return tile.programs * max(1, multiprocessors(like) - spare)  # one also on a small slice of a GPU


def _other_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


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
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.programs > 1:  # left alone, the compiler takes registers that the other programs need
        options["maxnreg"] = min(255, REGISTERS // (32 * tile.warps * tile.programs))
    return options


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


@triton.jit
def log1p_exact(x):
    """log(1 + x) of x >= 0 with all its digits, also where 1 + x has none of them: a series in x / (2 + x)."""
    part = x / (2.0 + x)
    square = part * part
    series = square * 0.1111111111111111 + 0.14285714285714285
    series = series * square + 0.2
    series = series * square + 0.3333333333333333
    near = 2.0 * part * (series * square + 1.0)
    return tl.where(x < 0.5, near, tl.log(1.0 + x))
