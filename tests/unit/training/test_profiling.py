"""The profiler writes a trace of the steps it is asked for, and every operation counts for its part of the step."""

import gzip
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from lcl_ds.training.distributed import RankInfo
from lcl_ds.training.profiling import StepProfiler, costs_by_part, table_of
from lcl_ds.training.settings import LogSettings

RANK = RankInfo(rank=1, local_rank=1, world_size=2, device=torch.device("cpu"))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision, self.pooling, self.decoder = nn.Tanh(), nn.Sigmoid(), nn.Sequential(nn.Softplus())


def step_of(profiler, model, number):
    profiler.begin(number, model)
    profiler.enter("data")
    x = torch.zeros(8, requires_grad=True)
    profiler.enter("losses")
    loss = model.decoder(model.pooling(model.vision(x))).exp().sum()
    profiler.enter("backward")
    loss.backward()
    profiler.end(number)


def test_a_trace_has_the_wanted_steps_and_each_operation_in_its_part(tmp_path, monkeypatch):
    model, costs = Model(), []
    monkeypatch.setattr("lcl_ds.training.profiling.costs_by_part", lambda events: costs.append(costs_by_part(events)))
    monkeypatch.setattr("lcl_ds.training.profiling.table_of", lambda costs, steps: steps)
    profiler = StepProfiler(tmp_path, LogSettings(profile_steps=(2, 3)), replace(RANK, rank=0))
    for number in range(1, 6):
        step_of(profiler, model, number)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps_2_to_3_rank_0.json.gz"
    names = [event["name"] for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    assert names.count("lcl_ds.vision") == 2 * 2  # tower and pooling
    (costs,) = costs
    homes = {"aten::zeros": "data", "aten::tanh": "vision", "aten::sigmoid": "vision", "aten::softplus": "decoder"}
    homes |= {"aten::exp": "losses", "aten::tanh_backward": "backward", "aten::softplus_backward": "backward"}
    assert {name: [part for part in costs if name in costs[part]] for name in homes} == {
        name: [part] for name, part in homes.items()
    }
    assert not model.vision._forward_hooks
    assert not model.vision._forward_pre_hooks


@pytest.mark.parametrize(("ranks", "count"), [("first", 0), ("all", 1)])
def test_another_rank_than_the_first_writes_a_trace_where_all_are_wanted(tmp_path, ranks, count):
    model = Model()
    profiler = StepProfiler(tmp_path, LogSettings(profile_steps=(1, 9), profile_ranks=ranks), RANK)
    step_of(profiler, model, 1)
    profiler.close(1)  # a run that is stopped before the last step to be profiled
    assert [path.name for path in tmp_path.rglob("*.gz")] == ["steps_1_to_1_rank_1.json.gz"] * count


def test_the_table_names_the_most_expensive_operations_and_the_time_of_one_step():
    costs = {"vision": {"aten::mm": (6000.0, 0.0), "lcl_ds.vision": (2000.0, 0.0)}, "data": {"select": (8000.0, 0.0)}}
    table = table_of(costs, 2)
    cells = {
        name: list(column.cells) for name, column in zip(("part", "ms", "share", "top"), table.columns, strict=True)
    }
    row = cells["part"].index("vision")
    assert [cells[name][row] for name in ("ms", "share", "top")] == ["4", "50.0%", "mm 3, Python and waiting 1"]
    assert cells["ms"][cells["part"].index("optimizer")] == "0"


@pytest.mark.parametrize("steps", [(0, 3), (5, 4)])
def test_steps_that_are_none_are_refused(steps):
    with pytest.raises(ValueError, match="the first step is 1, and the last one is not before the first"):
        LogSettings(profile_steps=steps)
