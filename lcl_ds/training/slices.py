"""Files of slices: flattened tensors of which every rank writes its own part, and any reader takes any part.

A file is an ordinary safetensors file of one-dimensional tensors. Its metadata say where each belongs: ``slices`` is
JSON, by name ``[start, shape of the whole tensor]``. A folder of such files holds whole tensors whoever wrote them,
so nothing in it depends on how many ranks there were. Reading needs neither DeepSpeed nor pickle.
"""

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcl_ds.errors import UserError
from lcl_ds.files import plain_name, system_error

SUFFIX = ".safetensors"
SLICES = "slices"
"""Key of the metadata."""


@dataclass(frozen=True)
class Slice:
    """Elements ``start .. start + len(values)`` of a flattened tensor."""

    name: str
    start: int
    shape: tuple[int, ...]
    """Of the whole tensor."""
    values: Tensor
    """One-dimensional."""


def write_slices(path: Path, slices: Iterable[Slice]) -> None:
    """Write one file.

    Raises:
        OSError: the disk did not take it.
    """
    slices = list(slices)
    where = {part.name: [part.start, list(part.shape)] for part in slices}
    tensors = {part.name: part.values for part in slices}
    try:
        with plain_name(path.parent) as folder:
            save_file(tensors, folder / path.name, metadata={SLICES: json.dumps(where)})
    except SafetensorError as error:
        raise system_error(error, path) or error from error
    with suppress(PermissionError):  # a disk that knows no permissions
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors writes for the owner alone


@dataclass(frozen=True)
class _Place:
    """Where a slice lies."""

    start: int
    stop: int
    file: Any


class SliceReader:
    """Whole tensors or parts of them from the files of a folder.

    Args:
        names: of the files; what else stands in the folder is not looked at.

    Raises:
        UserError: a file that is none of ours, or files that do not agree.
    """

    def __init__(self, folder: Path, names: Iterable[str]):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of every whole tensor, by name."""
        self._places: dict[str, list[_Place]] = {}
        with plain_name(folder) as plain:
            for name in names:
                self._add(plain / name)
        for places in self._places.values():
            places.sort(key=lambda place: place.start)

    def _add(self, path: Path) -> None:
        try:
            file: Any = safe_open(path, framework="pt")
            where = json.loads(file.metadata()[SLICES])
            for name, (start, shape) in where.items():
                (length,) = file.get_slice(name).get_shape()
                known = self.shapes.setdefault(name, tuple(shape))
                if known != tuple(shape):
                    raise UserError(f"{self.folder / path.name}: {name} has shape {shape}, elsewhere it has {known}")
                self._places.setdefault(name, []).append(_Place(start, start + length, file))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.folder / path.name}: is no file of slices: {error}") from error

    def read(self, name: str, shape: tuple[int, ...], start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements ``start .. stop`` of a flattened tensor [stop - start], in the type that was written.

        Args:
            shape: of the whole tensor.

        Raises:
            UserError: the folder does not hold all of them, or a tensor of another shape.
        """
        stop = math.prod(shape) if stop is None else stop
        if self.shapes.get(name, shape) != shape:
            raise UserError(f"{self.folder}: {name} has shape {self.shapes[name]}, {shape} is expected")
        parts, reached = [], start
        for place in self._places.get(name, []):
            first, last = max(reached, place.start), min(stop, place.stop)
            if first == reached and first < last:
                parts.append(place.file.get_slice(name)[first - place.start : last - place.start])
                reached = last
        if reached < stop or name not in self.shapes:
            raise UserError(f"{self.folder}: does not hold elements {reached} to {stop} of {name}")
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)

    def whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor of that shape. Raises: UserError when the folder does not hold it."""
        return self.read(name, shape).view(shape)
