"""Run tasks as one rank of several, in a process that was forked where everything had been imported."""

import gc
import os
from pathlib import Path

import torch
from torch import distributed as dist

from lcl_ds.training.distributed import init_distributed
from tests.support.rank_tasks import runs, spikes, start, steps

TASKS = {name: task for module in (steps, runs, spikes, start) for name, task in vars(module).items()}


def run_tasks(environment: dict[str, str], log: Path, folder: Path, names: list[str]) -> None:
    """Run tasks with the environment and the output of a rank of its own; each writes what it returns to ``folder``."""
    os.setsid()  # so that whatever it starts can be killed with it
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    gc.freeze()  # DeepSpeed collects garbage for every engine: not among what was imported
    here = init_distributed()
    for name in names:
        torch.save(TASKS[name](here, folder / name), folder / f"{name}.{here.rank}.pt")
    dist.destroy_process_group()
