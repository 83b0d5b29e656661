"""Send random signals to real runs at random moments: ``python -m tests.chaos.signals [--trials 30] [--seed 0]``.

Every trial continues the run of the one before it, so that in the end each step was taken once or something is wrong.
Prints a table with what was sent, to whom and when, and how long it took until every process was gone.
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lcl_ds.training.signals import SIGNALS
from tests.support.ranks import ROOT, free_port, train_command
from tests.support.runs import metrics_of, without_timing
from tests.system.conftest import make_recipe

LAUNCHERS = {
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--master_port", "{port}"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "{port}"],
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--main_process_port", "{port}"),
    ],
    "python": [],
}
PHASES = ("start-up", "accumulation", "save", "last step", "evaluation")
TARGETS = ("all", "launcher", "one rank")
ALIVE_S = 240.0
"""A trial that takes longer has failed."""
STEPS, EVERY = 6, 3
"""Steps of one start, and between checkpoints."""
OVERRIDES = ("train.accumulation_steps=8", "train.global_batch_rows=16", f"checkpoint.every={EVERY}")
CONSTANT_RATE = ("train.warmup_steps=0", "train.learning_rate=1e-3", "train.min_learning_rate=1e-3")
"""The schedule must not depend on the number of steps, which each trial extends."""


@dataclass
class Outcome:
    """What became of one trial."""

    launcher: str
    phase: str
    number: int
    target: str
    at_step: int
    saved: int
    code: int
    seconds: float
    problem: str


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launchers", nargs="+", default=list(LAUNCHERS), choices=LAUNCHERS)
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    arguments = parser.parse_args(argv)
    draw = random.Random(arguments.seed)
    folder = Path(tempfile.mkdtemp(prefix="signals-"))
    make_recipe(folder)
    numbers = itertools.cycle(draw.sample(SIGNALS, len(SIGNALS)))
    combinations = [(launcher, phase) for launcher in arguments.launchers for phase in arguments.phases]
    chosen = (draw.sample(combinations, len(combinations)) for _ in itertools.count())
    outcomes = []
    for launcher, phase in itertools.islice(itertools.chain.from_iterable(chosen), arguments.trials):
        target = draw.choice(TARGETS) if launcher != "python" else "all"
        outcomes.append(trial(folder, launcher, phase, next(numbers), target, draw))
        Console(stderr=True).print(outcomes[-1])
    Console(width=140).print(table_of(outcomes))
    problems = [outcome.problem for outcome in outcomes if outcome.problem]
    for ranks in sorted({1 if outcome.launcher == "python" else 2 for outcome in outcomes}):
        problems += compare_with_whole(folder, ranks)
    print(
        f"{len(outcomes)} signals, slowest end after {max(o.seconds for o in outcomes):.1f} s, {problems or 'no fault'}"
    )
    if not problems:
        shutil.rmtree(folder)
    return 1 if problems else 0


def trial(folder: Path, launcher: str, phase: str, number: signal.Signals, target: str, draw: random.Random) -> Outcome:
    """Continue a run, send a signal in a phase of it and wait until all its processes are gone."""
    run_dir = folder / ("one" if launcher == "python" else "two")
    log = folder / f"{launcher} {phase} {time.monotonic_ns()}.log"
    done = len(metrics_of(run_dir))
    steps = done + STEPS
    process = start(folder, launcher, run_dir, steps, log)
    wait_for(phase, run_dir, done, steps, draw, process)
    pids = sorted(ranks_of(run_dir))
    at_step = len(metrics_of(run_dir))
    sent = time.monotonic()
    if process.poll() is None:
        receivers = {
            "all": list(processes_of(run_dir)),
            "launcher": [process.pid],
            "one rank": pids[:1] or [process.pid],
        }
        for pid in receivers[target]:
            send(pid, number)
    while processes_of(run_dir) and time.monotonic() - sent < ALIVE_S:
        process.poll()
        time.sleep(0.05)
    seconds = time.monotonic() - sent
    problem = ""
    if left := processes_of(run_dir):
        problem = f"{len(left)} processes were left"
        for pid in left:
            send(pid, signal.SIGKILL)
    code = process.wait()
    saved, trained, text = saved_step(run_dir), len(metrics_of(run_dir)), log.read_text()
    if trained > max(saved, done) and not problem:
        problem = f"step {trained} was trained, step {saved} is saved"
    if any("/lcl_ds/" in part for part in text.split("Traceback (most recent call last)")[1:]):
        problem = problem or "a traceback of ours"
    if problem:
        problem += f": {log}"
    return Outcome(launcher, phase, number, target, at_step, saved, code, seconds, problem)


def start(folder: Path, launcher: str, run_dir: Path, steps: int, log: Path) -> subprocess.Popen:
    """Start the run in a session of its own."""
    program = train_command(folder / "small.yaml", run_dir, *OVERRIDES, *CONSTANT_RATE, f"train.steps={steps}")[1:]
    port = free_port()
    command = [sys.executable, *(word.format(port=port) for word in LAUNCHERS[launcher]), *program]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "LOCAL_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    with log.open("w") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | {"CUDA_VISIBLE_DEVICES": ""},
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )


def wait_for(phase: str, run_dir: Path, done: int, steps: int, draw: random.Random, process: subprocess.Popen) -> None:
    """Wait until a run is in a phase, and for a moment in it."""
    checkpoints = run_dir / "checkpoints"

    def is_there() -> bool:
        match phase:
            case "start-up":
                return bool(processes_of(run_dir))
            case "accumulation":
                return len(metrics_of(run_dir)) > done
            case "save":
                return any(checkpoints.glob(".partial_*"))
            case "last step":
                return len(metrics_of(run_dir)) >= steps - 1
            case _:
                return (checkpoints / f"step_{steps:08d}").exists()

    deadline = time.monotonic() + ALIVE_S
    while not is_there() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(
        draw.random() * {"start-up": 15, "accumulation": 2, "save": 0.05, "last step": 0.6, "evaluation": 3}[phase]
    )


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def processes_of(run_dir: Path) -> dict[int, list[str]]:
    """Find the living processes of a run, with their command lines: ranks, their loaders and launchers."""
    alive = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        if str(run_dir) in words:
            alive[int(path.parent.name)] = words
    return alive


def ranks_of(run_dir: Path) -> list[int]:
    """List those that train."""
    return [pid for pid, words in processes_of(run_dir).items() if "launch/train.py" in words[1:3]]


def saved_step(run_dir: Path) -> int:
    steps = sorted((run_dir / "checkpoints").glob("step_*"))
    return int(steps[-1].name.removeprefix("step_")) if steps else 0


def compare_with_whole(folder: Path, ranks: int) -> list[str]:
    """Finish the run that was stopped so often and compare it with one that was not."""
    launcher, stopped = ("python", folder / "one") if ranks == 1 else ("torchrun", folder / "two")
    steps = len(metrics_of(stopped)) + 1
    for run_dir in (stopped, folder / f"whole {ranks}"):
        log = folder / f"{run_dir.name}.log"
        if start(folder, launcher, run_dir, steps, log).wait():
            return [f"did not go on to the end: {log}"]
    runs = [without_timing(metrics_of(run_dir)) for run_dir in (stopped, folder / f"whole {ranks}")]
    return [] if runs[0] == runs[1] else [f"{stopped} differs from an uninterrupted run"]


def table_of(outcomes: list[Outcome]) -> Table:
    table = Table("launcher", "phase", "signal", "to", "at step", "saved step", "code", "seconds", "fault")
    for outcome in outcomes:
        name = signal.Signals(outcome.number).name
        cells = [outcome.at_step, outcome.saved, outcome.code, f"{outcome.seconds:.1f}", outcome.problem]
        table.add_row(outcome.launcher, outcome.phase, name, outcome.target, *map(str, cells))
    return table


if __name__ == "__main__":
    sys.exit(main())
