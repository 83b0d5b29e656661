"""Figures of a benchmark as PNG files, drawn from the rows of its JSON document.

Only matplotlib's object interface is used, in the style of the figures of a run (``lcl_ds/report/figures.py``).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from lcl_ds.report.figures import COLOURS, DPI, GRID, INK, MUTED

Row = dict[str, Any]
MARKERS = "osD^vPX*"
EDGE = "#b8c2cc"
PLACES = {
    "lcl_kernels": 0,
    "eager": 1,
    "torch.compile": 2,
    "torch chunked": 3,
    "open_clip ClipLoss": 3,
    "open_clip SigLipLoss": 3,
    "liger-kernel": 4,
    "memeff": 4,
    "siglip-kernel": 4,
    "cut-cross-entropy": 5,
    "inf-cl": 5,
    "quack": 6,
    "lcl_kernels torch": 7,
    "lcl_kernels counted": 8,
    "liger-kernel sm90": 9,
}
"""Colour and marker by method; two share one where no figure shows both."""


def draw_losses(document: dict[str, Any], folder: Path) -> list[Path]:
    """``losses_time.png``: time against the fraction of labels that count; ``losses_share.png``: bars per shape."""
    rows = [row for row in document["rows"] if "median_ms" in row]
    written = []
    panels = [
        (shape, group)
        for shape, group in _grouped(rows, lambda row: _name_shape(row["shape"]))
        if len({row["valid_fraction"] for row in group}) > 1
    ]
    if panels:
        path = folder / "losses_time.png"
        figure, axes = _figure(len(panels), _subtitle(document))
        for axis, (shape, group) in zip(axes, panels, strict=True):
            _draw_times(axis, group, shape)
        _save(figure, axes, path)
        written.append(path)
    full = [row for row in rows if row["valid_fraction"] == max(row["valid_fraction"] for row in rows)]
    if full:
        percent = 100 * full[0]["valid_fraction"]
        title = f"Share of the matmul rate, {percent:g} % of labels count"
        written.append(_draw_shares(document, full, title, folder / "losses_share.png"))
    return written


def draw_contrastive(document: dict[str, Any], folder: Path) -> list[Path]:
    """``contrastive_memory.png``: peak memory against M; ``contrastive_share.png``: bars per shape."""
    written = []
    remembered = [row for row in document["rows"] if row.get("peak_extra_mb")]
    if remembered:
        path = folder / "contrastive_memory.png"
        figure, axes = _figure(1, _subtitle(document))
        _draw_memory(axes[0], remembered, document["environment"]["gpu_memory_gb"])
        _save(figure, axes, path)
        written.append(path)
    timed = [row for row in document["rows"] if "median_ms" in row]
    if timed:
        title = "Share of the matmul rate (8 M² D operations)"
        written.append(_draw_shares(document, timed, title, folder / "contrastive_share.png"))
    return written


def draw_sigmoid(document: dict[str, Any], folder: Path) -> list[Path]:
    """``sigmoid_share.png``: bars per shape."""
    timed = [row for row in document["rows"] if "median_ms" in row]
    title = "Share of the matmul rate (6 M² D operations)"
    return [_draw_shares(document, timed, title, folder / "sigmoid_share.png")] if timed else []


def _draw_times(axis: Axes, rows: list[Row], title: str) -> None:
    """Milliseconds per step of each method, and the floor."""
    for method, own in _grouped(rows, lambda row: row["method"]):
        points = sorted((row["valid_fraction"], row["median_ms"]) for row in own)
        axis.plot(*zip(*points, strict=True), **_style(method), linewidth=1.9, markersize=5, label=method)
    floor = sorted({(row["valid_fraction"], row["floor_ms"]) for row in rows})
    axis.plot(*zip(*floor, strict=True), color=INK, linestyle=":", linewidth=1.5, label="floor at the matmul rate")
    axis.set_yscale("log")
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    _name_ticks(axis, [row["median_ms"] for row in rows] + [row["floor_ms"] for row in rows])
    _label(axis, title, "Labels that count", "ms, forward and backward")


def _draw_memory(axis: Axes, rows: list[Row], limit_gb: float | None) -> None:
    """MB above the inputs against M, both logarithmic."""
    for method, own in _grouped(rows, lambda row: row["method"]):
        points = sorted((row["shape"]["M"], row["peak_extra_mb"]) for row in own)
        axis.plot(*zip(*points, strict=True), **_style(method), linewidth=1.9, markersize=5, label=method)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    values = [row["peak_extra_mb"] for row in rows]
    if limit_gb:
        axis.axhline(1024 * limit_gb, color=INK, linestyle=":", linewidth=1.5, label=f"the card: {limit_gb:.0f} GiB")
        values.append(1024 * limit_gb)
    pairs = sorted({row["shape"]["M"] for row in rows})
    axis.set_xticks(pairs, [f"{m:,}" for m in pairs])
    axis.xaxis.set_minor_locator(NullLocator())
    _name_ticks(axis, values)
    _label(axis, "Peak memory of a step, without its inputs", "Pairs M", "MiB")


def _draw_shares(document: dict[str, Any], rows: list[Row], title: str, path: Path) -> Path:
    """A group of bars per shape, one bar per method."""
    figure, axes = _figure(1, _subtitle(document))
    groups = _grouped(rows, lambda row: _name_shape(row["shape"]))
    methods = [method for method, _ in _grouped(rows, lambda row: row["method"])]
    width = 0.8 / len(methods)
    axis = axes[0]
    for i, method in enumerate(methods):
        found = [(at, row) for at, (_, group) in enumerate(groups) for row in group if row["method"] == method]
        places = [at + (i - (len(methods) - 1) / 2) * width for at, _ in found]
        heights = [100 * row["share_of_matmul"] for _, row in found]
        bars = axis.bar(places, heights, 0.92 * width, color=_style(method)["color"], label=method)
        axis.bar_label(bars, [f"{height:.0f}" for height in heights], fontsize=8, color=MUTED, padding=2)
    axis.set_xticks(range(len(groups)), [shape for shape, _ in groups])
    axis.set_xlim(-0.6, len(groups) - 0.4)
    axis.grid(visible=False, axis="x")
    axis.axhline(100, color=INK, linestyle=":", linewidth=1.5, label="a matmul in the same rounds")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    _label(axis, title, "", "")
    _save(figure, axes, path)
    return path


def _style(method: str) -> dict[str, Any]:
    """The place of a method: the same in every figure."""
    place = PLACES.get(method, len(COLOURS))
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": "--" if place >= len(COLOURS) else "-",
        "marker": MARKERS[place % len(MARKERS)],
    }


def _grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> list[tuple[str, list[Row]]]:
    """Rows by key, in the order in which the keys first appear."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def _name_shape(shape: dict[str, int]) -> str:
    return ", ".join(f"{letter} {size:,}" for letter, size in shape.items())


