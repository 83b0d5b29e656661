"""Which source the next sample comes from."""

from collections.abc import Mapping, Sequence

import numpy as np

from lcl_ds.data.documents import IMAGE_SUFFIXES
from lcl_ds.data.shards import Source
from lcl_ds.errors import UserError

MEASURED_SAMPLES = 1000
"""Samples of a source, spread over it, whose images are counted."""

Weight = float | Mapping[int, float]
"""Constant, or by the step from which on it holds."""


def weight_at(weight: Weight, step: int) -> float:
    """The weight that holds at ``step``."""
    if not isinstance(weight, Mapping):
        return float(weight)
    return float(weight[max(first for first in weight if first <= step)])


def images_per_sample(source: Source) -> float:
    """Mean number of image members of a sample, from the index alone."""
    numbers = np.unique(np.linspace(0, len(source) - 1, MEASURED_SAMPLES).astype(np.int64))
    suffixes = [suffix for number in numbers for suffix in source.sample(int(number)).parts]
    return sum(suffix.rsplit(".", 1)[-1] in IMAGE_SUFFIXES for suffix in suffixes) / len(numbers)


class Mixture:
    """Shares of draws by step.

    Args:
        sources: with their weights.
        by: ``samples``: a weight is a share of samples; ``images``: of images, so that two sources of equal weights
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
        self._edges: dict[tuple[float, ...], np.ndarray] = {}

    def choose(self, step: int, draw: float) -> int:
        """The source that ``draw``, uniform in [0, 1), falls on at ``step``."""
        weights = tuple(weight_at(weight, step) for weight in self._weights)
        if weights not in self._edges:
            shares = np.array(weights) / self._per_sample
            self._edges[weights] = np.cumsum(shares / shares.sum())
        chosen = int(np.searchsorted(self._edges[weights], draw, side="right"))
        # The last edge may be rounded to a little below 1; a source of weight 0 has no share to fall on.
        return min(chosen, max(i for i, weight in enumerate(weights) if weight > 0))
