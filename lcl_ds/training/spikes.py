"""Recognise a step whose gradients or loss are far from what they usually are.

What is usual is the median over the last applied steps. Losses and norms of a step are the same on all ranks, so all of
them judge alike, and what was remembered is saved with a checkpoint, so that a continued run judges as an uninterrupted
one.
"""

import math
from dataclasses import dataclass
from statistics import median

REMEMBERED = 100
"""Applied steps that the usual values are taken from."""
ENOUGH = 5
"""Steps that must be remembered before a norm is judged; a loss before that only when it is ``factor`` times as large.
"""
LEAST_SPREAD = 0.01
"""Of the usual loss: a loss that hardly varies is not a spike as soon as it varies a little more."""
SPREAD_OF_MEDIAN = 1.4826
"""Makes the median distance from the median a standard deviation, where values are normally distributed."""

RecentSteps = dict[str, list[float]]
"""``loss`` and ``grad_norm`` of the last applied steps, oldest first; JSON."""


@dataclass(frozen=True)
class Spike:
    """A number of one step that is far above its usual value."""

    name: str
    """``loss`` or ``grad_norm``."""
    value: float
    usual: float

    def __str__(self) -> str:
        what = {"loss": "loss", "grad_norm": "gradient norm"}[self.name]
        return f"{what} {self.value:.4g}, usually {self.usual:.4g}"


def norm_limit(recent: RecentSteps, factor: float) -> float:
    """Return the gradient norm above which a step is a spike; infinite as long as too little is known."""
    norms = recent.get("grad_norm", [])
    usual = median(norms) if len(norms) >= ENOUGH else 0.0
    return factor * usual if usual > 0 else math.inf


def loss_limit(recent: RecentSteps, factor: float) -> float:
    """Return the loss above which a step is a spike: ``factor`` times the usual spread above the usual loss."""
    losses = recent.get("loss", [])
    usual = median(losses) if losses else 0.0
    if len(losses) < ENOUGH:  # a learning rate far too high shows at once
        return factor * usual if usual > 0 else math.inf
    spread = SPREAD_OF_MEDIAN * median(abs(loss - usual) for loss in losses)
    return usual + factor * max(spread, LEAST_SPREAD * abs(usual))


def find_spike(recent: RecentSteps, factor: float, loss: float, grad_norm: float) -> Spike | None:
    """Say what of a step is far above its usual value; the gradient norm first, which is what does the damage."""
    if grad_norm > norm_limit(recent, factor):
        return Spike("grad_norm", grad_norm, median(recent["grad_norm"]))
    if loss > loss_limit(recent, factor):
        return Spike("loss", loss, median(recent["loss"]))
    return None


def remember(recent: RecentSteps, loss: float, grad_norm: float) -> None:
    """Add an applied step to ``recent``."""
    for name, value in (("loss", loss), ("grad_norm", grad_norm)):
        values = recent.setdefault(name, [])
        if math.isfinite(value):
            values.append(value)
        del values[:-REMEMBERED]
