"""Figures of a run as PNG files, drawn from the rows of ``metrics.jsonl``.

Only matplotlib's object interface is used: no window system, no state that outlives a call.
"""

import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from lcl_ds.metrics import LOSS_ENDING, Row, loss_names, report_names

Runs = dict[str, list[Row]]
"""Rows of ``metrics.jsonl`` by the name of their run."""

# Okabe and Ito's palette, without its yellow, which is too pale for lines: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
DASHES = ("-", "--", ":")
INK, MUTED, GRID, GREEN = "#1f2933", "#66727f", "#e6eaee", "#00a878"
DPI = 150
SHOWN = 5
"""Retrieved images per row."""


@dataclass(frozen=True)
class RetrievalExample:
    """One context and the images it ranks first."""

    context: str
    images: list[np.ndarray]
    """uint8 [H, W, 3], best first."""
    correct: list[bool]
    """Per image: is it the one that follows the context?"""


def plot_losses(runs: Runs, path: Path) -> None:
    """Plot every loss of the runs' objectives against the step, unweighted."""
    names = _names(runs, loss_names)
    figure, axes = new_figure(1, max(1, len(names)))
    for axis, name in zip(axes, names, strict=False):
        _draw(axis, runs, name.replace("_", " ").capitalize(), name)
    _save(figure, runs, path)


def plot_schedule(runs: Runs, path: Path) -> None:
    """Plot learning rate, gradient norm and what else the objectives report against the step."""
    names = _names(runs, report_names)
    panels = 2 + len(names)
    figure, (rate, norm, *others) = new_figure(math.ceil(panels / 3), min(panels, 3))
    _draw(rate, runs, "Learning rate", "lr", smooth=False)
    _draw(norm, runs, "Gradient norm", "grad_norm")
    for axis, name in zip(others, names, strict=False):
        _draw(axis, runs, name.replace("_", " ").capitalize(), name, smooth=False)
    for axis in others[len(names) :]:
        axis.set_visible(False)
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    _mark_skipped(norm, runs)
    _save(figure, runs, path)


def plot_evaluation(runs: Runs, path: Path) -> None:
    """Plot what evaluations during training found on held-out documents against the step."""
    evaluated = {name: evaluated_rows(rows) for name, rows in runs.items()}
    names = _names({name: [row["evaluation"] for row in rows] for name, rows in evaluated.items()}, list)
    figure, axes = new_figure(math.ceil(len(names) / 3), min(len(names), 3))
    for axis, name in zip(axes, names, strict=False):
        title = name.replace("_", " ").replace("/", ": ").capitalize()
        found = {run: [{"step": row["step"], **row["evaluation"]} for row in rows] for run, rows in evaluated.items()}
        _draw(axis, found, title, name, smooth=False)
        if not name.endswith(LOSS_ENDING):
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    _save(figure, runs, path)


def evaluated_rows(rows: list[Row]) -> list[Row]:
    """Choose the steps after which there was an evaluation."""
    return [row for row in rows if isinstance(row.get("evaluation"), dict)]


def _names(runs: Runs, names_in: Callable[[Row], list[str]]) -> list[str]:
    """List the names in the last line of each run, each once."""
    return list(dict.fromkeys(name for rows in runs.values() if rows for name in names_in(rows[-1])))


def plot_throughput(runs: Runs, path: Path) -> None:
    """Plot tokens and images per second, the fraction of time spent waiting for data, and padding."""
    figure, axes = new_figure(2, 2)
    _draw(axes[0], runs, "Tokens per second", "tokens_per_s")
    _draw(axes[1], runs, "Images per second", "images_per_s")
    _draw(
        axes[2],
        runs,
        "Time spent drawing rows",
        lambda rows: column(rows, "data_s") / column(rows, "step_s"),
    )
    _draw(axes[3], runs, "Padding", "padding_fraction")
    for axis in axes[:2]:
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    for axis in axes[2:]:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    for axis in axes:
        axis.set_ylim(bottom=0)
    _save(figure, runs, path)


def plot_retrieval(examples: Sequence[RetrievalExample], path: Path) -> None:
    """Draw a row per context: its text, then the images it ranks first; the right one has a green frame."""
    rows = max(1, len(examples))
    figure = _page(0.5 + 1.4 * rows)
    grid = figure.subplots(rows, 1 + SHOWN, squeeze=False, width_ratios=[2.6] + [1] * SHOWN)
    for axis in grid.flat:
        axis.set_axis_off()
    for row, example in zip(grid, examples, strict=False):
        row[0].set(xlim=(0, 1), ylim=(0, 1))
        text = textwrap.fill(" ".join(example.context.split()), 42, max_lines=6, placeholder=" ...")
        row[0].text(0, 0.5, text, va="center", fontsize=10, color=INK, linespacing=1.35, parse_math=False)
        for axis, image, correct in zip(row[1:], example.images, example.correct, strict=False):
            _show(axis, image, correct)
    for rank, axis in enumerate(grid[0], 0):
        axis.set_title(f"{rank}" if rank else "Context", fontsize=10, color=MUTED, loc="center" if rank else "left")
    _write(figure, path)


