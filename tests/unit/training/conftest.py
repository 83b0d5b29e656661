"""A process group of one rank in this process, and what one real rank did under DeepSpeed in a process of its own."""

from datetime import timedelta

import pytest
import torch
from torch import distributed as dist

from lcl_ds.training.distributed import RankInfo
from tests.support.once import made_once
from tests.support.ranks import on_ranks


@pytest.fixture
def only_rank():
    """This process as the only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30))
    yield RankInfo(0, 0, 1, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory):
    """The folder of four steps that keep two checkpoints, and what the rank returned."""
    folder = made_once(tmp_path_factory, "one_rank", lambda folder: on_ranks(1, "saved_run", folder, timeout=170))
    return folder / "saved_run", torch.load(folder / "saved_run.0.pt", weights_only=True)
