"""Linear probe: how much a linear classifier reads from frozen features."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcl_ds.models.vision import VisionEncoder

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Weights of the L2 penalty that are tried on a validation part of the training images."""


@torch.no_grad()
def encoder_features(encoder: VisionEncoder, pixels: np.ndarray, batch_size: int = 256) -> Tensor:
    """uint8 [M, 3, H, W] -> mean patch token, fp32 [M, width] on the CPU."""
    device = next(encoder.parameters()).device
    parts = []
    for start in range(0, len(pixels), batch_size):
        images = torch.from_numpy(pixels[start : start + batch_size]).to(device)
        parts.append(encoder(encoder.normalize(images)).float().mean(1).cpu())
    return torch.cat(parts)


def pixel_features(pixels: np.ndarray) -> Tensor:
    """uint8 [M, 3, H, W] -> fp32 [M, 3*H*W]: the baseline without an encoder."""
    return torch.from_numpy(pixels.reshape(len(pixels), -1)).float() / 255


def linear_probe(features: Tensor, classes: Tensor, train: Tensor, test: Tensor) -> float:
    """Accuracy of multinomial logistic regression on standardised frozen features.

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
