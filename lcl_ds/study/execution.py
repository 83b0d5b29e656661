"""Run what has no figures yet: train, measure, write the figures, remove the run folder."""

import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import FrameType
from typing import Any

from lcl_ds.config import recipe_path
from lcl_ds.errors import UserError
from lcl_ds.objectives import objective_module
from lcl_ds.study.jobs import AS_IT_STANDS, Job, Run, budget_name
from lcl_ds.study.record import Finished, code_now, find_same, fingerprint_of, make_record, write_record
from lcl_ds.study.settings import Encoder, Measurement, Study, arguments_of, config_of

logger = logging.getLogger(__name__)

ENCODER_OPTIONS: dict[Encoder, list[str]] = {"trained": [], "average": ["--ema"], "untrained": ["--untrained"]}
NEEDS_TEXT = ("zeroshot", "retrieval")
"""Tasks for objectives that train a similarity of images and texts."""


class Stopped(Exception):
    """Raised where a signal ended what a run was doing."""


@dataclass(frozen=True)
class Workplace:
    """Where a study runs and what becomes of it."""

    runs: Path
    results: Path
    jobs: int
    """Runs at a time; with several, each uses one core."""
    keep: bool
    """Whether run folders stay."""


class Programs:
    """The programs that run for a study now, and whether a signal has ended it."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._told: set[subprocess.Popen[bytes]] = set()
        self._lock = Lock()
        self.received: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block Ctrl-C and SIGTERM end the programs: a run saves a checkpoint and goes on next time."""
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for program in list(self._running):
            self._end(program)

    def _end(self, program: subprocess.Popen[bytes]) -> None:
        """Ask a program to end, once: a second signal would cost a run its checkpoint."""
        if program not in self._told:
            self._told.add(program)
            program.send_signal(signal.SIGTERM)

    def run(self, command: list[str], log: Path, one_core: bool) -> None:
        """Run Python with these arguments; what it prints is added to a file.

        Raises:
            Stopped: a signal ended it, or came before it began.
            UserError: it did not end well.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": "1"} if one_core else None
        with log.open("ab") as file:
            with self._lock:
                if self.received is not None:
                    raise Stopped
                # A session of its own: the terminal's Ctrl-C comes to it once, through us.
                program = subprocess.Popen(
                    [sys.executable, *command],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
                self._running.add(program)
                if self.received is not None:  # it came while the program was started
                    self._end(program)
            code = program.wait()
            self._running.discard(program)
        if self.received is not None:
            raise Stopped
        if code:
            last = log.read_text(errors="replace").strip().rpartition("\n")[2]
            raise UserError(f"{log}: {command[1]} ended with exit code {code}: {last}")


def run_folder(runs: Path, study: Study, job: Job) -> Path:
    """Say where a run trains. Its settings are in the name: a run of others goes on from no old checkpoint."""
    return runs / job.run.study / f"{job.run.name}-{fingerprint_of(study, job)[:8]}"


def training_command(study: Study, job: Job, run_dir: Path) -> list[str]:
    """Write the arguments of Python that train a run, or continue it."""
    program = ["-m", "lcl_ds.train"]
    if study.ranks > 1:
        program = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(study.ranks), *program]
    # The held-out documents are measured afterwards, by other tasks.
    only_the_last = {"checkpoint.keep": 1, "evaluation.shards": None}
    settings = arguments_of(job.run.overrides | job.sizes | only_the_last)
    recipe = ["--recipe", str(recipe_path(study.recipe)), "--run_dir", str(run_dir)]
    return [*program, "--ds_config", study.ds_config, *recipe, *settings]


def encoders_of(study: Study, run: Run) -> list[Encoder]:
    """List what is measured of a run: the first weights, which all variants share, of the first one alone."""
    first_budget = budget_name(study.budgets[0]) if study.budgets else AS_IT_STANDS
    is_first = run.variant == next(iter(study.all_variants())) and run.budget == first_budget
    return [encoder for encoder in study.encoders if is_first or encoder != "untrained"]


def measuring_commands(study: Study, path: Path, run: Run, run_dir: Path) -> Iterator[tuple[Encoder, Path, list[str]]]:
    """Yield what is measured, the file for its figures, and the arguments of Python that measure it."""
    config = config_of(study, path, run.variant)
    has_text = "contrastive_loss" in objective_module(config.objective.name).Objective.losses
    for encoder in encoders_of(study, run):
        for number, measurement in enumerate(study.measurements):
            tasks = [task for task in measurement.tasks if has_text or task not in NEEDS_TEXT]
            if not tasks:
                continue
            data = measurement.data or config.evaluation.shards
            out = run_dir / f"{encoder}-{number}.json"
            arguments = ["-m", "lcl_ds.evaluate", str(run_dir), "--task", *tasks, "--json", str(out)]
            arguments += ["--cache", str(run_dir / "features"), "--data", *_listed(data)]
            arguments += _options(measurement, measurement.labels or config.evaluation.probe_labels)
            yield encoder, out, [*arguments, *ENCODER_OPTIONS[encoder]]


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _options(measurement: Measurement, labels: list[str]) -> list[str]:
    options = ["--label", *labels] if labels and set(measurement.tasks) - {"retrieval", "caption"} else []
    for name in ("features", "prompts"):
        if values := getattr(measurement, name):
            options += [f"--{name}", *values]
    return options + (["--epochs", str(measurement.epochs)] if measurement.epochs else [])


def execute(study: Study, path: Path, job: Job, place: Workplace, programs: Programs) -> Path:
    """Train and measure one run, as far as that was not done before; another study may have made the same.

    Returns:
        Path of the figures.

    Raises:
        Stopped: a signal came; the next start goes on from here.
        UserError: a program failed.
    """
    if same := find_same(place.results, study, job, encoders_of(study, job.run)):
        return write_record(place.results, job.run, same)
    run_dir = run_folder(place.runs, study, job)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    log = run_dir.with_name(f"{run_dir.name}.log")
    one_core, code = place.jobs > 1, code_now()
    commands = [training_command(study, job, run_dir)]
    try:
        programs.run(commands[0], log, one_core)
    except UserError as error:
        raise UserError(f"{error}; remove {run_dir} to begin the run again") from None
    figures: dict[Encoder, list[dict[str, Any]]] = {}
    for encoder, out, command in measuring_commands(study, path, job.run, run_dir):
        if not out.exists():
            programs.run(command, log, one_core)
        commands.append(command)
        figures.setdefault(encoder, []).extend(json.loads(out.read_text())["figures"])
    lines = [shlex.join(["python", *command]) for command in commands]
    record = make_record(study, path, job, Finished(run_dir, code, figures, lines))
    written = write_record(place.results, job.run, record)
    if not place.keep:
        shutil.rmtree(run_dir)
        log.unlink()
    return written


def execute_all(study: Study, path: Path, jobs: list[Job], place: Workplace, programs: Programs) -> None:
    """Run several, ``place.jobs`` at a time; a run that fails does not keep the others from being run.

    Raises:
        Stopped: a signal came.
        UserError: a sentence about each run that failed.
    """
    problems: list[str] = []

    def run_one(number: int, job: Job) -> None:
        if programs.received is not None:
            raise Stopped
        logger.info("%s %s (%d of %d) begins", job.run.study, job.run.name, number, len(jobs))
        try:
            written = execute(study, path, job, place, programs)
        except UserError as error:
            problems.extend(error.problems)
            logger.error("%s", error)
            return
        logger.info("%s", written)

    with ThreadPoolExecutor(place.jobs) as pool:
        runs = [pool.submit(run_one, number, job) for number, job in enumerate(jobs, 1)]
        wait(runs)
    for run in runs:
        run.result()
    if problems:
        raise UserError(problems)
