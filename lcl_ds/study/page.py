"""One page about studies: questions, figures with error bars, learning curves, and what was run."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lcl_ds.evaluation.results import IN_PERCENT
from lcl_ds.report.bars import Bar, Bars
from lcl_ds.report.charts import NUMBER, Chart, Series, chart
from lcl_ds.report.facts import readable
from lcl_ds.report.html import render
from lcl_ds.report.numbers import plural
from lcl_ds.study.record import Record
from lcl_ds.study.settings import Study
from lcl_ds.study.tables import GUESSING, Line, Summary, markdown_of, summary_of

PERCENT_SIGN = "\N{NO-BREAK SPACE}%"


@dataclass(frozen=True)
class Section:
    """What the page shows of one study."""

    name: str
    title: str
    question: str
    notes: list[str]
    facts: dict[str, str]
    groups: list[tuple[str, list[Bars]]]
    """Figures by budget."""
    curves: list[tuple[str, list[Chart]]]
    """Losses by budget."""
    markdown: str
    source: str
    """The study's file."""
    commands: list[str]
    """Of the first run."""


def study_page(studies: list[tuple[Path, Study, list[Record], int]]) -> str:
    """Make the page; of each study its file, settings, the runs that are there and how many are missing."""
    sections = [section_of(*one) for one in studies]
    title = sections[0].title if len(sections) == 1 else f"{len(sections)} studies"
    return render("study.html", title=title, sections=sections)


def section_of(path: Path, study: Study, records: list[Record], missing: int) -> Section:
    """Gather what is shown of a study."""
    summary = summary_of(study, records, missing)
    budgets = list(dict.fromkeys(line.budget for line in summary.lines if line.budget))
    return Section(
        name=path.stem,
        title=study.title,
        question=study.question,
        notes=study.notes,
        facts=_facts(study, records, missing),
        groups=[(_title(study, budget), _bars(summary, budget)) for budget in budgets],
        curves=[(_title(study, budget), _curves(records, budget)) for budget in budgets],
        markdown=markdown_of(summary),
        source=path.read_text(encoding="utf-8"),
        commands=[shlex.join(shlex.split(command)) for command in records[0]["commands"]] if records else [],
    )


def _title(study: Study, budget: str) -> str:
    if not study.budgets:
        return "As many steps as the settings say"
    return f"{budget} images" if study.match == "images" else f"What the first variant computes for {budget} images"


def _facts(study: Study, records: list[Record], missing: int) -> dict[str, str]:
    facts = {
        "Runs": f"{len(records)} of {len(records) + missing}",
        "Recipe": study.recipe,
        "Seeds": ", ".join(map(str, study.seeds)),
        "Ranks": str(study.ranks),
        "Variants spend the same": "arithmetic" if study.match == "flops" else "images",
    }
    if records:
        facts["Made"] = " to ".join(sorted({min(r["date"] for r in records), max(r["date"] for r in records)}))
        commits = {str(record["git_commit"])[:12] for record in records}
        facts["Commits"] = ", ".join(sorted(commits)) if len(commits) < 4 else plural(len(commits), "commit")
        facts["torch"] = ", ".join(sorted({str(record["versions"]["torch"]) for record in records}))
    return facts


def _bars(summary: Summary, budget: str) -> list[Bars]:
    """Draw each figure: a bar for each variant, with the deviation over seeds as its error bar."""
    lines = [line for line in summary.lines if line.budget in (budget, "")]
    all_bars = []
    for column in summary.columns:
        if not any(column in line.values for line in lines if line.records):
            continue
        guessing = next((line.mean(column) for line in lines if line.variant == GUESSING), None)
        bars = [_bar(summary, line, column) for line in lines if line.variant != GUESSING and column in line.values]
        is_fraction = summary.metrics[column].startswith(IN_PERCENT)
        most = max((bar.interval[1] if bar.interval else bar.value or 0.0) for bar in bars)
        title, end = column.replace("/", ", "), _end(most, is_fraction)
        name = "one deviation to either side"
        all_bars.append(Bars(title, bars, end, guessing, interval_name=name, in_percent=is_fraction))
    return all_bars


def _end(most: float, is_fraction: bool) -> float:
    """Choose the end of a scale: whole where values come near it, else a part of it that lets them be told apart."""
    if not is_fraction:
        return most or 1.0
    return next((end for end in (0.05, 0.1, 0.25, 0.5) if most <= end), 1.0)


def _bar(summary: Summary, line: Line, column: str) -> Bar:
    mean, deviation = line.mean(column), line.deviation(column)
    sign = PERCENT_SIGN if summary.metrics[column].startswith(IN_PERCENT) else ""
    interval = None if mean is None or deviation is None else (max(0.0, mean - deviation), mean + deviation)
    return Bar(
        line.variant,
        mean,
        summary.text(line, column) + sign,
        interval,
        is_baseline=not line.records,
        change=plural(len(line.values[column]), "seed"),
    )


def _curves(records: list[Record], budget: str) -> list[Chart]:
    """Draw each loss against images, as the mean over seeds."""
    chosen = [record for record in records if record["budget"] == budget]
    names = [name for record in chosen for name in record["curves"] if name not in ("step", "images")]
    variants = list(dict.fromkeys(record["variant"] for record in chosen))
    charts = []
    for name in dict.fromkeys(names):
        series = [
            _mean_curve(
                variant, [r["curves"] for r in chosen if r["variant"] == variant and name in r["curves"]], name, i
            )
            for i, variant in enumerate(variants)
            if any(r["variant"] == variant and name in r["curves"] for r in chosen)
        ]
        charts.append(chart(readable(name), series, NUMBER, axis="image"))
    return charts


def _mean_curve(variant: str, curves: list[dict[str, list[float]]], name: str, number: int) -> Series:
    points = min(len(curve[name]) for curve in curves)
    images, values = (np.mean([curve[key][:points] for curve in curves], axis=0) for key in ("images", name))
    return Series(variant, images, values, number, is_smoothed=False)
