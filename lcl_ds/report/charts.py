"""Curves as inline SVG: what a template needs to draw them, computed from numbers.

The lines of a chart are stretched to the width of the page while text keeps its size, so labels are HTML beside them.
Colours are those of the page, also in dark mode. However long a run is, a chart has a few hundred points.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lcl_ds.metrics import Row
from lcl_ds.report import numbers
from lcl_ds.report.figures import column, moving_average

SIDE = 1000
"""Width and height of a chart in its own units."""
POINTS = 300
"""Points of a curve at most; each stands for the same number of steps."""
STRIPS = 48
"""Parts of a chart's width at most that show their values to who points at them."""
MOST_FAINT = 4
"""Curves behind which the values themselves are drawn; more would hide each other."""
HUES = 8
"""Colours of the style sheet; further curves have them again, with dashes."""
DASHES = ("", "7 4", "2 4")
DASH = 9
"""Length in pixels of each piece of curves that lie on each other, which take turns."""
SAME = 3.0
"""Curves that are never farther apart than this, in the chart's units, are the same to the eye."""
LEAST_SPAN = 0.2
"""Of the largest value: what the y axis covers at least, so that noise on a flat curve looks like noise."""
REACH = 3.0
"""Spans of the middle 98 % of values that the axis goes beyond them; what lies farther out is cut off."""
LARGEST = 1e30
"""Values beyond it are drawn as it, and those below its inverse as zero."""


@dataclass(frozen=True)
class Unit:
    """How values are written."""

    text: Callable[[float], str]
    """Of one value."""
    factor: float = 1.0
    """From values to what the axis shows."""
    sign: str = ""
    """Behind the numbers of the axis."""


NUMBER = Unit(numbers.number)
COUNT = Unit(numbers.count)
PERCENT = Unit(numbers.percent, 100.0, numbers.PERCENT)


@dataclass(frozen=True)
class Series:
    """Values against steps, to be drawn as one curve."""

    name: str
    steps: np.ndarray
    values: np.ndarray
    """float64; NaN where there is none."""
    number: int = 0
    """Which colour it has."""
    is_smoothed: bool = True
    """Whether it is drawn as a moving average, with the values themselves faint behind it."""


def series_of(name: str, rows: list[Row], key: str, number: int = 0, is_smoothed: bool = True) -> Series:
    """Read one key of the rows of ``metrics.jsonl``."""
    return Series(name, column(rows, "step"), column(rows, key), number, is_smoothed)


@dataclass(frozen=True)
class Tick:
    """A number beside an axis."""

    at: float
    """Percent of the axis, from the left or from the top."""
    text: str


@dataclass(frozen=True)
class Curve:
    """A curve as paths of SVG."""

    name: str
    number: int
    hue: int
    faint: str
    strong: str
    dash: str
    """``stroke-dasharray``."""
    shift: float
    """``stroke-dashoffset``."""


@dataclass(frozen=True)
class Strip:
    """A part of the width and what is said about it."""

    x: float
    width: float
    text: str


@dataclass(frozen=True)
class Chart:
    """One chart."""

    title: str
    curves: list[Curve]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    strips: list[Strip]
    marks: str
    """Path of what is marked on the x axis."""
    summary: str
    """What it shows, for those who cannot see it."""
    notes: list[str]
    value: str = ""
    """The number to remember."""

    @property
    def grid(self) -> str:
        """Make the path of the lines across."""
        return "".join(f"M0,{SIDE * tick.at / 100:.0f}H{SIDE}" for tick in self.y_ticks)


@dataclass(frozen=True)
class _Frame:
    """What the axes cover."""

    first: float
    last: float
    low: float
    high: float

    def x(self, steps: np.ndarray) -> np.ndarray:
        span = self.last - self.first
        return SIDE * (steps - self.first) / span if span else np.full(len(steps), SIDE / 2)

    def y(self, values: np.ndarray) -> np.ndarray:
        return SIDE * (1 - (values - self.low) / (self.high - self.low))


