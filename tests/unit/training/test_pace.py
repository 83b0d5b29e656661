"""Which rank is the slowest."""

import time

import torch
from torch import nn

from lcl_ds.training.distributed import RankInfo
from lcl_ds.training.pace import Pace, peak_memory_gb

CPU = torch.device("cpu")


def pace_of(rank, ranks):
    return Pace(RankInfo(rank, rank, ranks, CPU), nn.Identity())


def test_each_rank_tells_its_own_seconds_and_nothing_of_others():
    pace = pace_of(rank=1, ranks=3)
    pace.drawn(2.0)
    told = pace.to_sum()
    assert [*told] == [("busy", 0), ("busy", 1), ("busy", 2)]
    assert 2.0 <= told["busy", 1] < 2.1
    assert told["busy", 0] == told["busy", 2] == 0.0


def test_on_a_cpu_computing_is_busy_and_waiting_is_not():
    pace = pace_of(rank=0, ranks=2)
    pace.drawn(0.0)
    time.sleep(0.2)
    waited = pace.to_sum()["busy", 0]
    assert waited < 0.1
    until = time.thread_time() + 0.2
    while time.thread_time() < until:
        pass
    assert pace.to_sum()["busy", 0] >= waited + 0.2


def test_the_rank_that_was_busy_longest_is_named_with_how_long_the_one_in_the_middle_was():
    totals = {("busy", 0): 1.0, ("busy", 1): 1.5, ("busy", 2): 0.5, "loss": 2.0}
    assert pace_of(0, 3).metrics(totals) == {"slowest_rank": 1, "slowest_rank_s": 1.5, "median_rank_s": 1.0}


def test_one_rank_alone_is_not_compared():
    pace = pace_of(0, 1)
    pace.drawn(1.0)
    assert pace.to_sum() == {}
    assert pace.metrics({"loss": 1.0}) == {}


def test_a_cpu_shows_what_is_resident():
    assert 0.1 < peak_memory_gb(CPU) < 60
