"""A rank whose launcher is gone stops by itself, and a rank that hangs is named and ended."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from lcl_ds.training import watch
from lcl_ds.training.pulse import Pulse
from lcl_ds.training.watch import HUNG, Launcher, grace_of, program_of
from tests.support.ranks import ROOT, Ranks

HOST = socket.gethostname()
RANK = """
import os, sys, time
from lcl_ds.training import watch
from lcl_ds.training.signals import STOP
from lcl_ds.training.watch import WATCH
watch.POLL_S = 0.1
with STOP.listening(), WATCH.running():
    STOP.enter("training")
    print(os.getpid(), flush=True)
    for _ in range(1000):
        if STOP.received:
            break
        time.sleep(0.01)
    print("received", STOP.received, flush=True)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.mark.parametrize(
    ("name", "is_launcher"),
    [("torchrun", True), ("accelerate-launch", True), ("nohup.py", False), ("my_torchrun_wrapper.py", False)],
)
def test_a_rank_stops_when_its_launcher_dies_and_not_when_another_parent_does(tmp_path, name, is_launcher):
    (tmp_path / name).write_text(LAUNCHER)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / name), RANK],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    rank = int(parent.stdout.readline())
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    if is_launcher:
        rest = parent.stdout.read()
        assert f"{name} (process {parent.pid}) has ended: the run saves" in rest
        assert rest.endswith(f"received {signal.SIGTERM}\n")
    else:
        time.sleep(0.5)
        os.kill(rank, signal.SIGKILL)
        assert parent.stdout.read() == ""


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (
            "/usr/bin/python3 -u -m deepspeed.launcher.launch --world_info=x launch/train.py",
            "deepspeed.launcher.launch",
        ),
        ("python3.11 /opt/bin/torchrun --nproc-per-node 2 launch/train.py", "torchrun"),
        ("bash -c torchrun launch/train.py", "bash"),
        ("python launch/train.py --run_dir torchrun", "train.py"),
        ("slurmstepd: [1234.0]", "slurmstepd:"),
        ("python", ""),
        ("", ""),
    ],
)
def test_a_launcher_is_known_by_the_program_that_its_command_runs(command, name):
    assert program_of(command.split()) == name


def test_the_time_that_a_launcher_leaves_is_known(monkeypatch, tmp_path):
    (tmp_path / "torchrun").write_text("import sys; print(flush=True); sys.stdin.read()")
    for arguments, seconds in (([], 30), (["--shutdown-timeout", "90"], 90), (["--shutdown_timeout=7"], 7)):
        command = [sys.executable, str(tmp_path / "torchrun"), *arguments]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            assert grace_of(Launcher("torchrun", process.pid, ""))[0] == seconds
            process.stdin.close()
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    assert grace_of(Launcher("accelerate", 0, ""))[0] == 120
    assert grace_of(Launcher("deepspeed.launcher.launch", 0, ""))[0] == 30
    monkeypatch.setattr(watch, "version", lambda name: "2.11.0+cu130")
    assert grace_of(Launcher("torchrun", 0, ""))[0] == 30


def test_the_usual_time_is_of_micro_steps_and_not_of_saves_or_data():
    pulse = Pulse()
    for step in range(1, 6):
        pulse.begin("waiting for data", step)
        pulse.since -= 1000
        pulse.begin("training", step)
        for micro_step in (1, 2):
            pulse.begin("training", step, micro_step)
            pulse.since -= 2
        pulse.begin("saving", step)
        pulse.since -= 3000
    assert pulse.usual_s == pytest.approx(2, abs=0.1)


ALONE = """
import time
from lcl_ds.training import watch
from lcl_ds.training.pulse import PULSE
from lcl_ds.training.watch import WATCH, Limits
watch.POLL_S, watch.SUSPENDED_S, watch.LAST_WORDS_S = 0.05, 0.5, 0.0
with WATCH.running():
    WATCH.guard(Limits(60, 1), None)
    PULSE.has_stepped = True
    PULSE.begin("training", 3, 1)
    print("going", flush=True)
    time.sleep(30)
"""


