"""The file ``metrics.jsonl`` of a run: one JSON object per optimizer step, each step once, in order."""

import codecs
import json
import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lcl_ds.files import sentence_of, write_whole

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
DAMAGED = "metrics.damaged"
"""Beside it: lines that were taken out because they are damaged, as they were found."""
NAMED = 3
"""How many damaged lines a warning names one by one."""


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

    def append(self, metrics: dict[str, Any]) -> None:
        """Write one step's metrics, or keep them for later where the disk takes nothing."""
        line = json.dumps(finite(metrics)).encode() + b"\n"
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


def finite(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics with null for what is not a finite number: JSON has no word for it."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}


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
    copies = [_read_lines(spare.read_bytes())[0] for spare in spares if spare.is_file()]
    found = {number: line for some in copies for number, line in some.items() if number <= step and number not in kept}
    if found:
        kept |= found
        logger.warning("%s: %s taken from the checkpoints", path, _steps(sorted(found)))
    if missing := sorted(set(range(1, step + 1)) - kept.keys()):
        logger.warning("%s: %s missing; the weights have them, the figures are lost", path, _steps(missing))
    after = b"".join(kept[number] for number in sorted(kept))
    if after != before:
        write_whole(path, after)


def _read_lines(content: bytes) -> tuple[dict[int, bytes], dict[int, tuple[bytes, str]]]:
    """Lines by their step, a later one in place of an earlier one, and damaged ones by number, with the reason."""
    lines: dict[int, bytes] = {}
    damaged: dict[int, tuple[bytes, str]] = {}
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        step = step_of(line)
        if isinstance(step, int):
            lines[step] = line.rstrip(b"\r") + b"\n"
        else:
            damaged[number] = line, step
    return lines, damaged


def step_of(line: bytes) -> int | str:
    """The step that a line is about; a reason where it is no line of metrics."""
    try:
        metrics = json.loads(line.decode())  # of bytes it would guess the encoding
    except (ValueError, RecursionError):
        return "has bytes that are zero" if b"\0" in line else "is not valid JSON"
    step = metrics.get("step") if isinstance(metrics, dict) else None
    if not isinstance(step, int) or isinstance(step, bool) or step < 1:
        return "names no step"
    return step


def _set_aside(path: Path, damaged: dict[int, tuple[bytes, str]]) -> None:
    named = [f"line {number} {reason}" for number, (_, reason) in damaged.items()]
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    aside = path.with_name(DAMAGED)
    logger.warning("%s: damaged: %s%s; moved to %s", path, ", ".join(named[:NAMED]), more, aside)
    with aside.open("ab") as file:
        file.writelines(line + b"\n" for line, _ in damaged.values())


def _steps(numbers: list[int]) -> str:
    """Sorted steps in words: ``steps 3 to 7, 9 are``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    shown = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in ranges)
    return f"step {shown} is" if len(numbers) == 1 else f"steps {shown} are"
