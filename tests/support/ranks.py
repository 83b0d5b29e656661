"""Start real ranks as processes of their own and collect what they return."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.support.rank_tasks.run import run_tasks

ROOT = Path(__file__).resolve().parents[2]
GIVES_MEMORY_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment in which freed memory leaves a process at once, so that its highest is what was in use."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


class Ranks:
    """Processes that run one command each, with the environment of a launcher."""

    def __init__(self, world_size: int, command: list[str], log: Path):
        port = free_port()
        self.logs = [log.with_name(f"{log.name}.rank{rank}") for rank in range(world_size)]
        self.processes = [
            subprocess.Popen(
                command,
                env=rank_environment(rank, world_size, port),
                cwd=ROOT,
                stdout=file.open("w"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for rank, file in enumerate(self.logs)
        ]

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes; kills what has not ended in time."""
        deadline = time.monotonic() + timeout
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"ranks did not end within {timeout} s:\n{self.output()}") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to every rank that still runs and to its children."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def output(self) -> str:
        return output_of(self.logs)


def output_of(logs: list[Path]) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs if log.exists())


def run_ranks(world_size: int, command: list[str], log: Path, timeout: float = 120) -> str:
    """Output of ranks that must all end well."""
    ranks = Ranks(world_size, command, log)
    codes = ranks.wait(timeout)
    assert codes == [0] * world_size, ranks.output()
    return ranks.output()


def on_ranks(world_size: int, function: str, folder: Path, timeout: float = 120) -> list[Any]:
    """What the task of this name in ``tests.support.rank_tasks`` returns on each rank."""
    return all_on_ranks(world_size, [function], folder, timeout)[function]


def all_on_ranks(world_size: int, functions: list[str], folder: Path, timeout: float = 120) -> dict[str, list[Any]]:
    """The same for several functions, one after the other: a start costs more than most of them."""
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"log.rank{rank}" for rank in range(world_size)]
    forked = forked_ranks(functions, folder, logs)
    deadline = time.monotonic() + timeout
    for process in forked:
        process.join(max(0.1, deadline - time.monotonic()))
    for process in forked:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
    assert all(process.exitcode == 0 for process in forked), output_of(logs)
    return {
        name: [torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in range(world_size)]
        for name in functions
    }


def forked_ranks(functions: list[str], folder: Path, logs: list[Path]) -> list[BaseProcess]:
    """Fork a rank for each log from a process that has imported everything, which takes longer than most tasks."""
    server, port = multiprocessing.get_context("forkserver"), free_port()
    server.set_forkserver_preload([run_tasks.__module__])
    forked: list[BaseProcess] = []
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):  # the server reads it once, when it imports torch
        for rank, log in enumerate(logs):
            environment = rank_environment(rank, len(logs), port)
            forked.append(server.Process(target=run_tasks, args=(environment, log, folder, functions)))
            forked[-1].start()
    return forked


def train_command(recipe: Path, run_dir: Path, *overrides: str, ds_config: str = "zero3") -> list[str]:
    """``launch/train.py`` on a recipe file."""
    arguments = ["--ds_config", f"ds_configs/{ds_config}.json", "--recipe", str(recipe), "--run_dir", str(run_dir)]
    return [sys.executable, "launch/train.py", *arguments, *overrides]
