"""Runs the losses over pairs on four gloo ranks, and on the first two of them, and keeps what each rank got."""

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lcl_kernels import contrastive_loss
from torch import Tensor

from tests.kernels.checks import INTERPRETER_RUNS, leaf
from tests.kernels.exchange_ranks import exchange_results, results_after_a_restart
from tests.kernels.sigmoid_ranks import SIGMOID_CASES, SigmoidCase, run_sigmoid, runs_of_sigmoid

WORLD = 4
TIMEOUT_S = 1200
"""Of all ranks together; they took 40 s on two idle cores."""
ENVIRONMENT = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
"""Of the ranks: gloo and CPU tensors, so Triton in its interpreter, also on a machine with GPUs."""
COUNTS = [(5, 0), (3, 4), (0, 0), (1, 0), (5, 0, 3, 1), (0, 0, 0, 0), (2, 2, 2, 2)]


class Case(NamedTuple):
    counts: tuple[int, ...]
    normalize: str
    detach_remote: bool
    scale: float
    dtype: torch.dtype = torch.float64
    exchange: str = "gather"
    backend: str = "torch"
    detach_keys: bool = False
    same_group: str | None = None  # None: without group_ids
    weighted: bool = False


CASES = [
    Case(counts, normalize, detach_remote, scale, dtype)
    for counts in COUNTS
    for normalize in ("global", "per_rank")
    for detach_remote in (False, True)
    for scale, dtype in (
        (14.3, torch.float64),
        (14.3, torch.float32),
        (100.0, torch.float32),
        (14.3, torch.bfloat16),
    )
]
CASES += [
    Case(counts, "global", detach_remote, 14.3, dtype, "ring")
    for counts in COUNTS
    for detach_remote in (False, True)
    for dtype in (torch.float64, torch.float32)
]
CASES += [
    Case(counts, "global", detach_remote, 14.3, torch.float32, exchange, "triton")
    for counts in [(3, 4), (5, 0, 3, 1)]
    for detach_remote, exchange in ((False, "gather"), (True, "ring"))
]
CASES += [
    Case(counts, "global", detach_remote, 14.3, dtype, exchange, detach_keys=True)
    for counts in COUNTS
    for detach_remote, dtype, exchange in ((False, torch.float64, "gather"), (True, torch.float32, "ring"))
]
CASES += [
    Case(counts, normalize, detach_remote, 14.3, dtype, exchange, "torch", detach_keys, same_group, weighted)
    for counts in COUNTS
    for normalize, detach_remote, dtype, exchange, detach_keys, same_group, weighted in (
        ("global", False, torch.float64, "gather", False, "ignore", False),
        ("global", False, torch.float64, "ring", False, "positive", True),
        ("per_rank", True, torch.float64, "gather", False, "positive", True),
        ("per_rank", False, torch.float32, "ring", True, "ignore", True),
    )
]
CASES += [
    Case(counts, "global", False, 14.3, torch.float32, exchange, "triton", False, same_group, True)
    for counts in [(3, 4), (5, 0, 3, 1)]
    for exchange, same_group in (("gather", "positive"), ("ring", "ignore"))
]


def runs_here(case: Case | SigmoidCase) -> bool:
    """Whether the ranks, which have no GPU, can compute the case."""
    return case.backend != "triton" or INTERPRETER_RUNS


def runs_of(case: Case) -> int:
    """How often the same bits are asked for."""
    return 5 if case.dtype == torch.float32 and case.scale < 100 and case.backend == "torch" else 2


def features(case: Case | SigmoidCase) -> tuple[Tensor, Tensor]:
    """x and y [M, D] of all ranks, with pairs so faintly alike that no loss vanishes, whatever the scale."""
    generator = torch.Generator().manual_seed(sum(case.counts))
    x = torch.randn(sum(case.counts), 16, generator=generator, dtype=torch.float64)
    y = x + 4 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    x, y = (torch.nn.functional.normalize(t, dim=1).to(case.dtype) for t in (x, y))
    return x, y


