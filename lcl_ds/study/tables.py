"""Sum up the runs of a study: mean and deviation over seeds, as a table on the terminal and in Markdown."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from lcl_ds.evaluation.results import shown
from lcl_ds.study.record import Record
from lcl_ds.study.settings import Study

UNTRAINED, GUESSING = "untrained", "guessing"


@dataclass
class Line:
    """One variant at one budget, or what it is compared with."""

    variant: str
    budget: str
    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Figures by name, one for each seed."""
    records: list[Record] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.variant}, {self.budget}" if self.budget else self.variant

    def mean(self, column: str) -> float | None:
        return float(np.mean(self.values[column])) if self.values.get(column) else None

    def deviation(self, column: str) -> float | None:
        """Return the sample standard deviation over seeds; None of fewer than two."""
        values = self.values.get(column, [])
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def spent(self, key: str) -> float | None:
        """Return the mean of a number of the runs."""
        return float(np.mean([record[key] for record in self.records])) if self.records else None


@dataclass(frozen=True)
class Summary:
    """All figures of a study that are there."""

    lines: list[Line]
    columns: list[str]
    metrics: dict[str, str]
    """Metric of each column."""
    missing: int
    """Runs that have no figures yet."""

    def text(self, line: Line, column: str) -> str:
        """Write a cell: mean and deviation."""
        mean, deviation = line.mean(column), line.deviation(column)
        text = shown(mean, self.metrics[column])
        return text if deviation is None else f"{text} ± {shown(deviation, self.metrics[column])}"


def column_of(figure: dict[str, Any]) -> str:
    """Name a figure: task/label/features/metric, without what does not apply and without ``accuracy``."""
    task = figure["task"].replace(" ", "_") + (f"_{figure['shots']}" if "shots" in figure else "")
    parts = [task, figure.get("label"), figure.get("features")]
    parts.append(None if figure["metric"] == "accuracy" else figure["metric"])
    return "/".join(part for part in parts if part)


def summary_of(study: Study, records: Sequence[Record], missing: int) -> Summary:
    """Gather the figures of a study's runs."""
    lines: dict[tuple[str, str], Line] = {}
    metrics: dict[str, str] = {}
    chances: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for encoder, figures in record["figures"].items():
            is_trained = encoder != "untrained"
            variant = record["variant"] if encoder == "trained" else f"{record['variant']}, average"
            key = (variant, record["budget"]) if is_trained else (UNTRAINED, "")
            line = lines.setdefault(key, Line(*key))
            if encoder == "trained":
                line.records.append(record)
            for figure in figures:
                column = column_of(figure)
                metrics[column] = figure["metric"]
                line.values[column].append(figure["value"])
                if "chance" in figure and column not in chances:
                    chances[column] = [figure["chance"]]
    columns = [name for pattern in study.columns for name in metrics if fnmatchcase(name, pattern)]
    last = [lines.pop((UNTRAINED, ""))] if (UNTRAINED, "") in lines else []
    guessing = [Line(GUESSING, "", chances)] if chances else []
    return Summary([*lines.values(), *last, *guessing], list(dict.fromkeys(columns)), metrics, missing)


def headers(columns: Sequence[str]) -> list[str]:
    return ["variant", "budget", "seeds", "images", "TFLOP", *columns]


def cells(summary: Summary, line: Line) -> list[str]:
    """Write a line of the table; fractions are in percent."""
    images, tflop = line.spent("images"), line.spent("tflop")
    return [
        line.variant,
        line.budget,
        str(len(line.records)) if line.records else "",
        f"{images:,.0f}" if images else "",
        f"{tflop:,.3g}" if tflop else "",
        *(summary.text(line, column) for column in summary.columns),
    ]


def table_of(study: Study, summary: Summary) -> Table:
    """Make the table for the terminal."""
    table = Table(title=Text(f"{study.title}: mean ± deviation over seeds, fractions in percent"))
    for number, header in enumerate(headers(summary.columns)):
        table.add_column(header.replace("/", "\n"), justify="left" if number < 2 else "right")
    for line in summary.lines:
        table.add_row(*map(Text, cells(summary, line)), style="" if line.records else "dim")
    return table


def markdown_of(summary: Summary) -> str:
    """Make the table for a page of documentation."""
    names = headers(summary.columns)
    rows = [names, ["---", "---", *["---:"] * (len(names) - 2)], *(cells(summary, line) for line in summary.lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
