"""Choose which source the next sample comes from."""

from collections.abc import Mapping, Sequence

import numpy as np

from lcl_ds.data.documents import IMAGE_SUFFIXES
from lcl_ds.data.settings import weight_at
from lcl_ds.data.shards.source import Source
from lcl_ds.errors import UserError

MEASURED_SAMPLES = 1000
"""Samples of a source, spread over it, whose images are counted."""


def change_steps(sources: Sequence[Source]) -> list[int]:
    """List the steps at which the weight of a source changes, 0 among them, in order."""
    return sorted({0, *(step for source in sources if isinstance(source.weight, Mapping) for step in source.weight)})


def spread_samples(source: Source, count: int) -> list[int]:
    """Choose up to ``count`` samples, spread evenly over the source."""
    return np.unique(np.linspace(0, len(source) - 1, count).astype(np.int64)).tolist()


def images_per_sample(source: Source) -> float:
    """Count the image members of a sample in the mean, from the index alone."""
    numbers = spread_samples(source, MEASURED_SAMPLES)
    suffixes = [suffix for number in numbers for suffix in source.sample(number).members]
    return sum(suffix.rsplit(".", 1)[-1] in IMAGE_SUFFIXES for suffix in suffixes) / len(numbers)


class Mixture:
    """The fraction of draws that each source gets, by step.

    Args:
        sources: with their weights.
        by: ``samples``: a weight is a fraction of samples; ``images``: of images, so that two sources of equal weights
            give as many images each (the paper's LAION and MMC4), whatever a sample holds.

    Raises:
        UserError: a source is to be mixed by images and has none.
    """

    def __init__(self, sources: Sequence[Source], by: str = "samples"):
        self._weights = [source.weight for source in sources]
        images = [images_per_sample(source) if by == "images" else 1.0 for source in sources]
        for source, count in zip(sources, images, strict=True):
            if count == 0:
                raise UserError(f"data.mix_by: images: source {source.name} has no images; mix by samples")
        self._per_sample = np.array(images)
        self._fractions: dict[tuple[float, ...], np.ndarray] = {}

    def fractions(self, step: int) -> np.ndarray:
        """Return the fraction of draws of each source at ``step``, float64 [sources]."""
        weights = tuple(weight_at(weight, step) for weight in self._weights)
        if weights not in self._fractions:
            fractions = np.array(weights) / self._per_sample
            self._fractions[weights] = fractions / fractions.sum()
        return self._fractions[weights]

    def choose(self, step: int, draw: float) -> int:
        """Choose the source that ``draw``, uniform in [0, 1), falls on at ``step``."""
        fractions = self.fractions(step)
        chosen = int(np.searchsorted(np.cumsum(fractions), draw, side="right"))
        # The last edge may be rounded to a little below 1; a source of weight 0 is never chosen.
        return min(chosen, int(np.nonzero(fractions)[0][-1]))
