"""The page about one run."""

from collections import defaultdict

import numpy as np

from lcl_ds.metrics import LOSS_ENDING, Row, loss_names, report_names
from lcl_ds.report.bars import Bar, Bars
from lcl_ds.report.charts import COUNT, NUMBER, PERCENT, Chart, Series, chart, series_of
from lcl_ds.report.evaluation import shown_evaluation
from lcl_ds.report.facts import (
    LAST_STEPS,
    command_of,
    commands_after,
    final,
    identity_of,
    key_figures,
    readable,
    state_of,
    total,
)
from lcl_ds.report.figures import column
from lcl_ds.report.html import render
from lcl_ds.report.numbers import count, number
from lcl_ds.report.run import Run

SUM_UP = ("Steps", "Images", "Documents", "Tokens", "Time in steps")
"""Key figures at the top of the page; the others stand beside the speed."""


def run_page(run: Run, state: str) -> str:
    """Make the page about a run.

    Args:
        state: what the page is made from, to be found in it again.
    """
    figures = key_figures(run.rows)
    losses = [name for name in figures if "loss" in name.lower()]
    return render(
        "run.html",
        title=run.name,
        state=state,
        progress=state_of(run),
        summary={name: figures[name] for name in SUM_UP},
        identity=identity_of(run),
        command=command_of(run),
        losses=loss_charts(run),
        evaluation=shown_evaluation(run),
        evaluations=evaluation_charts(run),
        pictures=run.pictures,
        optimisation=optimisation_charts(run.rows),
        speed=speed_charts(run.rows),
        costs={name: text for name, text in figures.items() if name not in (*SUM_UP, *losses)},
        sources=source_bars(run.rows),
        commands=commands_after(run),
        files=run.files(),
    )


def loss_charts(run: Run) -> list[Chart]:
    """Draw each loss of the objective, with what evaluations during training found of it."""
    rows, evaluated = run.rows, run.evaluated_rows()
    steps = min(LAST_STEPS, len(rows))
    charts = []
    for name in loss_names(rows[-1]) or ["loss"]:
        held_out = _held_out(evaluated, name, "held out", 1)
        has_held_out = bool(np.isfinite(held_out.values).any())
        series = [series_of("training" if has_held_out else "", rows, name)]
        last = "last step" if steps == 1 else f"mean of the last {steps} steps"
        value = number(final(rows, name))
        charts.append(
            chart(
                readable(name),
                [*series, held_out] if has_held_out else series,
                value=value,
                notes=[f"{value}: {last}." if not np.isnan(final(rows, name)) else "No finite value at the end."],
            )
        )
    return charts


def evaluation_charts(run: Run) -> list[Chart]:
    """Draw what evaluations during training found beside losses: one chart for each label, and one for retrieval."""
    evaluated = run.evaluated_rows()
    charts: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in evaluation_names(evaluated):
        if not name.endswith(LOSS_ENDING):
            title, curve = title_and_curve(name)
            charts[title].append((name, curve))
    return [
        chart(
            title,
            [_held_out(evaluated, name, curve, number) for number, (name, curve) in enumerate(curves)],
            PERCENT,
            from_zero=True,
        )
        for title, curves in charts.items()
    ]


def evaluation_names(evaluated: list[Row]) -> list[str]:
    """List the figures of evaluations during training."""
    return list(dict.fromkeys(name for row in evaluated for name in row["evaluation"]))


def title_and_curve(name: str) -> tuple[str, str]:
    """Say in words what a figure of an evaluation during training is: of what, and measured how."""
    task, _, rest = name.partition("/")
    if task == "retrieval":
        return "Retrieval of contexts by images", rest.replace("_", " ")
    label, reads = (rest.removesuffix("/mean"), "mean patch token") if rest.endswith("/mean") else (rest, "")
    shown = {"linear": "linear", "knn": "k-NN", "attentive": "attentive"}.get(task, task)
    if not reads and task != "attentive":
        reads = "pooling head"
    return f"{label or task}: accuracy", f"{shown}, {reads}" if reads else shown


def _held_out(evaluated: list[Row], name: str, curve: str, number: int) -> Series:
    found = [{"step": row["step"], "value": row["evaluation"].get(name)} for row in evaluated]
    return series_of(curve, found, "value", number, is_smoothed=False)


def optimisation_charts(rows: list[Row]) -> list[Chart]:
    """Draw learning rate, gradient norm and what else the objective reports."""
    skipped = [row["step"] for row in rows if row.get("applied") is False]
    note = [f"Marked: {len(skipped):,} steps that were not applied."] if skipped else []
    return [
        chart("Learning rate", [series_of("", rows, "lr", is_smoothed=False)], from_zero=True),
        chart("Gradient norm before clipping", [series_of("", rows, "grad_norm")], notes=note, marks=skipped),
        *(chart(readable(name), [series_of("", rows, name, is_smoothed=False)]) for name in report_names(rows[-1])),
    ]


def speed_charts(rows: list[Row]) -> list[Chart]:
    """Draw throughput of all ranks, what it is held up by, and memory."""
    steps = column(rows, "step")
    with np.errstate(divide="ignore", invalid="ignore"):
        waiting = column(rows, "data_s") / column(rows, "step_s")
        behind = column(rows, "slowest_rank_s") - column(rows, "median_rank_s")
    charts = [
        chart("Images per second", [series_of("", rows, "images_per_s")], COUNT, from_zero=True),
        chart("Tokens per second", [series_of("", rows, "tokens_per_s")], COUNT, from_zero=True),
        chart("Time spent drawing rows", [Series("", steps, waiting)], PERCENT, from_zero=True),
        chart("Padding", [series_of("", rows, "padding_fraction")], PERCENT, from_zero=True),
    ]
    mfu, memory = series_of("", rows, "mfu"), series_of("", rows, "memory_gb", is_smoothed=False)
    if np.isfinite(mfu.values).any():
        charts.append(chart("Model FLOPs utilisation", [mfu], PERCENT, from_zero=True))
    if np.isfinite(memory.values).any():
        charts.append(chart("Peak memory in GiB", [memory], NUMBER, from_zero=True))
    if np.isfinite(behind).any():
        charts.append(chart("Slowest rank behind the median, in seconds", [Series("", steps, behind)], from_zero=True))
    return charts


def source_bars(rows: list[Row]) -> Bars | None:
    """Show what the run took from each source of data; None where its metrics do not tell."""
    sources: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        for name, counts in (row.get("sources") or {}).items():
            if isinstance(counts, dict):
                sources[name].append(counts)
    documents = {name: total(of_source, "documents") for name, of_source in sources.items()}
    everything = sum(documents.values())
    if not everything:
        return None
    bars = [
        Bar(
            name,
            documents[name] / everything,
            f"{count(documents[name])} documents, {count(total(of_source, 'images'))} images",
        )
        for name, of_source in sources.items()
    ]
    return Bars("Documents and images by source", bars)
