"""Read what a run wrote down about itself, for the card of what is released from it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcl_ds.errors import UserError
from lcl_ds.files import read_json
from lcl_ds.metrics import Row, read_metrics
from lcl_ds.training.run_folder import ENVIRONMENT, HISTORY

EVALUATION = "evaluation.json"
"""The file of figures in a run; :mod:`lcl_ds.report.run`, which shows them, would bring matplotlib along."""
OF_FIGURES = ("value", "low", "high", "chance")
"""Numbers of a figure."""
NO_FIGURES = "The run has no final evaluation of these weights."


@dataclass(frozen=True)
class RunRecord:
    """What is known about the training of some weights; None where nobody wrote it down."""

    step: int | None = None
    images: int | None = None
    """Images seen, each as often as it was drawn."""
    tokens: int | None = None
    """Tokens seen that are not padding."""
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    """Documents and images by the name of their source."""
    hours: float | None = None
    """Time of all steps."""
    hardware: str | None = None
    commit: str | None = None
    """Of the code that trained, at the last start."""
    figures: list[dict[str, Any]] = field(default_factory=list)
    """Rows of :class:`lcl_ds.evaluation.results.Figure`, of these very weights."""
    no_figures: str = NO_FIGURES
    """A sentence that says why there are none."""


def read_record(checkpoint: Path, step: int, ema: bool = False) -> RunRecord:
    """Read the files of the run that a checkpoint lies in; what is missing or damaged there stays unknown.

    Args:
        step: of the checkpoint; later ones have not trained these weights.
        ema: the weights are the moving average, which the figures of ``evaluation.json`` are not about.
    """
    run_dir = checkpoint.resolve().parent.parent
    rows = _rows_up_to(run_dir, step)
    starts = [_mapping(path) for path in sorted(run_dir.glob(f"{HISTORY}/*/{ENVIRONMENT}"))]
    starts = starts or [_mapping(run_dir / ENVIRONMENT)]
    if ema:
        figures, reason = [], "The figures of the run are those of its weights, not of their moving average."
    else:
        figures, reason = _figures(run_dir, step), NO_FIGURES
    return RunRecord(
        step=step,
        images=_sum(rows, "images"),
        tokens=_sum(rows, "tokens"),
        sources=_sources(rows),
        hours=None if (seconds := _sum(rows, "step_s")) is None else seconds / 3600,
        hardware=", then ".join(dict.fromkeys(filter(None, map(_hardware, starts)))) or None,
        commit=_text(starts[-1].get("git_commit")),
        figures=figures,
        no_figures=reason,
    )


def _rows_up_to(run_dir: Path, step: int) -> list[Row]:
    """Read the lines of the steps up to ``step``; none where one of them is missing, since sums would be too small."""
    try:
        rows = [row for row in read_metrics(run_dir) if row["step"] <= step]
    except (UserError, OSError):
        return []
    return rows if len({row["step"] for row in rows}) == len(rows) == step else []


def _sum(rows: list[Row], key: str) -> Any:
    values = [row.get(key) for row in rows]
    numbers = [value for value in values if isinstance(value, (int, float))]
    return sum(numbers) if numbers and len(numbers) == len(values) else None


def _sources(rows: list[Row]) -> dict[str, dict[str, int]]:
    totals: dict[str, dict[str, int]] = {}
    try:
        for row in rows:
            for name, counts in row["sources"].items():
                total = totals.setdefault(name, {"documents": 0, "images": 0})
                for kind in total:
                    total[kind] += counts[kind]
    except (AttributeError, KeyError, TypeError):  # another version wrote the lines, or somebody by hand
        return {}
    return totals


def _hardware(environment: dict[str, Any]) -> str | None:
    ranks = environment.get("world_size")
    if not isinstance(ranks, int):
        return None
    device = _text(environment.get("gpu")) or "CPU"
    return f"{ranks} x {device}" if device != "CPU" else f"{ranks} {'process' if ranks == 1 else 'processes'} on a CPU"


def _figures(run_dir: Path, step: int) -> list[dict[str, Any]]:
    results = _mapping(run_dir / EVALUATION)
    if results.get("step") != step or "failed" in results:
        return []
    figures = results.get("figures")
    return [row for row in figures if _is_figure(row)] if isinstance(figures, list) else []


def _is_figure(row: Any) -> bool:
    if not isinstance(row, dict) or "value" not in row or not _text(row.get("metric")):
        return False
    return all(isinstance(row[key], (int, float)) for key in OF_FIGURES if key in row)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _mapping(path: Path) -> dict[str, Any]:
    try:
        tree = read_json(path)
    except UserError:
        return {}
    return tree if isinstance(tree, dict) else {}
