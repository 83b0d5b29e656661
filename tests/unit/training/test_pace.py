"""Which rank is the slowest."""

import time

import torch
from torch import nn

from lcl_ds.training.distributed import RankInfo
from lcl_ds.training.pace import Pace, peak_memory_gb

CPU = torch.device("cpu")


def begun(rank=0, ranks=2):
    pace = Pace(RankInfo(rank, rank, ranks, CPU), nn.Identity())
    pace.begin()
    return pace


def compute(seconds):
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_on_a_cpu_computing_is_busy_and_waiting_is_not():
    pace = begun()
    time.sleep(0.2)
    waited = pace.busy_s()
    assert waited < 0.1
    compute(0.2)
    assert pace.busy_s() >= waited + 0.2


def test_drawing_is_busy_even_where_it_waits_and_counts_once():
    pace = begun()
    with pace.drawing():
        time.sleep(0.2)
        compute(0.2)
    assert pace.draw_s >= 0.4
    assert pace.draw_s <= pace.busy_s() < pace.draw_s + 0.1


def test_every_step_counts_from_0():
    pace = begun()
    with pace.drawing():
        compute(0.2)
    pace.begin()
    assert pace.draw_s == 0.0
    assert pace.busy_s() < 0.1


def test_the_rank_that_was_busy_longest_is_named_with_how_long_the_one_in_the_middle_was():
    named = {"slowest_rank": 1, "slowest_rank_s": 1.5, "median_rank_s": 1.0}
    assert begun(ranks=3).metrics([1.0, 1.5, 0.5]) == named


def test_one_rank_alone_is_not_compared():
    assert begun(ranks=1).metrics([1.0]) == {}


def test_a_cpu_shows_what_is_resident():
    assert 0.1 < peak_memory_gb(CPU) < 60
