"""The batch script for Slurm, with stand-ins for ``srun`` and ``scontrol`` that start and signal real tasks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.ranks import ROOT, free_port, train_command
from tests.support.runs import metrics_of

SCRIPT = ROOT / "launch" / "slurm.sbatch"
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Job:
    """A job's environment on one node of this machine, and what it asks of Slurm."""

    def __init__(self, folder: Path, tasks: int):
        self.tasks, self.calls = folder / "tasks", folder / "scontrol"
        stand_ins = ROOT / "tests" / "support" / "slurm"
        self.environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER} | {
            "PATH": os.pathsep.join(
                [str(folder / "bin"), str(stand_ins), str(Path(sys.executable).parent), os.environ["PATH"]]
            ),
            "PYTHONPATH": str(ROOT),
            "VENV": "none",
            "SRUN_TASKS": str(self.tasks),
            "SCONTROL_CALLS": str(self.calls),
            **{"SLURM_JOB_ID": str(free_port()), "SLURM_NTASKS": str(tasks), "SLURM_JOB_NODELIST": "localhost"},
            **{"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "1"},
        }
        self.output = folder / "output"

    def start(self, *arguments: str) -> subprocess.Popen:
        self.tasks.unlink(missing_ok=True)
        command = ["bash", str(SCRIPT), *arguments]
        return subprocess.Popen(command, env=self.environment, stdout=self.output.open("a"), stderr=subprocess.STDOUT)

    def requeued(self) -> int:
        wanted = f"requeue {self.environment['SLURM_JOB_ID']}\n"
        asked = self.calls.read_text() if self.calls.exists() else ""
        assert asked == wanted * asked.count("\n")
        return asked.count("\n")


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path, 2)


def put_program_in_place_of_python(job: Job, folder: Path, script: str) -> None:
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/bash\n{script}\n")
    python.chmod(0o755)


@pytest.mark.parametrize(
    ("codes", "ends_with", "requeued"),
    [((0, 0), 0, 0), ((138, 138), 0, 1), ((143, 138), 0, 1), ((1, 1), 1, 0), ((2, 2), 2, 0), ((0, 137), 137, 0)],
)
def test_a_run_that_a_signal_ended_is_put_back_and_no_other(job, tmp_path, codes, ends_with, requeued):
    put_program_in_place_of_python(job, tmp_path, f"codes=({codes[0]} {codes[1]}); exit ${{codes[SLURM_PROCID]}}")
    assert job.start().wait(60) == ends_with
    assert job.requeued() == requeued


def test_a_cancelled_job_and_one_that_was_restarted_too_often_stay_away(job, tmp_path):
    put_program_in_place_of_python(job, tmp_path, "sleep 1; exit 143")
    script = job.start()
    deadline = time.monotonic() + 60
    while not job.tasks.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    assert script.wait(60) == 143
    job.environment |= {"SLURM_RESTART_COUNT": "200"}
    assert job.start().wait(60) == 143
    assert job.requeued() == 0


def test_arguments_reach_the_program_as_they_were_given(job, tmp_path):
    put_program_in_place_of_python(job, tmp_path, 'printf "%s|" "$@"; echo')
    assert job.start("--run_dir", "a b", "data.shards=[{name: x}]").wait(60) == 0
    assert job.output.read_text() == "launch/train.py|--run_dir|a b|data.shards=[{name: x}]|\n" * 2


def test_two_tasks_save_at_the_signal_and_the_job_that_was_put_back_finishes_the_run(job, recipe, tmp_path):
    run_dir = tmp_path / "run"
    arguments = train_command(recipe, run_dir, "evaluation.shards=null", "train.steps=400")[2:]
    script = job.start(*arguments)
    deadline = time.monotonic() + 170
    while len(metrics_of(run_dir)) < 2 and time.monotonic() < deadline and script.poll() is None:
        time.sleep(0.1)
    for task in job.tasks.read_text().split():
        os.kill(int(task), signal.SIGTERM)
    assert script.wait(170) == 0, job.output.read_text()
    assert job.requeued() == 1
    done = len(metrics_of(run_dir))
    assert 2 <= done < 400
    assert job.start(*arguments[:-1], f"train.steps={done + 2}").wait(170) == 0, job.output.read_text()
    assert job.requeued() == 1
    assert [row["step"] for row in metrics_of(run_dir)] == list(range(1, done + 3))
    assert job.output.read_text().count("world size 2") == 2
