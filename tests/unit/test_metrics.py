"""``metrics.jsonl`` has every step once, whatever happened to it or to the disk."""

import json
import logging
import math

import pytest

from lcl_ds.metrics import (
    KEYS,
    MetricsFile,
    SourceCounts,
    StepMetrics,
    finite,
    keep_metrics,
    loss_names,
    read_metrics,
    report_names,
)
from tests.support.disks import no_file_larger_than


def line(step, loss=1.0):
    return json.dumps({"step": step, "loss": loss}) + "\n"


def lines(*steps):
    return "".join(line(step) for step in steps)


def steps_in(path):
    return [json.loads(text)["step"] for text in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_steps_after_the_checkpoint_are_left_to_the_continued_run(path):
    path.write_text(lines(1, 2, 3, 4))
    keep_metrics(path, 2)
    assert path.read_text() == lines(1, 2)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ('{"step": 2, "lo', "line 2 is not valid JSON"),
        ("\0\0\0\0", "line 2 has bytes that are zero"),
        ('{"loss": 1}', "line 2 names no step"),
        ('{"step": "2"}', "line 2 names no step"),
        ('{"step": true}', "line 2 names no step"),
        ("[2]", "line 2 names no step"),
        ("a line of somebody's log", "line 2 is not valid JSON"),
        ('{"step": 2, "x": ' + "[" * 100_000, "line 2 is not valid JSON"),
    ],
    ids=["torn", "zeros", "no step", "text", "bool", "list", "foreign", "deep"],
)
def test_a_damaged_line_is_named_and_set_aside(path, caplog, damage, reason):
    path.write_text(line(1) + damage + "\n" + line(3))
    keep_metrics(path, 3)
    assert steps_in(path) == [1, 3]
    assert reason in caplog.text
    assert "step 2 is missing" in caplog.text
    assert path.with_name("metrics.damaged").read_text() == damage + "\n"


def test_bytes_that_are_no_text_are_one_line_s_damage(path, caplog):
    path.write_bytes(line(1).encode() + b"\xff\xfe{}\n" + line(2).encode())
    keep_metrics(path, 2)
    assert steps_in(path) == [1, 2]
    assert "line 2 is not valid JSON" in caplog.text


def test_a_lost_tail_is_taken_from_the_checkpoint(path, tmp_path, caplog):
    path.write_text(lines(1, 2, 3) + line(4)[:9])
    (tmp_path / "spare").write_text(lines(3, 4, 5))
    keep_metrics(path, 5, [tmp_path / "spare"])
    assert path.read_text() == lines(1, 2, 3, 4, 5)
    assert "steps 4 to 5 are taken from the checkpoint" in caplog.text


def test_a_lost_file_is_taken_from_all_checkpoints_that_are_left(path, tmp_path, caplog):
    for number, kept in enumerate([lines(3, 4), lines(5, 6), lines(7)]):
        (tmp_path / f"spare{number}").write_text(kept)
    keep_metrics(path, 6, [tmp_path / f"spare{number}" for number in (0, 1, 2, 3)])
    assert path.read_text() == lines(3, 4, 5, 6)
    assert "steps 3 to 6 are taken from the checkpoints" in caplog.text
    assert "steps 1 to 2 are missing" in caplog.text


def test_a_byte_order_mark_is_taken_off(path, caplog):
    path.write_text(lines(1, 2), encoding="utf-8-sig")
    keep_metrics(path, 2)
    assert (path.read_text(), caplog.text) == (lines(1, 2), "")


def test_another_encoding_is_damage(path, caplog):
    path.write_text(lines(1, 2), encoding="utf-16")
    keep_metrics(path, 2)
    assert path.read_text() == ""
    assert "line 1 has bytes that are zero" in caplog.text


def test_a_gap_that_nothing_fills_is_named(path, caplog):
    path.write_text(lines(1, 5, 6, 8))
    keep_metrics(path, 9)
    assert "steps 2 to 4, 7, 9 are missing" in caplog.text


def test_a_file_that_went_away_is_a_gap(path, caplog):
    keep_metrics(path, 3)
    assert "steps 1 to 3 are missing" in caplog.text


def test_a_step_that_stands_twice_is_kept_once(path):
    path.write_text(line(1) + line(2, loss=5.0) + line(2, loss=6.0) + line(3))
    keep_metrics(path, 3)
    assert path.read_text() == line(1) + line(2, loss=6.0) + line(3)


