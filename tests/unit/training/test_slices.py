"""Slices of tensors: any reader takes any part, whoever wrote them."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lcl_ds.errors import UserError
from lcl_ds.training.slices import Slice, SliceReader, write_slices

WEIGHT = torch.arange(14.0).view(2, 7)
CUTS = (0, 5, 5, 12, 14)
"""Where four ranks' parts begin and end: one has nothing."""


@pytest.fixture
def folder(tmp_path) -> Path:
    """Holds a weight in parts, under a name in which a glob would see a pattern."""
    folder = tmp_path / "run [1] *"
    folder.mkdir()
    for rank, (start, stop) in enumerate(pairwise(CUTS)):
        part = Slice("weight", start, (2, 7), WEIGHT.flatten()[start:stop])
        write_slices(folder / f"{rank}.safetensors", [part] if stop > start else [])
    return folder


def reader_of(folder: Path, *ranks: int) -> SliceReader:
    return SliceReader(folder, [f"{rank}.safetensors" for rank in ranks])


def test_every_part_can_be_read_from_the_parts_that_were_written(folder):
    reader = reader_of(folder, 3, 0, 1, 2)
    for start in range(14):
        for stop in range(start + 1, 15):
            assert torch.equal(reader.read("weight", (2, 7), start, stop), WEIGHT.flatten()[start:stop])
    assert torch.equal(reader.whole("weight", (2, 7)), WEIGHT)


def test_what_is_missing_is_named(folder):
    with pytest.raises(UserError, match="does not hold elements 5 to 14 of weight"):
        reader_of(folder, 0, 1, 3).whole("weight", (2, 7))
    with pytest.raises(UserError, match="does not hold elements 0 to 3 of bias"):
        reader_of(folder, 0, 1, 2, 3).whole("bias", (3,))
    with pytest.raises(UserError, match=r"4.safetensors: is no file of slices"):
        reader_of(folder, 0, 4)


def test_a_tensor_of_another_shape_is_not_taken_for_the_one_expected(folder):
    with pytest.raises(UserError, match=r"weight has shape \(2, 7\), \(7, 2\) is expected"):
        reader_of(folder, 0, 1, 2, 3).read("weight", (7, 2), 0, 3)


def test_a_file_that_nobody_named_is_not_read(folder):
    write_slices(folder / "0 (copy).safetensors", [Slice("weight", 0, (2, 7), torch.zeros(14))])
    assert torch.equal(reader_of(folder, 0, 1, 2, 3).whole("weight", (2, 7)), WEIGHT)