def _subtitle(document: dict[str, Any]) -> str:
    environment = document["environment"]
    machine = environment["gpu"] or f"{environment['cpu']}, {environment['cores']} cores"
    return f"{machine} · torch {environment['torch']} · {document['ceilings']['matmul_dtype']}"


def _figure(columns: int, subtitle: str) -> tuple[Figure, list[Axes]]:
    size = (11 if columns > 1 else 8.5, 4.6)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
    axes = list(figure.subplots(1, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(EDGE)
        axis.tick_params(colors=MUTED, labelsize=9, length=3)
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    figure.supxlabel(subtitle, fontsize=8, color=MUTED, x=0.99, ha="right")
    return figure, axes


def _name_ticks(axis: Axes, values: Sequence[float]) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, as plain numbers; far fewer over many decades."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    ticks = [step * 10.0**power for power in range(low, high + 1) for step in steps]
    kept = [tick for tick in ticks if min(values) / 1.6 <= tick <= max(values) * 1.6]
    axis.set_yticks(kept, [f"{tick:,.10g}" for tick in kept])
    axis.yaxis.set_minor_locator(NullLocator())


def _label(axis: Axes, title: str, across: str, up: str) -> None:
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)
    axis.set_xlabel(across, fontsize=9, color=MUTED)
    axis.set_ylabel(up, fontsize=9, color=MUTED)


def _save(figure: Figure, axes: Sequence[Axes], path: Path) -> None:
    """Add one legend for all panels, then write."""
    named = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels = sorted(named, key=lambda label: PLACES.get(label, len(PLACES)))  # a ceiling or a floor comes last
    columns = min(len(labels), 5 if len(axes) > 1 else 4)
    options = {"frameon": False, "fontsize": 9, "labelcolor": INK, "ncols": columns}
    figure.legend([named[label] for label in labels], labels, loc="outside upper left", **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png")
