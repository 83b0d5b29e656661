"""Measure what held-out documents show of an encoder: the tasks of ``evaluation.tasks`` that predict labels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lcl_ds.evaluation.encoder import Kind
from lcl_ds.evaluation.features import PatchTokens
from lcl_ds.evaluation.probe import class_of
from lcl_ds.evaluation.probes import Probed, ProbeOptions, Split, attentive, linear, nearest, split_of
from lcl_ds.evaluation.results import Figure

PROBES: dict[str, Callable[[Probed], Iterator[Figure]]] = {"linear": linear, "attentive": attentive, "knn": nearest}
"""By their names in ``evaluation.tasks``."""
NAME = "held-out documents"
"""Of the data set, in figures."""
PATCH_BYTES = 4 << 30
"""Patch tokens that are kept in memory; more are made anew for every batch of an attentive probe."""


@dataclass
class Labelled:
    """Features of held-out images and the splits of their labels."""

    splits: list[Split]
    vectors: Mapping[Kind, Tensor]
    make_patches: Callable[[], PatchTokens]
    name: str = NAME
    probe_options: ProbeOptions = field(default_factory=ProbeOptions)
    notes: list[str] = field(default_factory=list)
    _patches: PatchTokens | None = None

    @property
    def patches(self) -> PatchTokens:
        """Give the patch tokens, which are made once they are needed."""
        if self._patches is None:
            self._patches = self.make_patches()
        return self._patches


def splits_of(
    names: Sequence[str], labels: Sequence[Mapping[str, Any]], is_test: Sequence[bool]
) -> tuple[list[Split], list[str]]:
    """Split images by each label that is wanted.

    Args:
        names: of the labels.
        labels: of every image, as documents carry them.

    Returns:
        Splits, and a sentence about each label without one.
    """
    found = [split_of(name, [class_of(of_image, name) for of_image in labels], is_test) for name in names]
    splits = [split for split in found if isinstance(split, Split)]
    return splits, [reason for reason in found if isinstance(reason, str)]
