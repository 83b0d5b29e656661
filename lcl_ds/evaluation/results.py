"""Hold figures of an evaluation: as JSON and as a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from lcl_ds.evaluation.intervals import Interval

VERSION = 1
"""Of the JSON; grows when a key changes its meaning."""
IN_PERCENT = ("accuracy", "recall_at_")
"""Beginnings of the names of metrics that are fractions."""


@dataclass(frozen=True)
class Figure:
    """One number with what it was measured on."""

    task: str
    dataset: str
    metric: str
    value: float
    interval: Interval | None
    """95 % confidence."""
    count: int
    """Test samples."""
    features: str | None = None
    """Which features of the encoder were read; None where a task has no choice."""
    label: str | None = None
    """Which label was predicted, where images have several."""
    classes: int | None = None
    chance: float | None = None
    """What guessing gives: of a classification the fraction of the most frequent class."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else the figure depends on, such as the penalty that was chosen."""

    def row(self) -> dict[str, Any]:
        """Give the figure as plain values for JSON; what does not apply is left out."""
        values = asdict(self)
        low, high = values.pop("interval") or (None, None)
        values |= {"low": low, "high": high}
        return {key: value for key, value in values.items() if value is not None and value != {}}


@dataclass
class Results:
    """Everything one call of the command found."""

    model: dict[str, Any]
    data: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """A sentence about each figure that is missing, and about what was left out."""

    def tree(self) -> dict[str, Any]:
        """Give the results as plain values for JSON."""
        return {
            "version": VERSION,
            "model": self.model,
            "data": self.data,
            "figures": [figure.row() for figure in self.figures],
            "notes": self.notes,
        }


def shown(value: float | None, metric: str) -> str:
    """Write a value as people read it: fractions in percent."""
    if value is None:
        return ""
    return f"{100 * value:.1f}" if metric.startswith(IN_PERCENT) else f"{value:.4g}"


def table_of(figures: Sequence[Figure], title: str) -> Table:
    """Make a table of figures for the terminal."""
    table = Table(title=Text(title))
    for column in ("task", "label", "features", "metric"):
        table.add_column(column)
    for column in ("value", "95 % interval", "chance", "samples"):
        table.add_column(column, justify="right")
    for figure in figures:
        low, high = figure.interval or (None, None)
        interval = f"{shown(low, figure.metric)} to {shown(high, figure.metric)}" if figure.interval else ""
        unit = " %" if figure.metric.startswith(IN_PERCENT) else ""
        table.add_row(
            Text(figure.task + "".join(f" {k}={v}" for k, v in figure.settings.items() if k == "shots")),
            Text(figure.label or ""),
            Text(figure.features or ""),
            Text(figure.metric.replace("_", " ")),
            shown(figure.value, figure.metric) + unit,
            interval,
            shown(figure.chance, figure.metric),
            str(figure.count),
        )
    return table
