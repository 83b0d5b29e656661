"""Run tasks as one rank of several: ``python -m tests.support.rank_tasks FOLDER TASK ...``."""

import gc
import sys
from pathlib import Path

import torch
from torch import distributed as dist

from lcl_ds.training.distributed import init_distributed
from tests.support.rank_tasks import runs, spikes, start, steps

TASKS = {name: task for module in (steps, runs, spikes, start) for name, task in vars(module).items()}

if __name__ == "__main__":
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    gc.freeze()  # DeepSpeed collects garbage for every engine: not among what was imported
    here = init_distributed()
    for name in names:
        torch.save(TASKS[name](here, folder / name), folder / f"{name}.{here.rank}.pt")
    dist.destroy_process_group()
