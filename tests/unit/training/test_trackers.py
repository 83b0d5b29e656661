"""Experiment trackers: they get what ``metrics.jsonl`` gets, each step once, and can end no run."""

import json
import math
from typing import get_args

import numpy as np
import pytest
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from lcl_ds.errors import UserError
from lcl_ds.metrics import SourceCounts
from lcl_ds.settings import flatten
from lcl_ds.training.monitor import Monitor
from lcl_ds.training.settings import TRACKER_EXTRAS, Tracker
from lcl_ds.training.trackers import Trackers, check_trackers, open_trackers
from tests.support.ranks import ROOT
from tests.support.runs import metrics_of, step_metrics
from tests.support.small import small_config

SOURCES = {"first.web": SourceCounts(3, 7), "second": SourceCounts(0, 1)}


def row(step):
    """Numbers that no 32-bit float holds exactly, one inside others and one that is none."""
    losses = {"loss": math.pi / step, "generation_loss": math.e}
    return step_metrics(step, losses=losses, sources=SOURCES, grad_norm=math.nan if step == 2 else 0.1)


def train(run_dir, steps, trackers="[tensorboard]"):
    """What a start of a run does with its monitor for these steps."""
    run_dir.mkdir(exist_ok=True)
    config = small_config(f"log.trackers={trackers}")
    monitor = Monitor(run_dir, 10, steps[0] - 1, 10, True, open_trackers(config, run_dir, steps[0] - 1))
    for step in steps:
        monitor.step(row(step))
    monitor.close()


def read_tensorboard(run_dir):
    """Steps and values of every tag, by TensorBoard's own reader."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_metric_with_equal_values(tmp_path):
    pytest.importorskip("tensorboard")
    train(tmp_path, range(1, 5))
    rows = [flatten(line, separator="/") for line in metrics_of(tmp_path)]
    actual = read_tensorboard(tmp_path)
    assert actual.keys() == rows[0].keys()
    assert "sources/first.web/images" in actual
    for key, values in actual.items():
        assert [step for step, _ in values] == [1, 2, 3, 4], key
        wanted = [math.nan if line[key] is None else np.float32(line[key]) for line in rows]  # it keeps 32 bits
        np.testing.assert_array_equal([value for _, value in values], wanted, err_msg=key)


def test_a_continued_run_has_every_step_once_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    train(tmp_path, range(1, 6))
    train(tmp_path, range(3, 8))  # killed at 5, the newest checkpoint was of 2
    steps = {tag: [step for step, _ in values] for tag, values in read_tensorboard(tmp_path).items()}
    assert steps["loss"] == [1, 2, 3, 4, 5, 6, 7]
    assert all(numbers == steps["loss"] for numbers in steps.values())


class Failing(GeneralTracker):
    """A tracker whose network is gone after so many calls: a log for each step and its end."""

    name = "failing"
    requires_logging_directory = True
    tracker = None

    def __init__(self, working_calls):
        super().__init__()
        self.working_calls, self.calls = working_calls, []

    def log(self, values, step=None):
        self._send(step)

    def finish(self):
        self._send("finish")

    def _send(self, call):
        self.calls.append(call)
        if len(self.calls) > self.working_calls:
            raise ConnectionError("no route\n to host")


@pytest.mark.parametrize("working_calls", [0, 2, 4])
def test_a_tracker_that_fails_is_named_once_and_the_others_and_the_run_go_on(working_calls, tmp_path, caplog):
    failing, other = Failing(working_calls), Failing(99)
    monitor = Monitor(tmp_path, 4, 0, 10, True, Trackers({"failing": failing, "other": other}))
    for step in range(1, 5):
        monitor.step(step_metrics(step))
    monitor.close()
    calls = [1, 2, 3, 4, "finish"]
    assert (failing.calls, other.calls) == (calls[: working_calls + 1], calls)
    assert len(metrics_of(tmp_path)) == 4
    assert caplog.messages == [
        "log.trackers: failing fails and is left out; metrics.jsonl has everything: no route to host"
    ]


def test_a_tracker_that_cannot_start_is_left_out(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").touch()  # where its folder should be
    train(tmp_path, [1, 2])
    assert len(metrics_of(tmp_path)) == 2
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("log.trackers: tensorboard fails and is left out; ")


def test_a_missing_package_is_an_error_that_names_the_extra():
    for name in set(get_args(Tracker)) - {str(kind) for kind in get_available_trackers()}:
        with pytest.raises(UserError) as error:
            check_trackers([name])
        package = f"'lcl_ds[{name}]'" if name in TRACKER_EXTRAS else name
        assert error.value.problems == [f"log.trackers: {name} is not installed: pip install {package}"]
    check_trackers([])


def test_the_names_are_those_of_accelerate_and_the_extras_are_in_setup_py():
    assert set(get_args(Tracker)) == set(LOGGER_TYPE_TO_CLASS)
    setup = (ROOT / "setup.py").read_text()
    assert all(f'"{name}": ["{name}"]' in setup for name in TRACKER_EXTRAS)


@pytest.mark.parametrize(
    ("trackers", "said"),
    [
        ("[tensorbord]", r"log\.trackers\.0: input should be 'tensorboard', 'wandb'"),
        ("[wandb, wandb]", r"log\.trackers: a tracker is named twice"),
    ],
)
def test_a_wrong_name_is_an_error(trackers, said):
    with pytest.raises(UserError, match=said):
        small_config(f"log.trackers={trackers}")


def test_a_run_without_trackers_starts_none(tmp_path):
    before = dict(PartialState._shared_state)
    train(tmp_path, [1], trackers="[]")
    assert dict(PartialState._shared_state) == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1
