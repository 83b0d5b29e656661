"""Linear probe: how much a linear classifier reads from frozen features."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Weights of the L2 penalty that are tried on a fifth of the training images, which validates."""
ITERATIONS = 150
"""Of the solver at most; answers no longer change by then."""
BASELINE_ITERATIONS = 40
"""Of the baseline on raw pixels, which are thousands of numbers and would take most of the time of all."""
TOLERANCE = 1e-6
"""Change of the summed losses below which the solver ends."""
MOST_TURNED = 2048
"""Features that are turned to their own axes; of more that would take longer than it saves."""
LEAST_IMAGES = 10
"""Labelled images that train a probe, and as many that test it; accuracies of fewer say nothing."""
LEAST_CLASSES = 2


def class_of(labels: Mapping[str, Any], name: str) -> str | None:
    """Return the value of one image's label as a class; None where it has none, or one that names no class."""
    value = labels.get(name)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, (str, int, float)) else None


class ProbeImages:
    """Which classes the images have that train and test one probe."""

    def __init__(self) -> None:
        self.train: Counter[str] = Counter()
        self.test: Counter[str] = Counter()

    def add(self, value: str | None, is_test: bool) -> None:
        if value is not None:
            (self.test if is_test else self.train)[value] += 1

    def total(self) -> int:
        return self.train.total() + self.test.total()

    def shortage(self) -> str | None:
        """Say why there can be no probe; None if there can."""
        if not self.total():
            return "no image has this label"
        counts = self.train.total(), self.test.total()
        shared = len(self.train.keys() & self.test.keys())
        if min(counts) >= LEAST_IMAGES and shared >= LEAST_CLASSES:
            return None
        return (
            f"of the labelled images {counts[0]} would train and {counts[1]} test it, with {shared} classes in both; "
            f"it needs {LEAST_IMAGES} each, with {LEAST_CLASSES} classes"
        )


@dataclass(frozen=True)
class ProbeResult:
    """What a probe finds out about the test images."""

    hits: Tensor
    """bool [T], which of them it gets right."""
    penalty: float

    @property
    def accuracy(self) -> float:
        return float(self.hits.float().mean())


def pixel_features(pixels: Sequence[np.ndarray]) -> Tensor:
    """Flatten uint8 [3, H, W] each to fp32 [M, 3*H*W]: the baseline without an encoder."""
    return torch.from_numpy(np.stack(pixels).reshape(len(pixels), -1)).float() / 255


def linear_probe(
    features: Tensor,
    classes: Tensor,
    train: Tensor,
    test: Tensor,
    penalties: Sequence[float] = PENALTIES,
    iterations: int = ITERATIONS,
) -> ProbeResult:
    """Try multinomial logistic regression on standardised frozen features.

    The L2 penalty is chosen on every fifth training image, then the classifier is fitted on all of them.

    Args:
        features: [M, D].
        classes: int64 [M].
        train, test: disjoint int64 indices.
        penalties: one is taken as it is.
        iterations: of the solver at most.
    """
    mean, std = features[train].mean(0), features[train].std(0).clamp(min=1e-6)
    count = int(classes.max()) + 1

    def standardised(rows: Tensor) -> Tensor:
        return (features[rows] - mean) / std

    best = penalties[0]
    if len(penalties) > 1:
        held = torch.arange(len(train)) % 5 == 0
        fit, validation = train[~held], train[held]
        fitted = fit_logistic(standardised(fit), classes[fit], count, penalties, iterations)
        seen = standardised(validation)
        scores = [float((one.logits(seen).argmax(1) == classes[validation]).float().mean()) for one in fitted]
        best = penalties[int(np.argmax(scores))]
    (classifier,) = fit_logistic(standardised(train), classes[train], count, [best], iterations)
    return ProbeResult(classifier.logits(standardised(test)).argmax(1) == classes[test], best)


@dataclass(frozen=True)
class Classifier:
    """A linear classifier."""

    weight: Tensor
    """[D, C]."""
    bias: Tensor
    """[C]."""

    def logits(self, features: Tensor) -> Tensor:
        return features @ self.weight + self.bias


def fit_logistic(
    features: Tensor,
    classes: Tensor,
    count: int,
    penalties: Sequence[float],
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
) -> list[Classifier]:
    """Minimise the mean cross-entropy plus ``penalty`` times the squared weights (not biases), for every penalty.

    All are solved at once, as blocks of one problem, because reading the features is what takes time. Features are
    turned to the axes of their own spread, and steps along each are scaled by the curvature there: of the few hundred
    that correlated features would take, some dozens remain.
    """
    axes, scale = _axes(features, count, penalties)
    turned = features @ axes if axes is not None else features
    steps = torch.zeros(features.shape[1], len(penalties), count, dtype=features.dtype, requires_grad=True)
    bias = torch.zeros(len(penalties), count, dtype=features.dtype, requires_grad=True)
    strength = torch.tensor(penalties, dtype=features.dtype)
    targets = classes[:, None].expand(-1, len(penalties))
    optimizer = torch.optim.LBFGS(
        [steps, bias], max_iter=iterations, tolerance_change=tolerance, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weight = scale[..., None] * steps
        logits = (turned @ weight.flatten(1)).view(len(turned), len(penalties), count) + bias
        fit = F.cross_entropy(logits.transpose(1, 2), targets, reduction="sum") / len(turned)
        loss = fit + (strength * weight.square().sum((0, 2))).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = (scale[..., None] * steps).detach()
    if axes is not None:
        weight = (axes @ weight.flatten(1)).view_as(weight)
    blocks = zip(weight.unbind(1), bias.detach().unbind(0), strict=True)
    return [Classifier(block, offset) for block, offset in blocks]


def _axes(features: Tensor, count: int, penalties: Sequence[float]) -> tuple[Tensor | None, Tensor]:
    """Find the axes of the features' spread and what steps along each are scaled by, for every penalty.

    Returns:
        Orthogonal [D, D], None where features are so many that they are taken as they are; and [D, P].
    """
    axes = None
    if features.shape[1] <= MOST_TURNED:
        spread, axes = torch.linalg.eigh(features.T @ features / len(features))
    else:
        spread = features.square().mean(0)
    strength = torch.tensor(penalties, dtype=features.dtype)
    return axes, (spread.clamp(min=0)[:, None] / count + 2 * strength).rsqrt()