def chart(
    title: str,
    series: Sequence[Series],
    unit: Unit = NUMBER,
    from_zero: bool = False,
    value: str = "",
    notes: Sequence[str] = (),
    marks: Sequence[float] = (),
    axis: str = "step",
) -> Chart:
    """Lay out a chart.

    Args:
        axis: what the values stand against, in the singular.
        from_zero: let the y axis begin at zero.
        value: the number to remember.
        marks: steps to be marked on the x axis.
    """
    series = [_clipped(one) for one in series]
    # An average trails behind its values: by as many steps in every run, or curves could not be compared.
    window = max((len(one.steps) for one in series if one.is_smoothed), default=0) / 80
    strong = [moving_average(one.values, window) if one.is_smoothed else one.values for one in series]
    low, high, step, is_cut = _y_axis(series, strong, from_zero)
    steps = np.concatenate([one.steps for one in series] or [np.ones(1)])
    frame = _Frame(float(np.nanmin(steps)), float(np.nanmax(steps)), low, high)
    heights = [frame.y(values) for values in strong]
    dashes = _dashes(series, heights)
    is_faint_drawn = len(series) <= MOST_FAINT
    curves = [
        Curve(
            one.name,
            one.number,
            one.number % HUES,
            _faint(one, frame) if is_faint_drawn else "",
            _strong(one, of_one, frame),
            *dash,
        )
        for one, of_one, dash in zip(series, heights, dashes, strict=True)
    ]
    cut = ["Values beyond the axis are cut off."] if is_cut else []
    return Chart(
        title=title,
        curves=curves,
        x_ticks=_x_ticks(frame, axis),
        y_ticks=_y_ticks(frame, step, unit),
        strips=_strips(series, frame, unit, axis),
        marks=_marks(np.array(marks, float), frame),
        summary=f"{title}. " + " ".join(filter(None, (_summary(one, unit, axis) for one in series[:3]))),
        notes=[*notes, *cut],
        value=value,
    )


def _clipped(series: Series) -> Series:
    values = np.where(np.isfinite(series.values), np.clip(series.values, -LARGEST, LARGEST), np.nan)
    values[np.abs(values) < 1 / LARGEST] = 0
    return Series(series.name, series.steps, values, series.number, series.is_smoothed)


def _y_axis(
    series: Sequence[Series], strong: Sequence[np.ndarray], from_zero: bool
) -> tuple[float, float, float, bool]:
    """Choose the range of the y axis, the step between its numbers, and say whether it cuts values off."""
    everything = _finite([*strong, *(one.values for one in series)])
    if not len(everything):
        return 0.0, 1.0, 0.5, False
    least, most = float(everything.min()), float(everything.max())
    low, high = np.percentile(everything, [1, 99]).tolist()
    reach = REACH * (high - low) or most - least
    low, high = max(least, low - reach), min(most, high + reach)
    is_cut = low > least or high < most
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    span = LEAST_SPAN * max(abs(low), abs(high)) or 1.0
    if high - low < span:
        middle = (low + high) / 2
        low, high = middle - span / 2, middle + span / 2
    step = _nice_step(high - low)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step, is_cut


def _finite(arrays: Sequence[np.ndarray]) -> np.ndarray:
    values = np.concatenate([np.zeros(0), *arrays])
    return values[np.isfinite(values)]


def _nice_step(span: float, most: int = 4) -> float:
    """Choose a round step, of which at most about ``most`` fit into a span."""
    size = 10.0 ** math.floor(math.log10(span / most))
    return next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= span / most * 0.999)


def _y_ticks(frame: _Frame, step: float, unit: Unit) -> list[Tick]:
    values = [frame.low + i * step for i in range(round((frame.high - frame.low) / step) + 1)]
    largest = unit.factor * max(abs(frame.low), abs(frame.high))
    return [
        Tick(round(float(100 * (frame.high - v) / (frame.high - frame.low)), 2), _axis_text(v, step, largest, unit))
        for v in values
    ]


def _axis_text(value: float, step: float, largest: float, unit: Unit) -> str:
    """Write a number of an axis with as many decimals as its step needs, large and small ones by their size."""
    value, step = unit.factor * value, unit.factor * step
    if abs(value) < step / 1000:
        return f"0{unit.sign}"
    scale, suffix = 1.0, ""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size <= largest < 1e16:
            scale, suffix = (1e3 if letter == "k" else size), letter
            break
    if largest >= 1e16 or largest < 1e-2:
        exponent = math.floor(math.log10(largest))
        return f"{value / 10.0**exponent:.3g}e{exponent}{unit.sign}".replace("-", numbers.MINUS)
    decimals = next((d for d in range(4) if abs(round(step / scale, d) - step / scale) < 1e-6 * step / scale), 4)
    return f"{value / scale:.{decimals}f}{suffix}{unit.sign}".replace("-", numbers.MINUS)


def _x_ticks(frame: _Frame, axis: str) -> list[Tick]:
    if frame.last == frame.first:
        return [Tick(50.0, f"{axis} {frame.first:,.0f}")]
    step = max(1.0, _nice_step(frame.last - frame.first, 5))
    values = np.arange(math.ceil(frame.first / step), math.floor(frame.last / step) + 1) * step
    if not len(values):
        values = np.array([frame.last])
    texts = [_step_text(value) for value in values]
    texts[0] = f"{axis} {texts[0]}"
    return [Tick(round(float(at) / SIDE * 100, 2), text) for text, at in zip(texts, frame.x(values), strict=True)]


def _step_text(step: float) -> str:
    if step >= 1e6:
        return f"{step / 1e6:g}M"
    return f"{step / 1000:g}k" if step >= 1e4 else f"{step:,.0f}"


