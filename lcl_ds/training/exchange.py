"""Let all ranks know once per step what each of them has summed and what it takes next."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lcl_ds.training.distributed import RankInfo, Totals, all_reduce_sum


class Exchange:
    """Numbers of all ranks on their way to every host, by one collective and one copy; collective.

    What is queued on the device after it does not hold it up: :meth:`read` waits for the collective alone.

    Args:
        tensors: scalars on the device, float64, to be summed over ranks; every rank gives the same names in the same
            order, here and below.
        numbers: what the host knows, under other names, to be summed as well.
        row: numbers of this rank that all others are to know, as many on each.
        same: scalars on the device that are the same on all ranks.
    """

    def __init__(
        self,
        rank_info: RankInfo,
        tensors: Mapping[Any, Tensor] | None = None,
        numbers: Mapping[Any, float] | None = None,
        row: Sequence[float] = (),
        same: Mapping[Any, Tensor] | None = None,
    ):
        tensors, numbers, same = tensors or {}, numbers or {}, same or {}
        self._names, self._world_size = [*tensors, *numbers, *same], rank_info.world_size
        rows = [0.0] * (len(row) * rank_info.world_size)
        rows[len(row) * rank_info.rank : len(row) * (rank_info.rank + 1)] = map(float, row)
        on_host = torch.tensor([*map(float, numbers.values()), *rows], dtype=torch.float64)
        if is_gpu := rank_info.device.type == "cuda":
            on_host = on_host.pin_memory()
        parts = [value.reshape(()).double() for value in tensors.values()]
        summed = torch.cat([_stacked(parts, rank_info), on_host.to(rank_info.device, non_blocking=True)])
        all_reduce_sum(summed)
        alike = [value.detach().reshape(()).double() for value in same.values()]
        self._sizes = [len(tensors) + len(numbers), len(rows), len(same)]
        whole = torch.cat([summed, _stacked(alike, rank_info)])
        self._values = torch.empty_like(whole, device="cpu", pin_memory=is_gpu)
        self._values.copy_(whole, non_blocking=True)
        self._copied = torch.cuda.current_stream().record_event() if is_gpu else None

    def read(self) -> tuple[Totals, list[list[float]]]:
        """Wait for the numbers; returns sums and what is the same by name, and the row of each rank."""
        if self._copied is not None:
            self._copied.synchronize()
        sums, rows, same = self._values.split(self._sizes)
        return (
            dict(zip(self._names, [*sums.tolist(), *same.tolist()], strict=True)),
            rows.view(self._world_size, -1).tolist(),
        )


def _stacked(scalars: list[Tensor], rank_info: RankInfo) -> Tensor:
    return torch.stack(scalars) if scalars else torch.empty(0, dtype=torch.float64, device=rank_info.device)
