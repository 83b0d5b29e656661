"""Train on several processes as on one: each takes a part of every batch, and gradients are summed."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch import distributed as dist

T = TypeVar("T")


def own_part(rows: Tensor) -> Tensor:
    """Take what this process does of a batch."""
    state = PartialState()
    return rows[state.process_index :: state.num_processes]


def sum_gradients(weights: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes; each must have divided its loss by the size of the whole batch."""
    if PartialState().num_processes == 1:
        return
    weights = [weight for weight in weights if weight.requires_grad]
    gradients = [weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in weights]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    for weight, part in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
        weight.grad = part.view_as(weight)


def gather(values: list[T]) -> list[T]:
    """Join the lists of all processes."""
    return gather_object(values) if PartialState().num_processes > 1 else values
