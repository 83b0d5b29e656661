"""Name steps that are out of the ordinary, with their documents, and skip them or take them back.

A step whose gradients are not finite is always skipped. Of one that :mod:`lcl_ds.training.spikes` finds,
``train.on_spike`` says what becomes of it. Each is a line of ``skipped_steps.jsonl`` in the run folder. A line that has
``rolled_back_to`` is also what makes the run pass over its ``rows`` from then on: it is on the disk before anything is
taken back, so a run that is killed in between goes on in the same way.
"""

import json
import logging
import math
import os
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lcl_ds.data.stream.skips import is_power_of_ten
from lcl_ds.errors import UserError
from lcl_ds.files import naming, sentence_of
from lcl_ds.metrics import StepMetrics, finite
from lcl_ds.training.checkpoint import Progress
from lcl_ds.training.distributed import RankInfo, gather_objects, on_all_ranks
from lcl_ds.training.settings import TrainSettings
from lcl_ds.training.spikes import Spike, find_spike, norm_limit, remember

logger = logging.getLogger(__name__)

SKIPPED_STEPS = "skipped_steps.jsonl"
NOT_FINITE = "gradients are not finite"


@dataclass(frozen=True)
class DrawnRows:
    """What a step reads of the stream."""

    first: int
    end: int
    """Rows of all ranks, ``first .. end - 1``."""
    documents: tuple[str, ...] = ()
    """Of this rank."""

    def meets(self, other: "DrawnRows") -> bool:
        """Say whether they share a row."""
        return self.first < other.end and other.first < self.end


@dataclass(frozen=True)
class Record:
    """A line of ``skipped_steps.jsonl``."""

    step: int
    reason: str
    applied: bool
    """Whether the weights changed; a step that was taken back changed them for a while."""
    rolled_back_to: int | None
    """Step of the checkpoint that the run went back to; its ``rows`` are passed over since."""
    loss: float
    grad_norm: float
    rows: tuple[int, int]
    """First row in the stream of all ranks, and the one after the last."""
    documents: list[str]
    """``source/shard/key`` of each, over all ranks."""


