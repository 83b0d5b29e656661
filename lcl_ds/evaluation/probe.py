"""Linear probe: how much a linear classifier reads from frozen features."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcl_ds.models.vision import VisionEncoder

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Weights of the L2 penalty that are tried on a fifth of the training images, which validates."""
LEAST_IMAGES = 10
"""Labelled images that train a probe, and as many that test it; accuracies of fewer say nothing."""
LEAST_CLASSES = 2


def class_of(labels: dict[str, Any], name: str) -> str | None:
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


@torch.no_grad()
def encoder_features(encoder: VisionEncoder, pixels: Sequence[np.ndarray], batch_size: int = 256) -> Tensor:
    """Encode uint8 [3, H, W] each to its mean patch token, fp32 [M, width] on the CPU."""
    device = next(encoder.parameters()).device
    features = []
    for start in range(0, len(pixels), batch_size):
        images = torch.from_numpy(np.stack(pixels[start : start + batch_size])).to(device)
        features.append(encoder(encoder.normalize(images)).float().mean(1).cpu())
    return torch.cat(features)


def pixel_features(pixels: Sequence[np.ndarray]) -> Tensor:
    """Flatten uint8 [3, H, W] each to fp32 [M, 3*H*W]: the baseline without an encoder."""
    return torch.from_numpy(np.stack(pixels).reshape(len(pixels), -1)).float() / 255


def linear_probe(features: Tensor, classes: Tensor, train: Tensor, test: Tensor) -> float:
    """Measure the accuracy of multinomial logistic regression on standardised frozen features.

    The L2 penalty is chosen on every fifth training image, then the classifier is fitted on all of them.

    Args:
        features: [M, D].
        classes: int64 [M].
        train, test: disjoint int64 indices.
    """
    mean, std = features[train].mean(0), features[train].std(0).clamp(min=1e-6)
    features = (features - mean) / std
    held = torch.arange(len(train)) % 5 == 0
    fit, validation = train[~held], train[held]
    count = int(classes.max()) + 1
    scores = [_accuracy(_fit(features[fit], classes[fit], count, p), features, classes, validation) for p in PENALTIES]
    best = PENALTIES[int(np.argmax(scores))]
    return _accuracy(_fit(features[train], classes[train], count, best), features, classes, test)


def _fit(features: Tensor, classes: Tensor, count: int, penalty: float) -> nn.Linear:
    classifier = nn.Linear(features.shape[1], count)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(features), classes) + penalty * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return classifier


@torch.no_grad()
def _accuracy(classifier: nn.Linear, features: Tensor, classes: Tensor, indices: Tensor) -> float:
    return float((classifier(features[indices]).argmax(1) == classes[indices]).float().mean())
