"""How the four gloo ranks of `ranks.py` meet, and in which order they start their transfers."""

import os
import socket
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lcl_kernels import contrastive_loss, sigmoid_contrastive_loss
from lcl_kernels.exchange import group_name, meet

FIRST_CALL = (3, 0, 2, 0)
PASSED_OVER = [(5, 5, 0, 3), (2, 0, 0, 3), (0, 1, 2, 0), (4, 4, 4, 4)]
MISMATCHES_WITH_COUNTS: list[dict[str, Any]] = [
    {"counts": [2, 2, 2, 1]},
    {"exchange": "ring"},
    {"logit_bias": torch.tensor(0.0, requires_grad=True)},
    {"counts": None},
]


def loss_of(rank: int, pairs: tuple[int, ...], function: Any = sigmoid_contrastive_loss, **options: Any) -> Any:
    x = torch.nn.functional.normalize(torch.ones(pairs[rank], 8) + torch.eye(pairs[rank], 8), dim=1)
    scalars = {"logit_scale": torch.tensor(3.0)}
    if function is sigmoid_contrastive_loss:
        scalars["logit_bias"] = torch.tensor(-1.0)
    return function(x, x, **{**scalars, "counts": pairs, **options})


def all_gathers_of(rank: int, group: Any) -> tuple[int, float]:
    """How many all-gathers a call without gradients makes that knows its counts and takes the ring; and its loss."""
    with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gathers:
        loss = loss_of(rank, FIRST_CALL, group=group, exchange="ring")
    return gathers.call_count, loss.item()


def takes_the_ring(rank: int) -> bool:
    """What "auto" comes to in a new group, in its first call and after it."""
    group = dist.new_group()
    rings = {
        meet(torch.ones(1, 2), group_name(group), "f", {}, exchange="auto", counts=[1] * 4, wants_gradients=False).ring
        for _ in range(2)
    }
    (ring,) = rings
    return ring


def transfers_of(rank: int, counts: tuple[int, ...], function: Any, group: Any) -> list[list[tuple[str, int]]]:
    """The transfers of a call that makes gradients on the ring: batches of (send or receive, with which rank)."""
    batches: list[list[tuple[str, int]]] = []

    def watched(operations: list[dist.P2POp]) -> Any:
        batches.append([("send" if op.op is dist.isend else "receive", op.group_peer) for op in operations])
        return started(operations)

    started = dist.batch_isend_irecv
    with mock.patch.object(dist, "batch_isend_irecv", watched):
        scale = torch.tensor(3.0, requires_grad=True)
        loss_of(rank, counts, function, group=group, exchange="ring", logit_scale=scale).backward()
    return batches


def message_with_counts(rank: int, of_rank_one: dict[str, Any]) -> str:
    """Of the first call on a new group, of which rank 1 makes another one."""
    group = dist.new_group()
    try:
        loss_of(rank, (2, 2, 2, 2), group=group, **(of_rank_one if rank == 1 else {}))
    except ValueError as error:
        loss_of(rank, (2, 2, 2, 2), group=group)  # the group can still be used
        return str(error)
    return "no error"


def wrong_counts(rank: int) -> str:
    """All ranks have the same counts, which are not those of rank 1."""
    group = dist.new_group()
    try:
        loss_of(rank, (2, 2 + (rank == 1), 2, 2), group=group, counts=[2, 2, 2, 2])
    except ValueError as error:
        return str(error)
    return "no error"


def exchange_results(rank: int) -> dict[str, Any]:
    group = dist.new_group()
    results: dict[str, Any] = {"fresh": [all_gathers_of(rank, group) for _ in range(2)]}
    results["one machine"] = takes_the_ring(rank)
    with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": str([1, 2, 4, 4][rank])}):
        results["local world sizes"] = takes_the_ring(rank)
    with mock.patch.object(socket, "gethostname", return_value=f"node{rank // 3}"):  # two machines cannot be had here
        results["two machines"] = takes_the_ring(rank)
    results["mismatch"] = [message_with_counts(rank, change) for change in MISMATCHES_WITH_COUNTS]
    results["wrong counts"] = wrong_counts(rank)
    for function in (contrastive_loss, sigmoid_contrastive_loss):
        for counts in PASSED_OVER:
            results[function.__name__, counts] = transfers_of(rank, counts, function, group)
    return results


def results_after_a_restart(rank: int, folder: str) -> dict[str, Any]:
    """The default group before and after torch.distributed is taken down and set up again, under the same name."""
    names, calls = [], []
    for turn in range(2):
        dist.init_process_group("gloo", init_method=f"file://{folder}/init{turn}", rank=rank, world_size=4)
        names.append(group_name(None))
        calls += [all_gathers_of(rank, None) for _ in range(2)]
        dist.barrier()
        dist.destroy_process_group()
    return {"names": names, "restart": calls}
