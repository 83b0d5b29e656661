"""Compare a plan with what a finished run has recorded."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcl_ds.errors import UserError
from lcl_ds.metrics import Row, read_metrics
from lcl_ds.plan.planner import Plan

FIRST_STEPS = 10
"""Left out of the medians: a run warms up."""


@dataclass(frozen=True)
class Compared:
    """One figure as planned and as recorded."""

    name: str
    unit: str
    planned: float
    recorded: float

    @property
    def off(self) -> float:
        return self.planned / self.recorded - 1 if self.recorded else float("inf")


def compare(plan: Plan, run_dir: Path, has_gpus: bool) -> list[Compared]:
    """List what plan and run both know; a run on CPUs has neither the time nor the memory of a GPU.

    Raises:
        UserError: the folder holds no step of a run.
    """
    rows = read_metrics(run_dir)
    if not rows:
        raise UserError(f"{run_dir}: holds no complete step yet")
    work = plan.work
    planned: list[tuple[str, str, float, str]] = [
        ("operations of a step", "TFLOP", sum(part.model for part in plan.flops.values()) / 1e12, "tflop"),
        ("images of a step", "", work.images, "images"),
        ("labels of a step", "", work.labels, "text_tokens"),
        ("token squares of a step", "", work.squares, "token_squares"),
    ]
    if has_gpus:
        planned += [
            ("seconds of a step", "s", plan.time.total, "step_s"),
            ("images a second", "", plan.images_per_s, "images_per_s"),
            ("MFU", "%", 100 * plan.mfu, "mfu"),
            ("memory allocated", "GiB", plan.memory.allocated / 2**30, "memory_gb"),
        ]
    scale = {"mfu": 100.0}
    compared = []
    for name, unit, value, key in planned:
        recorded = _median(rows, key)
        if recorded is not None:
            compared.append(Compared(name, unit, value, scale.get(key, 1.0) * recorded))
    return compared


def ran_on_gpus(run_dir: Path) -> bool:
    """Say whether a run was on GPUs: only then it records a utilisation."""
    return any(row.get("mfu") is not None for row in read_metrics(run_dir))


def _median(rows: list[Row], key: str) -> float | None:
    settled = rows[FIRST_STEPS:] if len(rows) > 2 * FIRST_STEPS else rows
    values: list[Any] = [row[key] for row in settled if row.get(key) is not None]
    return statistics.median(values) if values else None