def test_a_process_that_hangs_ends_and_the_time_in_which_it_was_stopped_does_not_count():
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "going\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    continued = time.monotonic()
    process.send_signal(signal.SIGCONT)
    stderr = process.communicate(timeout=30)[1]
    assert time.monotonic() - continued > 0.5
    assert process.returncode == HUNG
    assert f"rank 0 on {HOST}: no progress for 1 s in step 3, micro-step 1; the threads of this rank are:\n" in stderr


HANGING = """
import sys, time, torch
from torch import distributed as dist
from lcl_ds.training import peers, watch
from lcl_ds.training.distributed import RankInfo
from lcl_ds.training.peers import peers_of
from lcl_ds.training.pulse import PULSE
from lcl_ds.training.watch import WATCH, Limits
import logging; logging.basicConfig(format="[%(levelname)s] %(message)s")
limit, slow_data = float(sys.argv[1]), float(sys.argv[2])
watch.POLL_S, watch.LOOK_S, watch.SUSPENDED_S, watch.FIRST_NOTICE_S, watch.LAST_WORDS_S = 0.1, 3.0, 1.0, 2.0, 0.1
peers.BEAT_S, peers.SILENT_S = 0.2, 1.0
dist.init_process_group("gloo")
rank = RankInfo(dist.get_rank(), 0, 2, torch.device("cpu"))
with WATCH.running(), peers_of(rank) as others:
    WATCH.guard(Limits(60, limit), others)
    PULSE.has_stepped = True
    for step in range(1, 10_000):
        PULSE.begin("waiting for data", step)
        if step == 20 and rank.rank == 1:
            time.sleep(slow_data)
        PULSE.begin("training", step, 1)
        dist.all_reduce(torch.zeros(1))
        time.sleep(0.02)
        if step == 10:
            print("going", flush=True)
        if step == 30 and slow_data:
            break
dist.destroy_process_group()
"""


def hanging(tmp_path, limit: float, slow_data: float) -> Ranks:
    ranks = Ranks(2, [sys.executable, "-c", HANGING, str(limit), str(slow_data)], tmp_path / "log")
    deadline = time.monotonic() + 100
    while "going" not in ranks.logs[0].read_text():
        assert time.monotonic() < deadline, ranks.output()
        time.sleep(0.05)
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1], ids=["the first rank, which keeps the store", "another rank"])
def test_a_rank_that_stops_is_named_and_the_others_end_with_their_stacks(tmp_path, stopped):
    ranks = hanging(tmp_path, 4, 0)
    os.kill(ranks.processes[stopped].pid, signal.SIGSTOP)
    try:
        alive = 1 - stopped
        assert ranks.processes[alive].wait(60) == HUNG, ranks.output()
        text = ranks.logs[alive].read_text()
        assert re.search(r"no step for 2 s, usual 0\.0\d+ s: in step \d+, micro-step 1", text), text
        if stopped:
            assert f"not heard of for 1 s: rank 1 on {HOST} (step" in text, text
        else:
            assert "the ranks' meeting place, which rank 0 or torchrun keeps, does not answer" in text, text
        assert re.search(rf"rank {alive} on {HOST}: no progress for 4 s in step \d+, micro-step 1", text), text
        assert "in all_reduce" in text
    finally:
        ranks.kill()


@pytest.mark.slow
def test_neither_waiting_for_data_nor_a_pause_of_the_whole_job_is_a_hang(tmp_path):
    """The first rank waits in a collective for the second one's data, for longer than the limit."""
    ranks = hanging(tmp_path, 1.5, 3)
    time.sleep(2.2)
    for process in ranks.processes:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2)
    for process in ranks.processes:
        os.kill(process.pid, signal.SIGCONT)
    assert ranks.wait(60) == [0, 0], ranks.output()
    assert "no step for" in ranks.output()
