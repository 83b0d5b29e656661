"""Let all ranks stop at the same micro-step, whichever of them was asked to."""

from datetime import timedelta

import torch
from torch import distributed as dist

from lcl_ds.training.signals import STOP


class StopAgreement:
    """All ranks' answer to whether one of them was asked to stop; made by all ranks together.

    It has a group on the CPU of its own, so that asking at every micro-step does not wait for a GPU.

    Args:
        timeout_s: of its collectives; None: torch's own.
    """

    def __init__(self, timeout_s: float | None = None):
        self.signal = 0
        """What was agreed on: the largest number of a signal that some rank has received; 0: to go on."""
        timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if dist.get_world_size() > 1 else None

    def reached(self) -> bool:
        """Say whether the ranks stop here; collective until they do."""
        if not self.signal:
            received = torch.tensor([STOP.received])
            if self._group is not None:
                dist.all_reduce(received, dist.ReduceOp.MAX, group=self._group)
            self.signal = int(received)
        return self.signal > 0

    def close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
