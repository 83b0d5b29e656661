"""Say which rank this process is, however it was started, and let all ranks hear of one rank's problem."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from lcl_ds.cli import problems_of
from lcl_ds.data.shards.team import Team
from lcl_ds.errors import UserError
from lcl_ds.tasks import fill_environment, task_number
from lcl_ds.training.preparation import prepare_for_deepspeed
from lcl_ds.training.settings import TrainSettings

Totals = dict[Any, float]
"""Sums over ranks by name."""
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "Socket closed",
)
"""What gloo and the ranks' store say where another rank has gone."""
COLLECTIVES_LATER_S = 300
"""How much later than our own watch a collective gives up, so that it is ours which says what hangs."""
T = TypeVar("T")
PATIENCE_S = 20
"""How long a rank with a problem tries to reach the others before it speaks for itself."""


@dataclass(frozen=True)
class RankInfo:
    """Rank and device of this process."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Say whether this rank writes files and prints."""
        return self.rank == 0


def collective_timeout_s(settings: TrainSettings) -> float:
    """Say after how many seconds a collective fails."""
    return max(settings.start_hang_seconds, settings.hang_seconds) + COLLECTIVES_LATER_S


def init_distributed(timeout_s: float | None = None) -> RankInfo:
    """Join the process group of ``deepspeed``, ``torchrun`` or ``srun``, or be the only process.

    GPUs and NCCL where there are some, otherwise the CPU and gloo.

    Args:
        timeout_s: how long to wait for the other ranks; None: as long as DeepSpeed does.

    Raises:
        UserError: one of several Slurm tasks that cannot know where to meet the others, or they did not come.
    """
    prepare_for_deepspeed()
    from deepspeed.accelerator import get_accelerator

    fill_environment()
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
    backend = accelerator.communication_backend_name() if device.type != "cpu" else "gloo"
    try:
        _meet(backend, {} if timeout_s is None else {"timeout": timedelta(seconds=timeout_s)})
    except dist.DistError as error:
        address, size = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", os.environ["WORLD_SIZE"]
        raise UserError(
            f"the {size} ranks did not all meet at {address} ({str(error).splitlines()[0]}); see that all were started "
            "and that each host reaches this address",
            on_every_rank=False,
        ) from error
    return RankInfo(dist.get_rank(), local_rank, dist.get_world_size(), device)


def _meet(backend: str, timeout: dict[str, Any]) -> None:
    """Join the process group; raises what torch does when the others do not come."""
    import deepspeed

    if restarts := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        # The store that torchrun keeps still holds the addresses of the ranks before, which these would try to reach.
        address, port, size = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"))
        kept = dist.TCPStore(address, int(port), int(size), is_master=False, **timeout)
        store = dist.PrefixStore(f"restart {restarts}", kept)
        dist.init_process_group(backend, store=store, rank=task_number(), world_size=int(size), **timeout)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, **timeout)


@contextmanager
def on_all_ranks(rank_info: RankInfo) -> Iterator[None]:
    """Do something that may fail on one rank: then all fail and know why.

    A rank must not leave the block between two collectives in it that the others wait at.

    Raises:
        UserError: on every rank, the same: what went wrong, with rank and host where not all ranks found it.
    """
    with noted_problems() as problems:
        yield
    raise_for_all(problems, rank_info)


@contextmanager
def noted_problems() -> Iterator[list[str]]:
    """Note what goes wrong instead of raising it, where a sentence says it; the list is empty otherwise."""
    problems: list[str] = []
    try:
        yield problems
    except Exception as error:
        sentences = problems_of(error)
        if sentences is None:
            raise
        problems += sentences


def raise_for_all(problems: list[str], rank_info: RankInfo) -> None:
    """Tell all ranks of this one's problems; collective.

    Raises:
        UserError: on every rank, when any of them has a problem.
    """
    count = torch.tensor([len(problems)], dtype=torch.int64, device=rank_info.device)
    if not all_reduce_sum(count).item():
        return
    told = gather_objects((socket.gethostname(), problems))
    common = [problem for problem in told[0][1] if all(problem in of_rank for _, of_rank in told)]
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, (host, its_problems) in enumerate(told):
        for problem in its_problems:
            if problem not in common:
                ranks.setdefault((host, problem), []).append(rank)
    others = [f"{_named(numbers)} on {host}: {problem}" for (host, problem), numbers in ranks.items()]
    raise UserError([*common, *others])


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def heard(problems: list[str], on_every_rank: bool) -> list[str]:
    """Return what this rank should print of problems that end it; [] where the first rank prints them.

    A rank that has not joined the others does so now, to tell them and end them too; where it does not reach them in
    time, it speaks for itself.

    Args:
        on_every_rank: whether, once ranks have joined, all of them end with the same problems.
    """
    if not dist.is_initialized():
        try:
            raise_for_all(problems, init_distributed(PATIENCE_S))
        except UserError as error:  # what all ranks found; or there is no way to meet them, or they did not come
            problems, on_every_rank = error.problems if dist.is_initialized() else problems, error.on_every_rank
        except (RuntimeError, ValueError, OSError):  # whatever the rendezvous raises when nobody comes
            on_every_rank = False
    leave_group()
    if not on_every_rank:
        return [f"{this_rank()}: {problem}" for problem in problems]
    return problems if task_number() == 0 else []


def leave_group() -> None:
    """Leave the other ranks, if this one has joined them: threads of a group that is open at the end abort Python."""
    if dist.is_initialized():
        dist.destroy_process_group()


def this_rank() -> str:
    """Name this rank and its host."""
    return f"rank {task_number()} on {socket.gethostname()}"


def is_lost_peer(error: BaseException) -> bool:
    """Say whether a collective failed because another rank has gone or does not answer, which is not the cause."""
    return (
        isinstance(error, RuntimeError)
        and dist.is_initialized()
        and (isinstance(error, dist.DistBackendError) or any(text in str(error) for text in LOST_PEER))
    )


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum ``values`` over ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def from_first(make: Callable[[], T], rank_info: RankInfo) -> T:
    """Return on every rank what the first one makes; collective.

    Raises:
        UserError: on every rank: why the first one could not make it.
    """
    told: list[Any] = [None]
    if rank_info.is_first:
        try:
            told = [(make(), [])]
        except Exception as error:
            problems = problems_of(error)
            if problems is None:
                raise
            told = [(None, problems)]
    dist.broadcast_object_list(told, src=0, device=rank_info.device)
    value, problems = told[0]
    if problems:
        raise UserError(problems)
    return value


def gather_to_first(value: T) -> list[T] | None:
    """Gather ``value`` of every rank on the first one, in rank order; None on the others, which receive nothing."""
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def team_of(rank_info: RankInfo) -> Team:
    """Let the ranks open shards together."""
    return Team(
        rank_info.rank,
        rank_info.world_size,
        is_first_here=rank_info.local_rank == 0,
        from_first=lambda make: from_first(make, rank_info),
        gather=gather_objects,
    )


def gather_objects(value: object) -> list:
    """Gather ``value`` of every rank, on every rank, in rank order."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
