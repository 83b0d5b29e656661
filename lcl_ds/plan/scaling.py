"""Draw how a run's speed grows with the number of GPUs: weak scaling, the same rows on each; strong, the same step."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lcl_ds.plan.planner import Plan, Planner
from lcl_ds.report.figures import COLOURS, INK, MUTED, new_figure

MOST_GPUS = 4096


@dataclass(frozen=True)
class Point:
    """One number of GPUs."""

    gpus: int
    weak: Plan
    strong: Plan | None
    """None where the step has fewer rows than GPUs."""


def scale(planner: Planner, most: int = MOST_GPUS) -> list[Point]:
    """Plan the given choice on one GPU, two and so on, always with as many on a host."""
    given = planner.given()
    rows, per_step = given.rows, planner.config.train.global_batch_rows
    micro_steps = planner.config.train.accumulation_steps
    points = []
    for gpus in (2**power for power in range(int(math.log2(most)) + 1)):
        hosts = planner.hosts_of(gpus)
        weak = planner.plan(given, gpus, hosts, batch_rows=rows * micro_steps * gpus)
        own = per_step // gpus
        strong = None
        if own >= 1:
            strong = planner.plan(replace(given, rows=min(rows * 64, max(1, own // micro_steps))), gpus, hosts)
        points.append(Point(gpus, weak, strong))
    return points


def assumptions(planner: Planner) -> list[str]:
    """Say what the curves rest on."""
    given = planner.given()
    return [
        f"weak: {given.rows} rows a GPU and micro-step at every size, so the batch grows; negatives too",
        f"strong: {planner.config.train.global_batch_rows} rows a step at every size",
        f"{math.ceil(planner.gpus / planner.hosts)} GPUs a host; arithmetic is as efficient at every size",
        "no rank is slower than another, and waiting for data, saving and failures take no time",
    ]


def draw(points: list[Point], planner: Planner, path: Path) -> None:
    """Draw both curves against a line of the speed of one GPU times their number."""
    figure, (speed, efficiency) = new_figure(1, 2)
    gpus = [point.gpus for point in points]
    one = points[0].weak.images_per_s
    curves = {
        "weak: rows of a GPU stay": [(point.gpus, point.weak.images_per_s) for point in points],
        "strong: rows of a step stay": [(p.gpus, p.strong.images_per_s) for p in points if p.strong is not None],
    }
    speed.plot(gpus, [one * count for count in gpus], color=MUTED, linestyle=":", label="one GPU times their number")
    for colour, (name, curve) in zip(COLOURS, curves.items(), strict=False):
        x = [count for count, _ in curve]
        speed.plot(x, [value for _, value in curve], color=colour, marker="o", markersize=3, label=name)
        fractions = [100 * value / (one * count) for count, value in curve]
        efficiency.plot(x, fractions, color=colour, marker="o", markersize=3)
    speed.set_yscale("log")
    for axis, title in ((speed, "Images per second"), (efficiency, "Of one GPU's speed, %")):
        axis.set_xscale("log", base=2)
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)
        axis.set_xlabel("GPUs", fontsize=9, color=MUTED)
    efficiency.set_ylim(0, 105)
    speed.legend(frameon=False, fontsize=9, labelcolor=INK)
    text = f"{planner.config.name} on {planner.gpu.name}, planned, not measured. " + "; ".join(assumptions(planner))
    figure.suptitle(text, fontsize=7, color=MUTED, x=0.01, ha="left", wrap=True)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write the figure in the format that its name ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(path)
