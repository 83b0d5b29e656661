"""The page that compares runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lcl_ds.metrics import LOSS_ENDING, Row, loss_names, report_names
from lcl_ds.report.bars import Bar, Bars, Range
from lcl_ds.report.charts import COUNT, NUMBER, PERCENT, Chart, Series, Unit, chart, series_of
from lcl_ds.report.evaluation import headline_figures, shown_evaluation
from lcl_ds.report.facts import final, identity_of, key_figures, readable, state_of, total
from lcl_ds.report.figures import column
from lcl_ds.report.html import render
from lcl_ds.report.numbers import ABSENT, count, duration, is_number, number, percent, signed
from lcl_ds.report.run import Run
from lcl_ds.report.single import evaluation_names, title_and_curve

Better = Literal["low", "high"]


@dataclass(frozen=True)
class Metric:
    """A number that every run may have."""

    name: str
    better: Better
    values: list[float | None]
    """By run; None where it has none."""
    text: Callable[[float], str]
    change: Callable[[float, float], str]
    """Of a value against that of the first run."""
    intervals: list[Range | None]
    is_fraction: bool = False


@dataclass(frozen=True)
class Difference:
    """A setting that not all runs have alike: its values, and which runs have each."""

    key: str
    values: list[tuple[str, list[int]]]


@dataclass(frozen=True)
class Entry:
    """What stands about a run in the list of runs."""

    name: str
    number: int
    facts: str
    where: str
    note: str
    """Why it has no figures of an evaluation."""


def comparison_page(runs: list[Run]) -> str:
    """Make the page that compares several runs."""
    shown = [shown_evaluation(run) for run in runs]  # also says what is wrong with a file
    entries = [
        Entry(run.name, i, _facts(run), _where(run), evaluation.missing)
        for i, (run, evaluation) in enumerate(zip(runs, shown, strict=True))
    ]
    return render(
        "comparison.html",
        title=f"Comparison of {len(runs)} runs",
        entries=entries,
        notes=_notes(runs),
        losses=_charts(runs, _names(runs, loss_names) or ["loss"], NUMBER),
        loss_bars=[_bars(metric) for metric in loss_metrics(runs)],
        evaluation_bars=[_bars(metric) for metric in evaluation_metrics(runs)],
        evaluations=_evaluation_charts(runs),
        optimisation=_charts(runs, ["lr", "grad_norm", *_names(runs, report_names)], NUMBER),
        speed=_charts(runs, ["images_per_s", "tokens_per_s"], COUNT, from_zero=True),
        speed_bars=[_bars(metric) for metric in speed_metrics(runs)],
        differences=setting_differences(runs),
    )


def _facts(run: Run) -> str:
    figures = key_figures(run.rows)
    return ", ".join([state_of(run), *(f"{figures[key]} {key.lower()}" for key in ("Steps", "Images", "Tokens"))])


def _where(run: Run) -> str:
    identity = identity_of(run)
    ranks = identity.get("Ranks", "")
    device = identity.get("Device", "")
    on = f"{ranks} rank{'' if ranks == '1' else 's'} on {device}" if ranks and device else device
    return " · ".join(filter(None, (identity.get("Started", ""), identity.get("Host", ""), on)))


def _notes(runs: list[Run]) -> list[str]:
    notes = []
    steps = {run.last_step for run in runs}
    if len(steps) > 1:
        notes.append("The runs end at different steps: each number is that of a run's own end.")
    devices = {_where(run).rpartition(" · ")[2] for run in runs}
    if len(devices) > 1:
        notes.append("Devices or ranks differ between the runs: compare their speed with care.")
    return notes


def loss_metrics(runs: list[Run]) -> list[Metric]:
    """List the final losses of training, then those of the last evaluation during training."""
    metrics = [
        _metric(f"{readable(name)}, training", "low", [final(run.rows, name) for run in runs], number, _plain)
        for name in _names(runs, loss_names)
    ]
    last = [(run.evaluated_rows() or [{"evaluation": {}}])[-1]["evaluation"] for run in runs]
    for name in dict.fromkeys(name for figures in last for name in figures if name.endswith(LOSS_ENDING)):
        values = [figures.get(name) for figures in last]
        metrics.append(_metric(f"{readable(name)}, held out", "low", values, number, _plain))
    return metrics


def evaluation_metrics(runs: list[Run]) -> list[Metric]:
    """List accuracies and recalls of the final evaluations."""
    figures = [{} if "failed" in run.evaluation else headline_figures(run.evaluation) for run in runs]
    return [
        _metric(
            name,
            "high",
            [of_run[name][0] if name in of_run else None for of_run in figures],
            percent,
            _points,
            [of_run[name][1] if name in of_run else None for of_run in figures],
        )
        for name in dict.fromkeys(name for of_run in figures for name in of_run)
    ]


def speed_metrics(runs: list[Run]) -> list[Metric]:
    """List throughput, time and memory."""

    def per_second(key: str) -> list[float | None]:
        seconds = [total(run.rows, "step_s") for run in runs]
        return [total(run.rows, key) / s if s else None for run, s in zip(runs, seconds, strict=True)]

    def most(run: Run, key: str) -> float | None:
        values = column(run.rows, key)
        return float(np.nanmax(values)) if np.isfinite(values).any() else None

    metrics = [
        _metric("Images per second", "high", per_second("images"), count, _relative),
        _metric("Tokens per second", "high", per_second("tokens"), count, _relative),
        _metric("Time in steps", "low", [total(run.rows, "step_s") for run in runs], duration, _relative),
        _metric("Peak memory", "low", [most(run, "memory_gb") for run in runs], lambda v: f"{v:.1f} GiB", _relative),
    ]
    return [metric for metric in metrics if any(value is not None for value in metric.values)]


def _metric(
    name: str,
    better: Better,
    values: list[float | None],
    text: Callable[[float], str],
    change: Callable[[float, float], str],
    intervals: list[Range | None] | None = None,
) -> Metric:
    finite = [value if is_number(value) else None for value in values]
    return Metric(name, better, finite, text, change, intervals or [None] * len(values), text is percent)


def _plain(value: float, first: float) -> str:
    return f"{value - first:+.3f}"


def _points(value: float, first: float) -> str:
    return f"{100 * (value - first):+.1f} points"


def _relative(value: float, first: float) -> str:
    return f"{100 * (value / first - 1):+.1f} %" if first else ""


def _bars(metric: Metric) -> Bars:
    """Draw a metric: a bar for each run, the change against the first one, and which is best."""
    texts = {metric.text(value) for value in metric.values if value is not None}
    choose = min if metric.better == "low" else max
    best = choose((value for value in metric.values if value is not None), default=None)
    first = metric.values[0]
    bars = []
    for i, (value, interval) in enumerate(zip(metric.values, metric.intervals, strict=True)):
        if value is None:
            bars.append(Bar("", None, ABSENT, number=i))
            continue
        text = metric.text(value)
        is_best = best is not None and len(texts) > 1 and text == metric.text(best)
        change = signed(metric.change(value, first)) if i and first is not None else ""
        bars.append(Bar("", value, text, interval, i, is_best=is_best, change=change))
    most = 1.0 if metric.is_fraction else max((value for value in metric.values if value is not None), default=1.0)
    return Bars(metric.name, bars, most)


def _charts(runs: list[Run], names: list[str], unit: Unit, from_zero: bool = False) -> list[Chart]:
    titles = {"lr": "Learning rate", "grad_norm": "Gradient norm before clipping"}
    return [
        chart(
            titles.get(name, readable(name).replace("per s", "per second")),
            [series_of(run.name, run.rows, name, i, is_smoothed=name != "lr") for i, run in enumerate(runs)],
            unit,
            from_zero or name == "lr",
        )
        for name in names
    ]


def _evaluation_charts(runs: list[Run]) -> list[Chart]:
    """Draw each figure of the evaluations during training."""
    evaluated = [run.evaluated_rows() for run in runs]
    charts = []
    for name in dict.fromkeys(name for rows in evaluated for name in evaluation_names(rows)):
        is_loss = name.endswith(LOSS_ENDING)
        title = f"{readable(name)}, held out" if is_loss else ", ".join(title_and_curve(name))
        series = [
            Series(
                run.name,
                column(rows, "step"),
                column([row["evaluation"] for row in rows], name),
                i,
                is_smoothed=False,
            )
            for i, (run, rows) in enumerate(zip(runs, evaluated, strict=True))
            if rows
        ]
        charts.append(chart(title, series, NUMBER if is_loss else PERCENT, from_zero=not is_loss))
    return charts


def _names(runs: list[Run], names_in: Callable[[Row], list[str]]) -> list[str]:
    """List the names in the last line of each run, each once."""
    return list(dict.fromkeys(name for run in runs for name in names_in(run.rows[-1])))


def setting_differences(runs: list[Run]) -> list[Difference]:
    """List the settings that differ between the runs that have any."""
    known = [i for i, run in enumerate(runs) if run.settings]
    differences = []
    for key in sorted({key for run in runs for key in run.settings}):
        values: dict[str, list[int]] = {}
        for i in known:
            values.setdefault(runs[i].settings.get(key, ABSENT), []).append(i)
        if len(values) > 1:
            differences.append(Difference(key, list(values.items())))
    return differences
