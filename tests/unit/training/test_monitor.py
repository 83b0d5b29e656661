"""What a person sees while a run goes on, and what its folder keeps."""

import json

import pytest

from lcl_ds.training.monitor import Monitor, progress_line, time_left
from tests.support.runs import step_metrics


def steps_in(run_dir):
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0:00"),
        (724.9, "12:04"),
        (3600, "1:00:00"),
        (48_000, "13:20:00"),
        (86_400, "1d 00:00:00"),
        (480_000, "5d 13:20:00"),
        (float("inf"), "?"),
        (float("nan"), "?"),
    ],
)
def test_a_duration_says_its_days(seconds, shown):
    assert time_left(seconds) == shown


def test_a_line_shows_each_loss_by_its_name_and_not_their_total():
    line = progress_line(step_metrics(3), 10, "1:10")
    assert line == "step 3/10  ETA 1:10  contrastive 1.000  generation 2.000  16 images/s  181 tokens/s"
    assert "contrastive nan" in progress_line(step_metrics(3, losses={"contrastive_loss": float("nan")}), 10, "?")


def test_a_line_shows_utilisation_memory_and_the_slowest_rank_where_they_are_known():
    alone = progress_line(step_metrics(3, mfu=0.416, memory_gb=68.83), 10, "?")
    assert alone.endswith("tokens/s  MFU 41.6 %  68.8 GiB")
    several = progress_line(step_metrics(3, slowest_rank=5, slowest_rank_s=1.75, median_rank_s=1.5), 10, "?")
    assert several.endswith("tokens/s  slowest rank 5 +0.25 s")


def test_without_a_terminal_every_nth_line_and_the_last_are_printed_and_every_step_is_kept(tmp_path, capsys):
    monitor = Monitor(tmp_path, total_steps=5, first_step=0, print_every=2, enabled=True)
    for step in range(1, 6):
        monitor.step(step_metrics(step))
    monitor.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["step 2/5", "ETA 0:30"],
        ["step 4/5", "ETA 0:10"],
        ["step 5/5", "ETA 0:00"],
    ]
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]


def test_a_continued_run_writes_the_steps_after_its_checkpoint_again(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)))
    monitor = Monitor(tmp_path, total_steps=9, first_step=3, print_every=100, enabled=True)
    assert steps_in(tmp_path) == [1, 2, 3]
    monitor.step(step_metrics(4))
    assert json.loads(monitor.unsaved_lines())["step"] == 4
    monitor.saved()
    assert monitor.unsaved_lines() == b""
    monitor.close()
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_other_ranks_than_the_first_write_and_print_nothing(tmp_path, capsys):
    monitor = Monitor(tmp_path, total_steps=5, first_step=0, print_every=1, enabled=False)
    monitor.step(step_metrics(1))
    monitor.saved()
    assert monitor.unsaved_lines() == b""
    monitor.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
