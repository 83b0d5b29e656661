"""How the Triton backends of the losses over pairs cut and launch a block of x [m, D] against y [c, D]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
from torch import Tensor

from lcl_kernels._common import INTERPRETED, row_chunks
from lcl_kernels.tiles import Tile, launch_options, operand, precision_of, programs_on

LEAST_ROWS = 2048
"""Rows of a gradient block below which its columns are split too: d_y is read and written once per block of rows."""


def gradient_parts(
    rows: int, columns: int, itemsize: int, tile: Tile, workspace_mb: float
) -> Iterator[tuple[slice, slice, int]]:
    """Cut a block into the parts whose gradient is kept at a time.

    Returns:
        Rows, columns and row stride, in elements, of each part.
    """
    most_columns = max(tile.columns, int(workspace_mb * 2**20) // (LEAST_ROWS * itemsize))
    for across in row_chunks(columns, 1, most_columns / 2**20, tile.columns):
        stride = triton.cdiv(across.stop - across.start, 64) * 64
        for down in row_chunks(rows, stride * itemsize, workspace_mb, tile.rows):
            yield down, across, stride


def launch(
    kernel: triton.JITFunction,
    tile: Tile,
    x: Tensor,
    y: Tensor,
    tensors: tuple[Any, ...],
    numbers: tuple[float, ...],
    **options: Any,
) -> None:
    """Launch a kernel for the tiles of a block.

    Args:
        tensors, numbers: its arguments after the operands, and after the strides.
        options: its constants besides those of every such kernel.
    """
    left, stride_x, x_descriptor = operand(x, (tile.rows, tile.inner))
    right, stride_y, y_descriptor = operand(y, (tile.columns, tile.inner))
    programs = programs_on(x, tile)
    kernel[(programs,)](
        left, right, *tensors, len(x), len(y), x.shape[1], stride_x, stride_y, *numbers,
        X_DESCRIPTOR=x_descriptor, Y_DESCRIPTOR=y_descriptor,
        ROWS=tile.rows, COLUMNS=tile.columns, INNER=tile.inner, GROUP=tile.group, PROGRAMS=programs,
        PRECISION=precision_of(x), UPCAST=INTERPRETED, **launch_options(tile), **options,
    )  # fmt: skip
