"""A process that is asked to stop says what it will do at once, whatever its main thread is doing."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lcl_ds.training.signals import SIGNALS, STOP
from tests.support.ranks import ROOT

HEEDED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""
"""What a process does first that was started where these are ignored, as behind nohup, and is to heed them."""
PROGRAM = """
import hashlib, os, signal, sys, threading, time
from lcl_ds.training import signals
from lcl_ds.training.pulse import PULSE
from lcl_ds.training.signals import STOP
signals.PATIENCE_S = 1.0
phase, work = sys.argv[1:]
with STOP.listening():
    STOP.enter(phase)
    PULSE.begin("training", 8, 1)
    PULSE.begin("training", 8, 2)
    PULSE.saved(7, 2.0)
    print("ready", flush=True)
    if work == "C":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)
    for _ in range(3000):
        if STOP.received:
            break
        time.sleep(0.01)
    if work == "slow":
        time.sleep(30)
    print("saved", flush=True)
sys.exit(128 + STOP.received if STOP.received else 0)
"""


def started(phase: str, work: str = "", before: str = "", rank: int = 0, **options) -> subprocess.Popen:
    """The program after it has said that it listens."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEEDED + before + PROGRAM, phase, work],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "WORLD_SIZE": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_while_training_each_signal_leads_to_a_save_and_its_own_code(number):
    process = started("training")
    process.send_signal(number)
    code, stdout, stderr = ended(process)
    assert (code, stdout) == (128 + number, "saved\n")
    assert stderr.startswith(f"{signal.Signals(number).name}: the run saves after this micro-step and ends with code")
    assert "(micro-step 0.0 s, save 2.0 s)" in stderr


@pytest.mark.parametrize(
    ("phase", "reason"),
    [("starting", "nothing has been trained since this start"), ("closing", "the weights are saved")],
)
def test_where_nothing_is_lost_the_process_ends_at_once(phase, reason):
    process = started(phase, "slow")
    process.send_signal(signal.SIGINT)
    code, stdout, stderr = ended(process)
    assert (code, stdout) == (130, "")
    assert reason in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(("phase", "then"), [("starting", 143), ("training", None)])
def test_a_main_thread_that_is_in_c_delays_no_answer(phase, then):
    process = started(phase, "C")
    process.terminate()
    assert process.stderr.readline().startswith("SIGTERM: the run")
    assert (process.wait(10) if then else process.poll()) == then
    process.kill()
    ended(process)


def test_signals_at_one_moment_count_as_one_and_a_later_one_ends_the_process():
    process = started("training", "slow")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        time.sleep(0.1)
    assert process.stderr.readline().startswith("SIGINT: the run saves")
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, stdout, stderr = ended(process)
    assert (code, stdout) == (143, "")
    assert stderr.startswith("SIGTERM, 1 s after the first signal: the run ends at once; the same command continues")


def test_only_the_first_rank_speaks():
    process = started("training", rank=1)
    process.terminate()
    assert ended(process) == (143, "saved\n", "")


def test_what_was_ignored_at_the_start_stays_ignored():
    """As under ``nohup`` and, for Ctrl-C, in the background of a script's shell."""
    ignored = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)"
    )
    process = started("starting", before=ignored)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    assert ended(process)[0] == 143


def test_a_terminal_that_closes_does_not_keep_the_run_from_saving(tmp_path):
    """Every write to it would fail."""
    kept = tmp_path / "kept"
    program = PROGRAM.replace(
        'print("saved", flush=True)', f"print('to the terminal', flush=True); open({str(kept)!r}, 'w')"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(
            sys.executable,
            [sys.executable, "-c", HEEDED + program, "training", ""],
            {**os.environ, "PYTHONPATH": str(ROOT)},
        )
    shown = b""
    while not shown.endswith(
        b"\n"
    ):  # closed in the middle of the line, the terminal would fail the program's own write
        shown += os.read(terminal, 100)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    assert kept.exists()


def test_a_forked_child_neither_speaks_for_its_parent_nor_outlives_a_signal():
    child = "pid = os.fork()\n    if pid == 0: signal.signal(signal.SIGUSR1, print); time.sleep(30); os._exit(7)\n"
    child += "    time.sleep(0.2); print('ready', flush=True)"
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            PROGRAM.replace('print("ready", flush=True)', child.replace("'ready'", "pid")),
            "starting",
            "",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    pid = int(process.stdout.readline())
    os.kill(pid, signal.SIGUSR1)  # a handler of its own, as the loaders have
    time.sleep(0.1)
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    assert process.poll() is None
    process.kill()
    assert ended(process)[2] == ""


def test_listening_leaves_the_process_as_it_was():
    before = [signal.getsignal(number) for number in SIGNALS], threading.active_count()
    with STOP.listening():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert ([signal.getsignal(number) for number in SIGNALS], threading.active_count()) == before
    assert signal.set_wakeup_fd(-1) == -1