def test_a_whole_file_is_not_touched(path, caplog):
    path.write_text(lines(1, 2))
    before = path.stat().st_ino
    keep_metrics(path, 2)
    assert (path.stat().st_ino, caplog.text) == (before, "")


def test_lines_that_the_disk_refuses_are_written_when_it_takes_them_again(path, caplog):
    file = MetricsFile(path)
    file.append({"step": 1, "loss": 1.0})
    with no_file_larger_than(path.stat().st_size + 10):
        for step in (2, 3):
            file.append({"step": step, "loss": 1.0})
            assert path.read_text() == line(1), "a torn line stands in the file"
    file.append({"step": 4, "loss": 1.0})
    assert path.read_text() == lines(1, 2, 3, 4)
    assert [record.levelno for record in caplog.records] == [logging.WARNING], "said once"
    assert "training goes on" in caplog.text
    file.close()


def test_lines_that_never_found_room_are_counted_at_the_end(path, caplog):
    file = MetricsFile(path)
    with no_file_larger_than(10):
        file.append({"step": 1})
        file.append({"step": 2})
        file.close()
    assert "the last 2 lines could not be written" in caplog.text


def test_a_checkpoint_gets_the_lines_since_the_one_before(path):
    file = MetricsFile(path)
    file.append({"step": 1})
    file.flush_to_disk()
    file.append({"step": 2, "loss": float("nan")})
    assert b"".join(file.since_saved) == b'{"step": 2, "loss": null}\n'
    file.close()


def step_metrics(**changes):
    values = {
        "step": 3,
        "losses": {"loss": 1.5, "other_loss": 0.5},
        "reports": {"logit_scale": 14.0, "matches": 7.0},
        **{
            "grad_norm": 1.0,
            "lr": 1e-3,
            "images": 8,
            "image_tokens": 128,
            "documents": 4,
            "tokens": 90,
            "text_tokens": 60,
            "token_squares": 900,
        },
        **{"padding_fraction": 0.1, "images_per_s": 16.0, "tokens_per_s": 180.0, "step_s": 0.5, "data_s": 0.1},
        **{"skipped_samples": 0, "sources": {"web": SourceCounts(4, 8)}, "applied": True},
    }
    return StepMetrics(**values | changes)


def test_a_step_is_written_and_read_by_name_in_the_order_of_its_description(path):
    file = MetricsFile(path)
    file.append(step_metrics().row())
    file.close()
    (row,) = read_metrics(path.parent)
    assert [*row] == [
        *("step", "loss", "other_loss", "logit_scale", "matches", "grad_norm", "lr", "images", "image_tokens"),
        *("documents", "tokens", "text_tokens", "token_squares", "padding_fraction", "images_per_s", "tokens_per_s"),
        *("step_s", "data_s", "skipped_samples", "sources", "applied"),
    ]
    assert row["sources"] == {"web": {"documents": 4, "images": 8}}
    assert loss_names(row) == ["other_loss"]
    assert report_names(row) == ["logit_scale", "matches"]


def test_what_is_not_always_known_comes_last_and_only_where_it_is_known():
    assert [*step_metrics(memory_gb=30.0).row()][-2:] == ["applied", "memory_gb"]
    assert [*step_metrics(memory_gb=30.0, mfu=0.4).row()][-3:] == ["applied", "mfu", "memory_gb"]
    assert {key for key, whose in KEYS.items() if whose == "GPU"} == {"mfu"}
    named = {"slowest_rank": 3, "slowest_rank_s": 1.5, "median_rank_s": 1.0}
    assert [*step_metrics(**named).row()][-3:] == [*named]


def test_a_number_of_the_objective_that_is_not_finite_is_null_and_keeps_its_name():
    row = finite(step_metrics(losses={"loss": math.nan, "other_loss": math.inf}, reports={"seen": math.nan}).row())
    assert (row["loss"], row["other_loss"], row["seen"]) == (None, None, None)
    assert (loss_names(row), report_names(row)) == (["other_loss"], ["seen"])


def test_what_other_versions_or_people_wrote_is_no_report():
    assert report_names({"step": 1, "loss": 1.0, "note": "warm", "list": [1], "extra": 2}) == ["extra"]
