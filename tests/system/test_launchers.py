"""Launchers beside DeepSpeed's own start the same run."""

import os
import subprocess
import sys

from tests.support.ranks import ROOT, free_port, train_command
from tests.support.runs import metrics_of


def test_accelerate_launch_starts_two_ranks(recipe, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    _, *program = train_command(recipe, tmp_path / "run", "train.steps=2", "evaluation.shards=null")
    command = [*launcher, "--main_process_port", str(free_port()), *program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    assert "world size 2, ZeRO stage 3, fp32 on cpu" in done.stderr
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2]
