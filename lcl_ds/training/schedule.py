"""Learning rate as a function of applied steps."""

import math

from lcl_ds.training.settings import TrainSettings


def learning_rate(applied_steps: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine down to ``min_learning_rate`` at ``steps`` (paper's recipe: cosine to 0).

    Args:
        applied_steps: optimizer steps applied so far; skipped steps do not advance the schedule.
    """
    if applied_steps < settings.warmup_steps:
        return settings.learning_rate * (applied_steps + 1) / settings.warmup_steps
    progress = (applied_steps - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.min_learning_rate + (settings.learning_rate - settings.min_learning_rate) * cosine
