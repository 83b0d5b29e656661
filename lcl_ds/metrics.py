"""The file ``metrics.jsonl`` of a run: one JSON object per optimizer step, each step once, in order."""

import codecs
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from lcl_ds.errors import UserError
from lcl_ds.files import sentence_of, write_whole

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
DAMAGED = "metrics.damaged"
"""File beside ``metrics.jsonl`` with the lines that were taken out because they are damaged, as they were."""
NAMED = 3
"""How many damaged lines a warning names one by one."""

Row = dict[str, Any]
"""A line as it is read: values by their keys, None for what was not finite. Runs of other versions may lack keys."""
LOSS_ENDING = "_loss"
"""How the names of an objective's losses end, and those of no other number: it tells a reader of the file."""
Whose = Literal["all ranks", "first rank", "GPU", "one rank"]
"""Whose value a key has: the sum over all ranks; that of the first rank; the first rank's where it has a GPU; that of
the rank that the line names."""
Combination = Literal["sum", "same"]
"""How a number that every rank has becomes one: their sum, or that of any of them because all have the same."""


def _of(whose: Whose, description: str) -> dict[str, str]:
    return {"whose": whose, "description": description}


@dataclass(frozen=True)
class SourceCounts:
    """What one step took from one source of data."""

    documents: int
    images: int


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What is recorded of one optimizer step. The fields are the keys of a line, in their order.

    ``losses`` and ``reports`` stand there under the names that the objective gives them.
    """

    step: int = field(metadata=_of("first rank", "Optimizer steps done, this one included."))
    losses: dict[str, float] = field(metadata=_of("all ranks", "The weighted total `loss`, then each loss unweighted."))
    reports: dict[str, float] = field(metadata=_of("all ranks", "Other numbers of the objective, combined as it says."))
    grad_norm: float = field(metadata=_of("first rank", "Global norm of the gradients before clipping."))
    lr: float = field(metadata=_of("first rank", "Learning rate of the step."))
    images: int = field(metadata=_of("all ranks", "Images seen."))
    image_tokens: int = field(metadata=_of("all ranks", "Image tokens of them: patches that the encoder saw."))
    documents: int = field(metadata=_of("all ranks", "Documents seen."))
    tokens: int = field(metadata=_of("all ranks", "Tokens that are not padding."))
    text_tokens: int = field(metadata=_of("all ranks", "Tokens that carry generation loss."))
    token_squares: int = field(
        metadata=_of("all ranks", "Sum over documents and paddings of the square of their tokens.")
    )
    padding_fraction: float = field(metadata=_of("first rank", "Fraction of the rows' tokens that is padding."))
    images_per_s: float = field(metadata=_of("first rank", "Images of all ranks per second."))
    tokens_per_s: float = field(metadata=_of("first rank", "Tokens of all ranks per second."))
    step_s: float = field(metadata=_of("first rank", "Seconds of the step."))
    data_s: float = field(metadata=_of("first rank", "Seconds of it for drawing rows; a GPU computes meanwhile."))
    skipped_samples: int = field(metadata=_of("all ranks", "Samples and images left out: damaged, or excluded."))
    sources: dict[str, SourceCounts] = field(metadata=_of("all ranks", "Documents and images of each source."))
    applied: bool = field(metadata=_of("first rank", "Whether the step changed the weights."))
    mfu: float | None = field(
        default=None, metadata=_of("GPU", "Model FLOPs utilisation: fraction of the GPU's bf16 peak.")
    )
    memory_gb: float | None = field(
        default=None,
        metadata=_of("first rank", "Most memory so far, in GiB: allocated on the GPU, or on a CPU resident."),
    )
    tflop: float | None = field(
        default=None, metadata=_of("first rank", "Operations that the step's gradient takes on all ranks, in 10^12.")
    )
    slowest_rank: int | None = field(
        default=None, metadata=_of("one rank", "The rank that was busy longest by itself; only of several ranks.")
    )
    slowest_rank_s: float | None = field(default=None, metadata=_of("one rank", "How long it was busy, in seconds."))
    median_rank_s: float | None = field(
        default=None, metadata=_of("one rank", "How long the rank in the middle was busy, in seconds.")
    )
    evaluation: dict[str, float | None] | None = field(
        default=None,
        metadata=_of("first rank", "Figures on held-out documents after the step, by name (`evaluation.every`)."),
    )
    evaluation_s: float | None = field(
        default=None, metadata=_of("first rank", "Seconds that the evaluation took, beyond those of the step.")
    )

    def row(self) -> Row:
        """List values by key, in order; what is not known is left out, as what only a GPU has where there is none."""
        row: Row = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in OF_THE_OBJECTIVE:
                row |= value
            elif entry.name == "sources":
                row["sources"] = {name: asdict(counts) for name, counts in value.items()}
            elif value is not None:
                row[entry.name] = value
        return row


OF_THE_OBJECTIVE = ("losses", "reports")
"""Fields whose values stand in a line under names of their own."""
KEYS = {entry.name: entry.metadata["whose"] for entry in fields(StepMetrics) if entry.name not in OF_THE_OBJECTIVE}
"""Keys of every objective's lines, and whose value each is."""
RESERVED = {*KEYS, "loss"}


def check_names(losses: Iterable[str], reports: Mapping[str, Combination]) -> None:
    """Refuse names of an objective's numbers that a reader of the file would take for something else.

    Raises:
        ValueError: the name is another key's, or does not say whether it is a loss.
    """
    for name in losses:
        if not name.endswith(LOSS_ENDING):
            raise ValueError(f"{name}: the name of a loss must end in {LOSS_ENDING}")
    for name in reports:
        if name in RESERVED or name.endswith(LOSS_ENDING):
            raise ValueError(f"{name}: the name of a loss or of another metric")


