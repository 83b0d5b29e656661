"""Values as bars, with what they are compared with."""

from dataclasses import dataclass, field

Range = tuple[float, float]


@dataclass(frozen=True)
class Bar:
    """One value."""

    name: str
    value: float | None
    """None: there is none."""
    text: str
    """The value as people read it."""
    interval: Range | None = None
    number: int | None = None
    """Of the run in a comparison."""
    is_baseline: bool = False
    """Whether it is what others are compared with."""
    is_best: bool = False
    change: str = ""
    """Against the first run."""


@dataclass(frozen=True)
class Bars:
    """Values of one kind, drawn from zero to the end of their scale."""

    title: str
    bars: list[Bar]
    most: float = 1.0
    """The end of the scale."""
    chance: float | None = None
    """What guessing gives."""
    sentences: list[str] = field(default_factory=list)
    interval_name: str = "95 % confidence"
    """What the intervals of the bars are."""
    in_percent: bool = True
    """Whether values are fractions, which people read in percent."""

    def width(self, value: float) -> str:
        """Write a value as percent of the scale."""
        fraction = value / self.most if self.most else 0.0
        return f"{100 * min(max(fraction, 0.0), 1.0):.2f}"

    def ends(self, interval: Range) -> str:
        """Write an interval as people read it, without a unit."""
        low, high = (f"{100 * end:.1f}" if self.in_percent else f"{end:.4g}" for end in interval)
        return f"{low} to {high}"