class OddSteps:
    """Judges one step after another; every rank calls the same at the same steps.

    Args:
        progress: of the run; what is usual is remembered there.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: TrainSettings,
        progress: Progress,
        rank_info: RankInfo,
    ):
        self.path, self.settings = run_dir / SKIPPED_STEPS, settings
        self.progress, self.rank_info = progress, rank_info
        self._drawn: deque[DrawnRows] = deque(maxlen=2)
        self._spikes_in_a_row = 0
        """Applied ones."""
        lines: list[Any] = []
        with on_all_ranks(rank_info):
            if rank_info.is_first:
                lines = read_rollbacks(self.path)
        self._rollbacks: list[dict[str, Any]] = gather_objects(lines)[0]

    def passes_over(self, first: int, end: int) -> bool:
        """Say whether rows ``first .. end - 1`` hold some that a step was taken back for."""
        rows = DrawnRows(first, end)
        passed_over = any(rows.meets(DrawnRows(*line["rows"])) for line in self._rollbacks)
        if passed_over and self.rank_info.is_first:
            logger.info("rows %d to %d are passed over: a step with rows of theirs was taken back", first, end - 1)
        return passed_over

    def begin(self, drawn: DrawnRows) -> float:
        """Take down what the next step reads; returns the gradient norm above which it is to be left out."""
        self._drawn.append(drawn)
        skips = self.settings.on_spike == "skip"
        return norm_limit(self.progress.recent, self.settings.spike_factor) if skips else math.inf

    def judge(self, metrics: StepMetrics, last_saved: int) -> bool:
        """Name a step that is out of the ordinary, and remember one that is not.

        Args:
            metrics: of the step for which :meth:`begin` was called last.
            last_saved: step of the newest checkpoint, 0 without one.

        Returns:
            Whether the run is to go on from there.

        Raises:
            UserError: on all ranks: it went back there too often.
        """
        loss, norm, recent = metrics.losses["loss"], metrics.grad_norm, self.progress.recent
        spike = find_spike(recent, self.settings.spike_factor, loss, norm) if math.isfinite(norm) else None
        if metrics.applied:
            remember(recent, loss, norm)
            self._spikes_in_a_row = self._spikes_in_a_row + 1 if spike else 0
        if spike is None:
            if not metrics.applied:
                self._record(metrics, NOT_FINITE, [self._drawn[-1]])
            return False
        if self.settings.on_spike == "rollback":
            self._take_back(metrics, spike, last_saved)
            return True
        # When everything changes, as with other data, what is usual follows within some dozens of steps.
        if not metrics.applied or is_power_of_ten(self._spikes_in_a_row):
            self._record(metrics, str(spike), [self._drawn[-1]])
        return False

    def _take_back(self, metrics: StepMetrics, spike: Spike, last_saved: int) -> None:
        drawn = [self._drawn[-1]]
        if spike.name == "loss" and metrics.step - 1 > last_saved:
            drawn = list(self._drawn)  # a loss rises by its own documents, or by the update before it
        times = sum(line["rolled_back_to"] == last_saved for line in self._rollbacks)
        if times < self.settings.max_rollbacks:
            self._record(metrics, str(spike), drawn, last_saved)
            return
        self._record(metrics, str(spike), drawn)
        raise UserError(
            f"step {metrics.step}: {spike}; the run went back to step {last_saved} {times} times already "
            f"(train.max_rollbacks); {self.path} names the documents; lower train.learning_rate, or choose another "
            "train.on_spike, and start again, which continues from there"
        )

    def _record(
        self, metrics: StepMetrics, reason: str, drawn: list[DrawnRows], rolled_back_to: int | None = None
    ) -> None:
        """Write a step down with the documents of all ranks; collective."""
        documents = gather_objects([key for rows in drawn for key in rows.documents])
        record = Record(
            step=metrics.step,
            reason=reason,
            applied=metrics.applied,
            rolled_back_to=rolled_back_to,
            loss=metrics.losses["loss"],
            grad_norm=metrics.grad_norm,
            rows=(drawn[0].first, drawn[-1].end),
            documents=[key for of_rank in documents for key in of_rank],
        )
        with on_all_ranks(self.rank_info):
            if self.rank_info.is_first:
                logger.warning("step %d: %s; %s; its documents: %s", record.step, reason, fate(record), self.path)
                write_record(self.path, record)


def fate(record: Record) -> str:
    """Say what became of a step."""
    if record.rolled_back_to is not None:
        first, end = record.rows
        return f"going back to step {record.rolled_back_to}; rows {first} to {end - 1} are passed over from now on"
    if record.applied:
        return "the update was made"
    return "skipped on all ranks"


def write_record(path: Path, record: Record) -> None:
    """Append a line; a disk that takes none is an error only where the run cannot go on without it.

    Raises:
        OSError: a step that is to be taken back could not be written down.
    """
    line = json.dumps(finite(asdict(record))).encode() + b"\n"
    try:
        with naming(path), path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a line that was cut off by the end of an earlier start
                    line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if record.rolled_back_to is not None:
            raise
        logger.warning("%s: cannot be written: %s", path, sentence_of(error) or error)


def read_rollbacks(path: Path) -> list[dict[str, Any]]:
    """Read ``rows`` and ``rolled_back_to`` of the steps that were taken back; what is no record is passed over.

    Raises:
        OSError: the file is there and cannot be read.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [line for line in map(_rollback_of, lines) if line is not None]


def _rollback_of(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    step = record.get("rolled_back_to") if isinstance(record, dict) else None
    rows = record.get("rows") if isinstance(record, dict) else None
    are_rows = isinstance(rows, list) and len(rows) == 2 and all(isinstance(row, int) for row in rows)
    return {"rows": rows, "rolled_back_to": step} if isinstance(step, int) and are_rows else None
