"""Steps out of the ordinary: what is said and written, what is passed over afterwards, when the run ends."""

import json
import logging

import pytest

from lcl_ds.errors import UserError
from lcl_ds.training.checkpoint import Progress
from lcl_ds.training.odd_steps import DrawnRows, OddSteps, read_rollbacks
from tests.support.runs import step_metrics
from tests.support.small import small_config

STEADY = 10


class Steps:
    """Feeds a judge with one step after another, eight rows each."""

    def __init__(self, run_dir, rank_info, *overrides, progress=None):
        self.path = run_dir / "skipped_steps.jsonl"
        self.progress = progress or Progress()
        self.odd_steps = OddSteps(run_dir, small_config(*overrides).train, self.progress, rank_info)
        self.step = self.progress.step

    def take(self, loss=2.0, norm=1.0, applied=True, last_saved=0):
        self.step += 1
        rows = DrawnRows(8 * (self.step - 1), 8 * self.step, (f"web/a.tar/{self.step}",))
        limit = self.odd_steps.begin(rows)
        metrics = step_metrics(self.step, losses={"loss": loss}, grad_norm=norm, applied=applied and norm <= limit)
        return self.odd_steps.judge(metrics, last_saved)

    def steady(self, count=STEADY):
        assert not any(self.take() for _ in range(count))
        return self

    def records(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []


@pytest.fixture
def steps(tmp_path, only_rank):
    return lambda *overrides, **options: Steps(tmp_path, only_rank, *overrides, **options)


def test_a_spike_is_named_with_its_documents_and_applied(steps, caplog):
    run = steps().steady()
    assert not run.take(loss=900.0, norm=50.0)
    (record,) = run.records()
    assert record == {
        "step": 11,
        "reason": "gradient norm 50, usually 1",
        "applied": True,
        "rolled_back_to": None,
        "loss": 900.0,
        "grad_norm": 50.0,
        "rows": [80, 88],
        "documents": ["web/a.tar/11"],
    }
    assert f"step 11: gradient norm 50, usually 1; the update was made; its documents: {run.path}" in caplog.text


def test_of_many_spikes_in_a_row_the_first_tenth_and_so_on_are_named(steps):
    run = steps().steady(40)
    for _ in range(12):
        run.take(norm=50.0)
    assert [record["step"] for record in run.records()] == [41, 50]


def test_a_step_without_finite_gradients_is_named_and_not_taken_for_a_spike(steps, caplog):
    run = steps("train.on_spike=rollback").steady()
    assert not run.take(loss=float("nan"), norm=float("inf"), applied=False)
    (record,) = run.records()
    assert (record["reason"], record["loss"], record["grad_norm"]) == ("gradients are not finite", None, None)
    assert "step 11: gradients are not finite; skipped on all ranks" in caplog.text


def test_where_spikes_are_skipped_only_the_norm_is_limited(steps):
    run = steps("train.on_spike=skip", "train.spike_factor=4")
    assert run.odd_steps.begin(DrawnRows(0, 0)) == float("inf")
    run.steady()
    assert run.odd_steps.begin(DrawnRows(0, 0)) == 4.0
    run.take(norm=4.5)
    run.take(loss=9.0)
    assert [record["applied"] for record in run.records()] == [False, True]
    assert run.progress.recent["grad_norm"] == [1.0] * (STEADY + 1)  # what was left out is not remembered


def test_rows_of_a_step_that_was_taken_back_are_passed_over_from_the_next_start_on(steps):
    run = steps("train.on_spike=rollback").steady()
    assert run.take(norm=50.0, last_saved=8)
    again = steps("train.on_spike=warn")  # whatever the setting is now
    passed_over = [first for first in range(0, 120, 8) if again.odd_steps.passes_over(first, first + 8)]
    assert passed_over == [80]
    with_other_rows = [first for first in range(0, 120, 12) if again.odd_steps.passes_over(first, first + 12)]
    assert with_other_rows == [72, 84]


def test_for_a_loss_the_step_before_is_taken_back_as_well_since_its_update_may_be_the_cause(steps):
    run = steps("train.on_spike=rollback").steady()
    assert run.take(loss=9.0, last_saved=8)
    assert (run.records()[0]["rows"], run.records()[0]["documents"]) == ([72, 88], ["web/a.tar/10", "web/a.tar/11"])


def test_but_not_where_a_checkpoint_has_it(steps):
    run = steps("train.on_spike=rollback").steady()
    assert run.take(loss=9.0, last_saved=10)
    assert run.records()[0]["rows"] == [80, 88]


def test_a_run_that_goes_back_to_one_checkpoint_again_and_again_ends_with_a_sentence(steps):
    for spike in range(3):
        assert steps("train.on_spike=rollback").steady(10 + spike).take(norm=50.0, last_saved=8)
    with pytest.raises(UserError, match=r"step 14: gradient norm 50.* went back to step 8 3 times .*learning_rate"):
        steps("train.on_spike=rollback").steady(13).take(norm=50.0, last_saved=8)
    assert steps("train.on_spike=rollback").steady(13).take(norm=50.0, last_saved=12)  # another checkpoint


def test_a_line_that_was_cut_off_spoils_neither_the_next_one_nor_the_reading(steps):
    run = steps("train.on_spike=rollback").steady()
    run.path.write_text('{"step": 3, "rolled_back_to": 1, "rows": [0, 8]}\n[1]\nnull\n{"step": 5, "rolled_back')
    run.take(norm=50.0, last_saved=8)
    assert [line["rows"] for line in read_rollbacks(run.path)] == [[0, 8], [80, 88]]


def test_a_disk_that_takes_nothing_stops_a_rollback_and_nothing_else(steps, caplog):
    run = steps("train.on_spike=warn").steady()
    run.path.mkdir()
    assert not run.take(norm=50.0)
    assert "cannot be written: " in caplog.text
    run.path.rmdir()
    run = steps("train.on_spike=rollback").steady()
    run.path.mkdir()
    with pytest.raises(UserError, match=r"skipped_steps.jsonl: it is a folder"):
        run.take(norm=50.0)


def test_a_continued_run_judges_as_one_that_was_not_interrupted(steps):
    run = steps().steady()
    recent = json.loads(json.dumps(run.progress.recent))
    continued = steps(progress=Progress(step=10, recent=recent))
    continued.take(norm=50.0)
    assert continued.records()[0]["reason"] == "gradient norm 50, usually 1"


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.INFO, "lcl_ds")
