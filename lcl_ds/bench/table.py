"""The rows of one case as a table on the terminal."""

from rich.console import Console
from rich.table import Table

from lcl_ds.bench.case import Case, Row

WIDTH = 150
"""Columns where the output is no terminal."""


def open_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def show_rows(console: Console, case: Case, rows: list[Row]) -> None:
    """One line per method: figures, or the reason why there are none. Memory alone takes one line for all."""
    if not case.timed:
        known = [f"{row['method']} {row['peak_extra_mb']:.0f}" for row in rows if "peak_extra_mb" in row]
        failed = [f"{row['method']} {row['reason']}" for row in rows if row["status"] == "failed"]
        console.print(f"{case.title}, extra MiB: {', '.join(known + failed)}", highlight=False)
        return
    table = Table()
    table.add_column("method", no_wrap=True)
    headings = ["ms", "graph ms", "x ours", "TFLOP/s", "of matmul", "extra MiB", "loss"]
    for heading in (*headings, *(f"error of {name}" for name in case.result_names)):
        table.add_column(heading, justify="right")
    table.add_column("note")
    for row in rows:
        figures = [
            milliseconds(row.get("median_ms")),
            milliseconds(row.get("graph_ms")),
            number(row.get("ratio_to_ours"), ".2f"),
            number(row.get("useful_tflops"), ".3g"),
            number(row.get("share_of_matmul"), ".0%"),
            number(row.get("peak_extra_mb"), ".0f"),
            number(row.get("loss"), ".4f"),
            *(number(row.get("errors", {}).get(name), ".1e") for name in case.result_names),
        ]
        table.add_row(row["method"], *figures, note_of(row))
    console.print(case.title, style="bold", highlight=False)
    console.print(table)
    if floor := next((row["floor_ms"] for row in rows if "floor_ms" in row), None):
        console.print(
            f"floor: {milliseconds(floor)} ms, the useful operations at the rate of a matmul in the same rounds\n"
        )


def number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def milliseconds(value: float | None) -> str:
    """Write a time with at least four digits, and never with an exponent."""
    return number(value, ".4g" if value is None or value < 1000 else ",.0f")


def note_of(row: Row) -> str:
    """Why figures are missing."""
    notes = [row["reason"]] if row["reason"] else []
    notes += [
        f"{what}: {row[key]}"
        for what, key in (("memory", "memory_failure"), ("error", "error_failure"), ("graph", "graph_failure"))
        if key in row
    ]
    return "; ".join(notes)