def loss_names(row: Row) -> list[str]:
    """List the keys of a line that hold losses, without their weighted total."""
    return [key for key in row if key.endswith(LOSS_ENDING)]


def report_names(row: Row) -> list[str]:
    """List the keys of a line that hold other numbers of its objective."""
    own = [key for key in row if key not in RESERVED and not key.endswith(LOSS_ENDING)]
    return [key for key in own if row[key] is None or isinstance(row[key], (int, float))]


def read_metrics(run_dir: Path) -> list[Row]:
    """Read the lines of a run's ``metrics.jsonl``, one per optimizer step; a last line that was cut off is left out.

    Raises:
        UserError: the file is missing, or a line before the last is damaged.
    """
    path = run_dir / METRICS
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a run folder in which training has begun")
    rows: list[Row] = []
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    for number, line in enumerate(lines, 1):
        row = parse_line(line)
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise UserError(f"{path}: line {number} {row}; repair or remove it")
    return rows


class MetricsFile:
    """Appends one line per step; a disk that is full for a while costs nothing but a warning.

    Lines that could not be written are kept in memory and written with a later one.
    """

    def __init__(self, path: Path):
        self.path = path
        self.since_saved: list[bytes] = []
        """Lines since the last :meth:`flush_to_disk`: what a checkpoint keeps a copy of."""
        self._file = path.open("ab", buffering=0)
        self._good_bytes = os.fstat(self._file.fileno()).st_size
        self._waiting: list[bytes] = []
        self._warned = False

    def append(self, row: Row) -> None:
        """Write one step's metrics, or keep them for later where the disk takes nothing."""
        line = json.dumps(finite(row)).encode() + b"\n"
        self.since_saved.append(line)
        self._waiting.append(line)
        self._write()

    def flush_to_disk(self) -> None:
        """Make what is written outlive the machine, as a checkpoint does."""
        self._write()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._warn(error)
        self.since_saved = []

    def close(self) -> None:
        """Write what is left and name what cannot be written."""
        self._write()
        if self._waiting:
            logger.warning("%s: the last %d lines could not be written", self.path, len(self._waiting))
        try:
            self._file.close()
        except OSError as error:  # network disks report a failed write only here
            self._warn(error)

    def _write(self) -> None:
        data = memoryview(b"".join(self._waiting))
        if not data:
            return
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as error:
            self._warn(error)
            self._cut_to_whole_lines()
            return
        self._good_bytes += len(data)
        self._waiting = []

    def _cut_to_whole_lines(self) -> None:
        try:
            os.ftruncate(self._file.fileno(), self._good_bytes)
        except OSError as error:  # a torn line is taken out when the run is continued
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            reason = sentence_of(error) or str(error)
            logger.warning("%s: cannot be written: %s; training goes on, lines are kept for later", self.path, reason)


def finite(row: Row) -> Row:
    """Return the same with None for what is not a finite number: JSON has no word for it."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def keep_metrics(path: Path, step: int, spares: Iterable[Path] = ()) -> None:
    """Leave the lines of the steps up to ``step``, each once: a continued run writes the later ones again.

    Damaged lines are named and moved to ``metrics.damaged``; steps that are then missing are taken from ``spares``, and
    named where they are not there either.

    Args:
        spares: the lines that checkpoints keep, each those since the checkpoint before it.
    """
    before = path.read_bytes() if path.exists() else b""
    lines, damaged = _read_lines(before)
    kept = {number: line for number, line in lines.items() if number <= step}
    if damaged:
        _set_aside(path, damaged)
    copies = [_read_lines(copy.read_bytes())[0] for copy in spares if copy.is_file()]
    spare = {number: line for some in copies for number, line in some.items() if number <= step and number not in kept}
    if spare:
        kept |= spare
        logger.warning("%s: %s taken from the checkpoints", path, _steps(sorted(spare)))
    if missing := sorted(set(range(1, step + 1)) - kept.keys()):
        logger.warning("%s: %s missing; the weights have them, the figures are lost", path, _steps(missing))
    after = b"".join(kept[number] for number in sorted(kept))
    if after != before:
        write_whole(path, after)


def _read_lines(content: bytes) -> tuple[dict[int, bytes], dict[int, tuple[bytes, str]]]:
    """Read lines by their step, a later one instead of an earlier one, and damaged ones by number, with the reason."""
    lines: dict[int, bytes] = {}
    damaged: dict[int, tuple[bytes, str]] = {}
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        row = parse_line(line)
        if isinstance(row, dict):
            lines[row["step"]] = line.rstrip(b"\r") + b"\n"
        else:
            damaged[number] = line, row
    return lines, damaged


def parse_line(line: bytes) -> Row | str:
    """Read the metrics of a line; a reason where it holds none."""
    try:
        row = json.loads(line.decode())  # of bytes it would guess the encoding
    except (ValueError, RecursionError):
        return "has bytes that are zero" if b"\0" in line else "is not valid JSON"
    step = row.get("step") if isinstance(row, dict) else None
    if not isinstance(step, int) or isinstance(step, bool) or step < 1:
        return "names no step"
    return row


def _set_aside(path: Path, damaged: dict[int, tuple[bytes, str]]) -> None:
    named = [f"line {number} {reason}" for number, (_, reason) in damaged.items()]
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    aside = path.with_name(DAMAGED)
    logger.warning("%s: damaged: %s%s; moved to %s", path, ", ".join(named[:NAMED]), more, aside)
    with aside.open("ab") as file:
        file.writelines(line + b"\n" for line, _ in damaged.values())


def _steps(numbers: list[int]) -> str:
    """Write sorted steps in words: ``steps 3 to 7, 9 are``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    shown = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in ranges)
    return f"step {shown} is" if len(numbers) == 1 else f"steps {shown} are"