def extras(case: Case) -> dict[str, Tensor]:
    """Groups [M] that reach over ranks, and weights [M] of which the first is 0, of all ranks, as far as given."""
    m, generator = sum(case.counts), torch.Generator().manual_seed(1)
    ids = torch.randint(0, max(1, m // 2), (m,), generator=generator)
    weights = torch.rand(m, generator=generator)
    weights[:1] = 0.0
    return ({"group_ids": ids} if case.same_group else {}) | ({"pair_weight": weights} if case.weighted else {})


def own_slice(counts: tuple[int, ...], rank: int) -> slice:
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


def run_case(case: Case, rank: int, group: Any) -> list[Tensor]:
    """Loss and the gradients of x, y and the scale on this rank."""
    own = own_slice(case.counts, rank)
    x, y = (leaf(t[own]) for t in features(case))
    scale = torch.tensor([case.scale], dtype=torch.float32, requires_grad=True)
    options: dict[str, Any] = {**case._asdict(), "group": group, "workspace_mb": 1e-4}
    for key in ("counts", "scale", "dtype", "weighted"):
        del options[key]
    options["same_group"] = case.same_group or "ignore"
    options |= {key: tensor[own] for key, tensor in extras(case).items()}
    result = contrastive_loss(x, y, scale, **options, return_statistics=case.same_group is not None)
    loss, known = (result, []) if case.same_group is None else result
    loss.backward()
    with torch.no_grad():
        assert torch.equal(loss, contrastive_loss(x, y, scale, **options, counts=case.counts))
    return [loss.detach(), x.grad, y.grad, scale.grad, *known]


def some_ranks_want_no_gradient(rank: int) -> list[Tensor]:
    """The ranks without pairs pass plain empty tensors; the others need their log-sum-exps all the same."""
    case = Case((5, 0, 3, 0), "global", False, 14.3)
    x, y = (t[own_slice(case.counts, rank)] for t in features(case))
    if len(x):
        x, y = leaf(x), leaf(y)
    loss = contrastive_loss(x, y, torch.tensor(14.3))
    if len(x):
        loss.backward()
    return [loss.detach(), *(t.grad for t in (x, y) if len(t))]


def message_of_mismatch(rank: int, **of_rank_one: Any) -> str:
    options: dict[str, Any] = {"normalize": "global", "width": 8, **(of_rank_one if rank == 1 else {})}
    x = torch.ones(2, options.pop("width"))
    try:
        contrastive_loss(x, x, torch.tensor(1.0), **options)
    except ValueError as error:
        return str(error)
    return "no error"


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=WORLD, timeout=timedelta(seconds=TIMEOUT_S)
    )
    pair = dist.new_group([0, 1])
    results: dict[Any, Any] = {"mismatch": [message_of_mismatch(rank, **o) for o in MISMATCHES]}
    results["partly"] = some_ranks_want_no_gradient(rank)
    for case in filter(runs_here, CASES):
        group = None if len(case.counts) == WORLD else pair
        if rank < len(case.counts):
            results[case] = [run_case(case, rank, group) for _ in range(runs_of(case))]
    for case in filter(runs_here, SIGMOID_CASES):
        group = None if len(case.counts) == WORLD else pair
        if rank < len(case.counts):
            x, y = (t[own_slice(case.counts, rank)] for t in features(case))
            results[case] = [run_sigmoid(case, x, y, group, known=run > 0) for run in range(runs_of_sigmoid(case))]
    results["exchange"] = exchange_results(rank)
    if rank >= 2:
        try:
            contrastive_loss(torch.ones(1, 2), torch.ones(1, 2), torch.tensor(1.0), group=pair)
        except ValueError as error:
            results["outsider"] = str(error)
    dist.barrier()
    dist.destroy_process_group()
    results["exchange"] |= results_after_a_restart(rank, folder)
    torch.save(results, f"{folder}/rank{rank}.pt")


MISMATCHES: list[dict[str, Any]] = [
    {"width": 4},
    {"normalize": "per_rank"},
    {"detach_remote": True},
    {"exchange": "ring"},
    {"group_ids": torch.tensor([1, 1])},
    {"pair_weight": torch.ones(2)},
    {"return_statistics": True},
]


def run_ranks(folder: Path) -> None:
    """Have each of the four ranks compute everything. Fails after TIMEOUT_S, and leaves no process behind."""
    with mock.patch.dict(os.environ, ENVIRONMENT):
        context = mp.spawn(_work, (str(folder),), nprocs=WORLD, join=False)
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError("the ranks did not finish in time")
    finally:
        for process in context.processes:
            process.kill()


def results_of_ranks(folder: Path) -> list[dict[Any, Any]]:
    """What each of the four ranks computed."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]
