"""Whole runs of ``launch/train.py`` as a user starts them."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lcl_ds.errors import UserError
from lcl_ds.training.checkpoint import load_model, problem_of, read_state, resolve_checkpoint
from tests.support.ranks import ROOT, Ranks, free_port, run_ranks, train_command
from tests.support.runs import metrics_of, without_timing


def test_one_and_two_ranks_compute_the_same_losses(whole_run, recipe, tmp_path):
    run_ranks(1, train_command(recipe, tmp_path / "run", "evaluation.shards=null"), tmp_path / "log")
    one, two = metrics_of(tmp_path / "run"), metrics_of(whole_run)
    assert len(one) == len(two) == 30
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "contrastive_loss", "generation_loss"):
            assert a[key] == pytest.approx(b[key], rel=1e-4)
        assert [a[k] for k in ("images", "documents", "tokens")] == [b[k] for k in ("images", "documents", "tokens")]


def test_the_run_folder_holds_what_the_contract_names(whole_run):
    first = metrics_of(whole_run)[0]
    assert set(first) == {
        *("step", "loss", "contrastive_loss", "generation_loss", "logit_scale", "grad_norm", "lr", "images"),
        *("image_tokens", "documents", "tokens", "text_tokens", "padding_fraction"),
        *("images_per_s", "tokens_per_s", "step_s"),
        *("data_s", "skipped_samples", "sources", "applied", "token_squares", "tflop", "memory_gb"),
        *("slowest_rank", "slowest_rank_s", "median_rank_s"),
    }
    assert first["loss"] == pytest.approx(first["generation_loss"] + 0.1 * first["contrastive_loss"], rel=1e-6)
    for name in (
        "config.yaml",
        "ds_config.json",
        "environment.json",
        "report.html",
        "plots/losses.png",
        "evaluation/pictures.json",
    ):
        assert (whole_run / name).is_file(), name
    evaluation = json.loads((whole_run / "evaluation.json").read_text())
    assert evaluation["documents"] == 40
    assert set(evaluation["probe"]) == {"colour", "shape"}
    assert 0 <= evaluation["retrieval"]["recall_at_1"] <= evaluation["retrieval"]["recall_at_5"] <= 1
    assert (whole_run / "plots" / "retrieval.png").is_file()
    folder = whole_run / "checkpoints"
    assert (folder / "latest").read_text().strip() == "step_00000030"
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_00000025", "step_00000030"]


def test_both_losses_fall(whole_run):
    metrics = metrics_of(whole_run)
    for key in ("contrastive_loss", "generation_loss"):
        first, last = (sum(m[key] for m in rows) / 5 for rows in (metrics[:5], metrics[-5:]))
        assert last < first, key


def wait_for_step(run_dir: Path, step: int, ranks: Ranks, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    path = run_dir / "metrics.jsonl"
    while not path.exists() or f'{{"step": {step},' not in path.read_text():
        assert time.monotonic() < deadline, ranks.output()
        assert all(process.poll() is None for process in ranks.processes), ranks.output()
        time.sleep(0.02)


def test_a_run_killed_at_any_moment_and_then_asked_to_stop_equals_the_uninterrupted_one(whole_run, recipe, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = train_command(recipe, run_dir)
    killed = Ranks(2, command, log)
    wait_for_step(run_dir, random.randint(6, 12), killed)
    time.sleep(random.random() * 0.3)
    killed.kill()

    stopped = Ranks(2, command, log)
    wait_for_step(run_dir, random.randint(15, 20), stopped)
    os.kill(stopped.processes[1].pid, signal.SIGTERM)
    assert stopped.wait() == [128 + signal.SIGTERM] * 2, stopped.output()
    saved_at = len(metrics_of(run_dir))
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == f"step_{saved_at:08d}"
    assert "run the same command again" in stopped.output()

    output = run_ranks(2, command, log)
    assert f"at step {saved_at}" in output
    assert without_timing(metrics_of(run_dir)) == without_timing(metrics_of(whole_run))


def test_a_run_in_a_folder_of_any_name_goes_on_from_the_checkpoint_before_a_torn_one(whole_run, recipe, tmp_path):
    """A line of metrics that is damaged as well is taken from a checkpoint."""
    run_dir = tmp_path / os.fsdecode(b"run [1] {2} *? \xe9")
    shutil.copytree(whole_run, run_dir)
    newest = run_dir / "checkpoints" / "step_00000030"
    file = next((newest / "moments").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join([*lines[:22], "foreign\n", *lines[23:]]))
    output = run_ranks(2, train_command(recipe, run_dir), tmp_path / "log")
    assert "step_00000030 cannot be used" in output
    assert "at step 25" in output
    assert "step 23 is taken from the checkpoint" in output
    assert without_timing(metrics_of(run_dir)) == without_timing(metrics_of(whole_run))
    ours, theirs = (load_model(resolve_checkpoint(folder)).state_dict() for folder in (run_dir, whole_run))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_a_finished_run_whose_metrics_were_damaged_has_its_report_all_the_same(whole_run, recipe, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole_run, run_dir)
    (run_dir / "report.html").unlink()
    lines = (run_dir / "metrics.jsonl").read_bytes().split(b"\n")
    lines[27] = lines[27][:10]
    (run_dir / "metrics.jsonl").write_bytes(b"\n".join(lines))
    output = run_ranks(2, train_command(recipe, run_dir), tmp_path / "log")
    assert "is finished: 30 of 30 steps done" in output
    assert "step 28 is taken from the checkpoints" in output
    assert (run_dir / "report.html").is_file()
    assert without_timing(metrics_of(run_dir)) == without_timing(metrics_of(whole_run))


def test_a_run_goes_on_with_another_number_of_ranks_at_another_stage(whole_run, recipe, tmp_path):
    run_dir = shutil.copytree(whole_run, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints" / "step_00000030")
    output = run_ranks(4, train_command(recipe, run_dir, "evaluation.shards=null", ds_config="zero1"), tmp_path / "log")
    assert "at step 25" in output
    assert "applied from now on: zero_optimization.stage 3 -> 1" in output
    for one, other in zip(metrics_of(run_dir), metrics_of(whole_run), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert [one[k] for k in ("images", "documents", "tokens")] == [
            other[k] for k in ("images", "documents", "tokens")
        ]


def test_ranks_that_the_deepspeed_launcher_started_save_and_end_when_it_alone_is_killed(recipe, tmp_path):
    """``kill``, ``timeout`` and containers signal the outer process, which passes nothing on."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]
    overrides = ["train.steps=500", "checkpoint.every=500", "train.accumulation_steps=4"]
    command = [*launcher, *train_command(recipe, run_dir, *overrides, ds_config="zero2")[1:]]
    environment = {**os.environ, "LOCAL_SIZE": "2", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        runner = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(metrics_of(run_dir)) < 2:
        assert runner.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    runner.terminate()
    assert runner.wait() == -signal.SIGTERM
    while subprocess.run(["pgrep", "-g", str(runner.pid)], capture_output=True, check=False).stdout:
        assert time.monotonic() < deadline + 60, log.read_text()
        time.sleep(0.1)
    output = log.read_text()
    assert "world size 2, ZeRO stage 2" in output
    assert (
        f"deepspeed.launcher.runner (process {runner.pid}) has ended" in output
    )  # one rank may hear it after the save
    assert "SIGTERM: step" in output
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == f"step_{len(metrics_of(run_dir)):08d}"
    assert not (run_dir / ".lock").exists()


def test_a_second_start_on_a_run_is_refused_while_the_first_goes_on(recipe, tmp_path):
    command = train_command(recipe, tmp_path / "run", "train.steps=500")
    first = Ranks(1, command, tmp_path / "log")
    wait_for_step(tmp_path / "run", 1, first)
    second = Ranks(1, command, tmp_path / "log2")
    assert second.wait() == [2], second.output()
    assert f"is in use by process {first.processes[0].pid} on " in second.output()
    first.processes[0].send_signal(signal.SIGUSR1)
    assert first.wait() == [128 + signal.SIGUSR1], first.output()


DAMAGE = {
    "no manifest": ("COMPLETE.json", lambda text: "", "COMPLETE.json: is not valid JSON"),
    "foreign manifest": ("COMPLETE.json", lambda text: "[1]", "COMPLETE.json: is no list of the checkpoint's files"),
    "settings": ("config.yaml", lambda text: text.replace("steps", "stepz"), "config.yaml: is not what was written"),
    "zeros for settings": ("config.yaml", lambda text: "\0\0", "config.yaml: has 2 bytes, the manifest says"),
    "cut settings": ("config.yaml", lambda text: text[:99], "config.yaml: has 99 bytes, the manifest says"),
    "position": (
        "trainer_state.json",
        lambda text: text.replace('"step": 30', '"step": 29'),
        "is not what was written",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_small_file_of_a_checkpoint_is_named(whole_run, tmp_path, damage):
    checkpoint = shutil.copytree(whole_run / "checkpoints" / "step_00000030", tmp_path / "step_00000030")
    name, change, message = DAMAGE[damage]
    path = checkpoint / name
    path.write_text(change(path.read_text()))
    assert message in str(problem_of(checkpoint))
    with pytest.raises(UserError, match=r"this checkpoint cannot be used|neither a complete"):
        resolve_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("[]", "whole file"),
        ("{}", "progress: field required"),
        (None, "is not valid JSON"),
        ('{"progress": {"stepp": 1}, "loader": {"next_row": 0, "lanes": {}, "lane_count": 1, "fingerprint": {}}, '
         '"optimizer_steps": 1, "vocab_size": 9}', "progress: "),
    ],
)  # fmt: skip
def test_a_state_that_lacks_what_is_needed_is_named(tmp_path, state, message):
    (tmp_path / "trainer_state.json").write_text("\0\0" if state is None else state)
    with pytest.raises(UserError, match=message):
        read_state(tmp_path)
