"""This process's place among the ranks, however it was started."""

import logging
import os
import socket
import warnings
from dataclasses import dataclass

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch import distributed as dist

# DeepSpeed reports each start at length, and torch its own renaming of the collectives that DeepSpeed calls.
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=r".*(all_gather_into_tensor|reduce_scatter_tensor).*", category=FutureWarning)


@dataclass(frozen=True)
class Place:
    """Rank and device of this process."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0


def init_distributed() -> Place:
    """Join the process group of ``deepspeed``, ``torchrun`` or ``srun``, or be the only process.

    GPUs and NCCL where there are some, otherwise the CPU and gloo.
    """
    _fill_environment()
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile a shared-memory extension at this point: a minute, and an error without a compiler.
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
    else:
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    deepspeed.init_distributed(
        dist_backend=accelerator.communication_backend_name() if device.type != "cpu" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
    )
    return Place(dist.get_rank(), local_rank, dist.get_world_size(), device)


def _fill_environment() -> None:
    environment = os.environ
    if "RANK" not in environment and "SLURM_PROCID" in environment and "MASTER_ADDR" in environment:
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
        environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    if "RANK" not in environment:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    environment.setdefault("LOCAL_RANK", "0")


def all_reduce_sum(values: Tensor) -> Tensor:
    """``values`` summed over ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_integers(values: list[int], device: torch.device) -> list[list[int]]:
    """``values`` of every rank, as many on each, on the host of every rank, in rank order."""
    mine = torch.tensor(values, dtype=torch.int64, device=device)
    table = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(table, mine)
    return [row.tolist() for row in table]


def gather_objects(value: object) -> list:
    """``value`` of every rank, on every rank, in rank order."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
