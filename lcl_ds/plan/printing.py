"""Write plans as tables."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lcl_ds.flops import total
from lcl_ds.plan.check import Compared
from lcl_ds.plan.communication import HIDDEN, REACHED
from lcl_ds.plan.memory import MEANINGS
from lcl_ds.plan.planner import Plan, Planner
from lcl_ds.plan.search import Found, reasons, settings_of, what_would_fit
from lcl_ds.plan.timing import efficiencies, source_of

if TYPE_CHECKING:  # it imports what draws
    from lcl_ds.plan.scaling import Point

SHOWN = 5
"""Choices of a search that are shown."""
WIDTH = 130
"""Of tables where there is no terminal."""


def console() -> Console:
    screen = Console(highlight=False, markup=False)
    return screen if screen.is_terminal else Console(highlight=False, markup=False, width=WIDTH)


def print_plan(plan: Plan, planner: Planner, notes: Iterable[str], out: Console) -> None:
    """Print what the given choice comes to."""
    gpu, sizes = planner.gpu, planner.sizes
    out.print(
        f"{planner.config.name} on {planner.gpus} x {gpu.name} ({planner.hosts} hosts): {sizes.all / 1e9:.2f} billion "
        f"parameters, {sizes.trained / 1e9:.2f} learn. Everything below is planned, nothing was measured."
    )
    out.print(f"as given: {settings_of(plan)}")
    for note in notes:
        out.print(f"- {note}")
    out.print(_memory_table(plan, planner))
    out.print(_time_table(plan, planner))
    out.print(verdict(plan, planner))
    for name, value in cost_figures(plan).items():
        out.print(f"{name}: {value}")


def verdict(plan: Plan, planner: Planner) -> str:
    """Say whether the plan fits, and by how much it does or does not."""
    needed, there = plan.memory.needed / 2**30, planner.gpu.memory_gib
    if needed <= there:
        return f"fits: {needed:.1f} of {there:.1f} GiB of a GPU"
    return f"does not fit: {needed:.1f} GiB of {there:.1f} GiB of a GPU, {needed - there:.1f} GiB too much"


def cost_figures(plan: Plan) -> dict[str, str]:
    """Write speed and cost of the whole run."""
    cost = plan.cost
    figures = {
        "step": f"{plan.time.total:.3g} s, MFU {100 * plan.mfu:.1f} %, {plan.images_per_s:,.0f} images/s",
        "whole run": f"{cost.days:.1f} days, {cost.gpu_hours:,.0f} GPU-hours",
    }
    if cost.dollars is not None:
        figures["whole run"] += f", {cost.dollars:,.0f} dollars"
    return figures


def _memory_table(plan: Plan, planner: Planner) -> Table:
    table = Table("memory", "GiB a GPU", "what it is", title=f"memory at its peak, in the {plan.memory.moment}")
    for name, size in plan.memory.device.items():
        table.add_row(name, _gib(size), MEANINGS[name])
    table.add_row("together", _gib(plan.memory.needed), f"the {planner.gpu.name} has {planner.gpu.memory_gib:.1f}")
    for name, size in plan.memory.host.items():
        table.add_row(f"host: {name}", _gib(size), "in the host's memory, for each GPU")
    return table


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f}"


def _time_table(plan: Plan, planner: Planner) -> Table:
    table = Table(
        "step", "TFLOP", "computed twice", "s", "assumed", title="arithmetic of a step, all GPUs, and its time"
    )
    reached = efficiencies(planner.sizes.width, planner.towers)
    for name, some in plan.flops.items():
        source = source_of(name, planner.sizes.width, planner.towers)
        table.add_row(
            name,
            f"{some.model / 1e12:,.2f}",
            f"{some.recomputed / 1e12:,.2f}",
            f"{plan.time.parts[name]:.4f}",
            f"{100 * reached[name]:.0f} % of the peak: {source}",
        )
    whole = total(plan.flops)
    waits = (
        f"of {plan.time.exchanged:.4f} s; {100 * HIDDEN:.0f} % of a pass hides them, {100 * REACHED:.0f} % of bandwidth"
    )
    table.add_row("waiting for exchanges", "", "", f"{plan.time.waited:.4f}", waits)
    table.add_row("update", "", "", f"{plan.time.update:.4f}", "memory bandwidth")
    table.add_row("together", f"{whole.model / 1e12:,.2f}", f"{whole.recomputed / 1e12:,.2f}", f"{plan.time.total:.4f}")
    return table


def print_search(found: Found, given: Plan, planner: Planner, out: Console) -> None:
    """Print the fastest choices that fit."""
    table = Table("s a step", "MFU", "GiB", "settings", "", title=f"the fastest of {found.looked_at} choices that fit")
    for plan in found.fitting[:SHOWN]:
        row = f"{plan.time.total:.3g}", f"{100 * plan.mfu:.1f} %", f"{plan.memory.needed / 2**30:.1f}"
        table.add_row(*row, settings_of(plan), reasons(plan, planner))
    if found.fitting:
        out.print(table)
    if not found.fitting or given.memory.needed > planner.gpu.memory_gib * 2**30:
        out.print(what_would_fit(planner, found))


def print_scaling(points: "list[Point]", assumed: Iterable[str], out: Console) -> None:
    """Print the curves as a table, with what they rest on."""
    table = Table("GPUs", "weak: images/s", "waiting", "strong: images/s", "waiting", title="scaling, planned")
    for point in points:
        cells = [f"{point.gpus:,}", f"{point.weak.images_per_s:,.0f}", _waiting(point.weak)]
        if point.strong is not None:
            cells += [f"{point.strong.images_per_s:,.0f}", _waiting(point.strong)]
        table.add_row(*cells)
    out.print(table)
    for sentence in assumed:
        out.print(f"- {sentence}")


def _waiting(plan: Plan) -> str:
    return f"{100 * plan.time.waited / plan.time.total:.0f} %"


def print_comparison(compared: Iterable[Compared], run: str, out: Console) -> None:
    """Print plan and run side by side."""
    table = Table("figure", "planned", "recorded, median", "planned / recorded", title=f"the plan and {run}")
    for each in compared:
        values = (f"{value:,.4g} {each.unit}".strip() for value in (each.planned, each.recorded))
        table.add_row(each.name, *values, f"{100 * each.off:+.1f} %")
    out.print(table)
