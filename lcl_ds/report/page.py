"""Write the page about a run, or the page that compares several.

It reads what run folders hold, draws figures into ``plots/`` and writes one HTML file that needs nothing else: curves
and pictures are in it, so the page can be mailed or archived.
"""

import zlib
from pathlib import Path

from lcl_ds.files import check_output, write_whole
from lcl_ds.metrics import Row, read_metrics
from lcl_ds.report.comparison import comparison_page
from lcl_ds.report.figures import plot_evaluation, plot_losses, plot_schedule, plot_throughput
from lcl_ds.report.run import EVALUATION, read_runs
from lcl_ds.report.single import run_page

REPORT = "report.html"
"""File of a run folder."""
FIGURES = {
    "losses": plot_losses,
    "evaluation": plot_evaluation,
    "schedule": plot_schedule,
    "throughput": plot_throughput,
}
"""Figures for slides and papers, by the names of their files."""


def write_report(run_dirs: list[Path], out: Path | None = None) -> Path:
    """Write the page of a run and its figures, or a page that compares several runs.

    Args:
        run_dirs: run folders. One: figures go to ``RUN/plots``, the page to ``RUN/report.html``. Several: the page
            goes to ``comparison.html`` in the first, and no run's own figures are touched.
        out: another file for the page; figures of a comparison go to ``plots`` beside it.

    Returns:
        Path of the page.

    Raises:
        UserError: a run folder without a recorded step or with an unreadable file.
    """
    runs = read_runs(run_dirs)
    first, is_single = run_dirs[0], len(runs) == 1
    page = out or first / (REPORT if is_single else "comparison.html")
    check_output("--out", page)
    # Everything that can be wrong with a file is found before anything is written.
    text = run_page(runs[0], _state(first, runs[0].rows)) if is_single else comparison_page(runs)
    for name, draw in FIGURES.items():
        if name == "evaluation" and not any(run.evaluated_rows() for run in runs):
            continue
        path = first / "plots" / f"{name}.png" if is_single else page.parent / "plots" / f"{page.stem}_{name}.png"
        draw({run.name: run.rows for run in runs}, path)
    write_whole(page, text)
    return page


def is_current(run_dir: Path) -> bool:
    """Say whether the run's page shows its last recorded step and its evaluation as they are now.

    Raises:
        UserError: the run has no readable metrics.
    """
    page = run_dir / REPORT
    if not page.is_file():
        return False
    mark = f'name="lcl-state" content="{_state(run_dir, read_metrics(run_dir))}"'
    return mark in page.read_text(encoding="utf-8", errors="replace")


def _state(folder: Path, rows: list[Row]) -> str:
    """Say what a run's page is made from, for an invisible mark in it."""
    path = folder / EVALUATION
    evaluation = f"{zlib.crc32(path.read_bytes()):08x}" if path.is_file() else "none"
    return f"step {rows[-1]['step'] if rows else 0}, evaluation {evaluation}"
