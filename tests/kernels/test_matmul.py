"""Products whose sizes are no multiples of what cuBLAS wants are made in two parts."""

import pytest
import torch
from lcl_kernels._common import MATMUL_MULTIPLE, SMALLEST_SPLIT, aligned_products, matmul_

from tests.kernels.checks import DEVICE, relative_error

LARGE = SMALLEST_SPLIT + 3


def operands(rows, inner, transposed, dtype=torch.float64, padded=True):
    """a [rows, inner], its contiguous lines padded to whole multiples as the losses have them, and b [inner, 16]."""
    lines, length = (inner, rows) if transposed else (rows, inner)
    room = torch.randn(lines, length + padded * (-length % MATMUL_MULTIPLE), dtype=dtype)[:, :length]
    return room.t() if transposed else room, torch.randn(inner, 16, dtype=dtype)


def contiguous_length(matrix):
    return matrix.shape[1] if matrix.stride(1) == 1 else matrix.shape[0]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "inner"), [(40, LARGE), (LARGE, 40), (LARGE, LARGE), (40, 43), (1, 1)])
def test_the_parts_make_the_product(rows, inner, transposed, accumulate):
    a, b = operands(rows, inner, transposed)
    out = torch.randn(rows, 16, dtype=torch.float64)
    wanted = a @ b + out if accumulate else a @ b
    for part, left, right, adds in aligned_products(out, a, b):
        part.copy_(part + left @ right if accumulate or adds else left @ right)
    assert torch.allclose(out, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_all_but_a_few_entries_are_in_an_aligned_part(transposed):
    a, b = operands(LARGE, LARGE, transposed)
    (_, first, *_), (_, last, *_) = aligned_products(torch.empty(LARGE, 16), a, b)
    assert contiguous_length(first) % MATMUL_MULTIPLE == 0
    assert contiguous_length(last) == LARGE % MATMUL_MULTIPLE


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("size", "padded"), [(2048, True), (LARGE, False), (43, True)])
def test_a_product_is_one_where_a_split_gains_nothing(size, padded, transposed):
    """Aligned, with lines that start anywhere, and small."""
    a, b = operands(size, size, transposed, padded=padded)
    assert len(aligned_products(torch.empty(size, 16), a, b)) == 1


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_made_in_the_dtype_of_the_result(dtype, transposed, accumulate):
    a, b = operands(LARGE, 2051, transposed, dtype)
    out = torch.randn(LARGE, 16)
    wanted = a.double() @ b.double() + (out.double() if accumulate else 0)
    found = matmul_(out, a, b, accumulate=accumulate)
    assert found.data_ptr() == out.data_ptr()
    # TF32, if it is on, rounds float32 operands on a GPU.
    assert relative_error(found, wanted) < (1e-3 if DEVICE == "cuda" else 1e-5)
