"""One run, one folder: a second start is refused with the name of the first, and a dead one is in nobody's way."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lcl_ds.errors import UserError
from lcl_ds.training import lock
from lcl_ds.training.lock import LOCK, RunLock
from lcl_ds.training.run_folder import holding_folder
from tests.support.ranks import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from lcl_ds.training import lock
lock.BEAT_S = 0.1
held = lock.RunLock.take(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
held.release()
"""


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    monkeypatch.setattr(lock, "STALE_S", 0.6)
    monkeypatch.setattr(lock, "SETTLED_S", 0.05)


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds the folder until it reads a line or is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_start_is_refused_with_host_process_and_time_of_the_first(tmp_path):
    with held_elsewhere(tmp_path) as other:
        with pytest.raises(UserError, match=rf"in use by process {other.pid} on {socket.gethostname()}, since 20\d\d-"):
            RunLock.take(tmp_path)
        other.stdin.write("\n")
        other.stdin.flush()
        other.wait(10)
        assert not (tmp_path / LOCK).exists()
        RunLock.take(tmp_path).release()


def test_a_killed_start_on_this_host_is_in_nobodys_way(tmp_path, caplog):
    caplog.set_level("INFO")
    with held_elsewhere(tmp_path) as other:
        other.kill()
        other.wait()
        started = time.monotonic()
        held = RunLock.take(tmp_path)
        assert time.monotonic() - started < 0.5
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        assert f"process {other.pid}" in caplog.text
        held.release()


def other_host(folder: Path) -> None:
    """Make the file look as if its owner were on another host."""
    owner = json.loads((folder / LOCK).read_text())
    with (folder / LOCK).open("r+") as file:
        file.write(json.dumps(owner | {"host": "elsewhere"}))


def without_lockf(monkeypatch, error: int) -> None:
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "lockf", refuse)


@pytest.mark.parametrize("sees_lock", [True, False], ids=["lock seen", "locks of one host alone"])
def test_an_owner_on_another_host_counts_as_long_as_it_touches_the_file(tmp_path, monkeypatch, sees_lock):
    with held_elsewhere(tmp_path) as other:
        other_host(tmp_path)
        with monkeypatch.context() as patch:
            if not sees_lock:
                patch.setattr(fcntl, "lockf", lambda *_: None)
            with pytest.raises(UserError, match=f"in use by process {other.pid} on elsewhere"):
                RunLock.take(tmp_path)
        other.kill()
        other.wait()
        held = RunLock.take(tmp_path)
        with held_by_nobody_else(tmp_path):
            held.release()


@contextmanager
def held_by_nobody_else(folder: Path) -> Iterator[None]:
    """Try from another process: looking for the owner's touch must not have cost this process its own lock."""
    with pytest.raises(AssertionError), held_elsewhere(folder):
        pass
    yield


@pytest.mark.parametrize("error", lock.NO_LOCKS[:1])
def test_where_a_file_system_has_no_locks_the_touch_decides(tmp_path, monkeypatch, error):
    with held_elsewhere(tmp_path) as other:
        without_lockf(monkeypatch, error)
        with pytest.raises(UserError, match=f"in use by process {other.pid}"):
            RunLock.take(tmp_path)
        other.kill()
        other.wait()
        RunLock.take(tmp_path).release()


def test_of_two_starts_at_one_moment_without_locks_one_is_refused(tmp_path, monkeypatch):
    without_lockf(monkeypatch, lock.NO_LOCKS[0])
    both_have_read = threading.Barrier(2)

    def own_number() -> int:
        both_have_read.wait(10)
        return threading.get_ident()

    monkeypatch.setattr(lock.os, "getpid", own_number)
    outcomes = []

    def take() -> None:
        try:
            outcomes.append(RunLock.take(tmp_path))
        except UserError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = [outcome for outcome in outcomes if isinstance(outcome, RunLock)]
    assert len(held) == 1
    held[0].release()


def test_a_forked_process_does_not_give_the_lock_up_by_ending(tmp_path):
    held = RunLock.take(tmp_path)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    with held_by_nobody_else(tmp_path):
        held.release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}'])
def test_a_file_that_says_nothing_is_taken_over(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    RunLock.take(tmp_path).release()


def test_a_folder_that_was_made_for_the_lock_goes_with_it_while_it_is_empty(tmp_path):
    RunLock.take(tmp_path / "new").release()
    assert not (tmp_path / "new").exists()
    held = RunLock.take(tmp_path / "used")
    (tmp_path / "used" / "metrics.jsonl").write_text("")
    held.release()
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["metrics.jsonl"]


def test_a_folder_that_cannot_be_written_has_no_owner(tmp_path):
    """Who has to write there finds that out, and says it; a finished run is read without a lock."""
    (tmp_path / "file").write_text("")
    assert RunLock.take(tmp_path / "file") is None


def test_two_runs_whose_checkpoints_are_links_to_one_folder_are_kept_apart(tmp_path, only_rank):
    for name in ("shared", "a", "b"):
        (tmp_path / name).mkdir()
    for name in ("a", "b"):
        (tmp_path / name / "checkpoints").symlink_to(tmp_path / "shared")
    with held_elsewhere(tmp_path / "shared"):  # as the start of a does
        with pytest.raises(UserError, match="shared: is in use by process"), holding_folder(tmp_path / "b", only_rank):
            raise AssertionError("two runs write into one folder")
        assert not (tmp_path / "b" / LOCK).exists()
    with holding_folder(tmp_path / "b", only_rank):
        assert (tmp_path / "shared" / LOCK).exists()
    assert not (tmp_path / "shared" / LOCK).exists()
    (tmp_path / "shared").rename(tmp_path / "unmounted")
    with holding_folder(tmp_path / "b", only_rank):
        assert not (tmp_path / "shared").exists()