def column(rows: list[Row], key: str) -> np.ndarray:
    """Read one value per row as float64; NaN where a row has no number (null marks what was not finite)."""
    values = (row.get(key) for row in rows)
    return np.array([float(value) if isinstance(value, (int, float)) else np.nan for value in values])


def moving_average(values: np.ndarray, steps: float) -> np.ndarray:
    """Compute an exponential moving average over about ``steps`` values; NaN leaves it as it is.

    The weights always sum to one, so the curve starts at the first value and not at zero.
    """
    keep = 1 - 1 / max(steps, 1)
    total = weight = 0.0
    smooth = np.empty(len(values))
    for i, value in enumerate(values.tolist()):
        if value == value:
            total, weight = keep * total + value, keep * weight + 1
        smooth[i] = total / weight if weight else np.nan
    return smooth


def _page(height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.02, hspace=0.03)
    return Figure(figsize=(11, height), dpi=DPI, layout=layout, facecolor="white")


def new_figure(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """Make a page of panels in the house's style; the x axis counts steps unless it is named anew."""
    figure = _page(0.6 + 3.1 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for i, axis in enumerate(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#b8c2cc")
        axis.tick_params(colors=MUTED, labelsize=9, length=3)
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if i >= len(axes) - columns:
            axis.set_xlabel("Step", fontsize=9, color=MUTED)
    return figure, axes


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}


def _draw(
    axis: Axes,
    runs: Runs,
    title: str,
    values: str | Callable[[list[Row]], np.ndarray],
    smooth: bool = True,
) -> None:
    """Draw one curve per run: raw values faint behind their moving average, or as they are."""
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)
    # An average trails behind its values: by as many steps in every run, or curves could not be compared.
    window = max((len(of_run) for of_run in runs.values()), default=0) / 80
    for i, rows in enumerate(runs.values()):
        steps = column(rows, "step")
        raw = column(rows, values) if isinstance(values, str) else values(rows)
        strong = moving_average(raw, window) if smooth else raw
        if smooth:
            axis.plot(steps, raw, color=_style(i)["color"], alpha=0.22, linewidth=0.8)
        # A single step is no line: show it as a dot.
        axis.plot(steps, strong, **_style(i), linewidth=1.9, marker="o" if len(rows) == 1 else "", markersize=4)


def _mark_skipped(axis: Axes, runs: Runs) -> None:
    """Draw crosses on the step axis where no update was applied: the gradient was not finite there."""
    for i, rows in enumerate(runs.values()):
        steps = [row["step"] for row in rows if row.get("applied") is False]
        heights = np.full(len(steps), 0.02)
        axis.plot(steps, heights, "x", color=_style(i)["color"], markersize=5, transform=axis.get_xaxis_transform())
    if any(row.get("applied") is False for of_run in runs.values() for row in of_run):
        text = "x  step not applied"
        axis.text(1, 1.03, text, ha="right", fontsize=9, color=MUTED, transform=axis.transAxes)


def _show(axis: Axes, image: np.ndarray, correct: bool) -> None:
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    axis.imshow(image, interpolation="nearest")
    # The width of the frame tells as much as its colour does.
    for spine in axis.spines.values():
        spine.set(edgecolor=GREEN if correct else "#cbd2d9", linewidth=4 if correct else 1)


def _save(figure: Figure, runs: Runs, path: Path) -> None:
    """Add the names of several runs, then write."""
    if len(runs) > 1:
        handles = [Line2D([], [], **_style(i), linewidth=2.2) for i in range(len(runs))]
        # Names are set afterwards: a legend drops labels that start with "_" and reads "$" as mathematics.
        legend = figure.legend(
            handles,
            [str(i) for i in range(len(runs))],
            loc="outside upper left",
            ncols=min(len(runs), 4),
            frameon=False,
            fontsize=10,
            labelcolor=INK,
        )
        for text, name in zip(legend.get_texts(), runs, strict=True):
            text.set_parse_math(False)
            text.set_text(name)
    _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    with warnings.catch_warnings(), matplotlib.rc_context({"agg.path.chunksize": 10_000}):
        # Text in a script that the font lacks is drawn as boxes; one warning per letter says no more than that.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, format="png")