def _strong(series: Series, heights: np.ndarray, frame: _Frame) -> str:
    """Join points of a curve, the last one among them."""
    chosen = np.unique(np.linspace(0, len(heights) - 1, min(POINTS, len(heights))).round().astype(int))
    if not series.is_smoothed:  # gaps between few values are no gaps in what was measured
        chosen = chosen[np.isfinite(heights[chosen])]
    return _path(frame.x(series.steps[chosen]), heights[chosen])


def _faint(series: Series, frame: _Frame) -> str:
    """Join the values themselves: all of them, or the least and the most of each of many parts."""
    if not series.is_smoothed:
        return ""
    x, y = frame.x(series.steps), frame.y(series.values)
    if len(x) <= 2 * POINTS:
        return _path(x, y)
    joined = []
    for part in np.array_split(np.arange(len(x)), POINTS):
        part = part[np.isfinite(y[part])]
        ends = [part[y[part].argmin()], part[y[part].argmax()]] if len(part) else []
        joined += sorted(ends)
    return _path(x[joined], y[joined])


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """Join points; NaN leaves a gap, and a point between gaps is a dot."""
    pieces, is_down = [], False
    y = np.clip(y, -SIDE, 2 * SIDE)
    for i, (across, down) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        if not math.isfinite(down):
            is_down = False
            continue
        pieces.append(f"{'L' if is_down else 'M'}{across:.1f},{down:.1f}")
        if not is_down and (i + 1 == len(y) or not math.isfinite(y[i + 1])):
            pieces.append("h.1")
        is_down = True
    return "".join(pieces)


def _dashes(series: Sequence[Series], heights: Sequence[np.ndarray]) -> list[tuple[str, float]]:
    """Give each curve a dash and its shift; curves that lie on each other take turns, so that none hides another."""
    groups: list[list[int]] = []
    for i in range(len(series)):
        group = next((g for g in groups if _look_same(series[g[0]], heights[g[0]], series[i], heights[i])), None)
        if group is None:
            groups.append([i])
        else:
            group.append(i)
    dashes = [(DASHES[one.number // HUES % len(DASHES)], 0.0) for one in series]
    for group in groups:
        for turn, i in enumerate(group):
            if len(group) > 1:
                dashes[i] = f"{DASH} {DASH * (len(group) - 1)}", float(-DASH * turn)
    return dashes


def _look_same(one: Series, heights: np.ndarray, other: Series, other_heights: np.ndarray) -> bool:
    if not np.array_equal(one.steps, other.steps):
        return False
    return bool(np.allclose(heights, other_heights, rtol=0, atol=SAME, equal_nan=True)) and bool(
        np.isfinite(heights).any()
    )


def _strips(series: Sequence[Series], frame: _Frame, unit: Unit, axis: str) -> list[Strip]:
    """Cut the width into parts and say of each what the values are in it."""
    count = min(STRIPS, max((len(one.steps) for one in series), default=0))
    texts: dict[int, list[str]] = {}
    spans: dict[int, tuple[float, float]] = {}
    for one in series:
        parts = np.clip((frame.x(one.steps) / SIDE * count).astype(int), 0, max(count - 1, 0))
        for part in np.unique(parts[np.isfinite(one.values)]).tolist():
            inside = parts == part
            steps = one.steps[inside]
            first, last = spans.get(part, (math.inf, -math.inf))
            spans[part] = min(first, steps.min()), max(last, steps.max())
            mean = unit.text(float(np.nanmean(one.values[inside])))
            texts.setdefault(part, []).append(f"{one.name}: {mean}" if one.name else mean)
    width = SIDE / count if count else SIDE
    strips = []
    for part, lines in sorted(texts.items()):
        first, last = spans[part]
        head = f"{axis} {first:,.0f}" if first == last else f"{axis}s {first:,.0f} to {last:,.0f}, mean"
        strips.append(Strip(round(part * width, 1), round(width, 1), "\n".join([head, *lines])))
    return strips


def _marks(steps: np.ndarray, frame: _Frame) -> str:
    x = np.unique(frame.x(steps).round().astype(int)) if len(steps) else np.zeros(0, int)
    return "".join(f"M{at},{SIDE - 70}V{SIDE}" for at in x.tolist())


def _summary(series: Series, unit: Unit, axis: str) -> str:
    finite = np.flatnonzero(np.isfinite(series.values))
    if not len(finite):
        return ""
    first, last = finite[0], finite[-1]
    name = f"{series.name}: " if series.name else ""
    ends = [
        f"{unit.text(float(series.values[i]))} at {axis} {series.steps[i]:,.0f}" for i in dict.fromkeys((first, last))
    ]
    return f"{name}{', '.join(ends)}."
