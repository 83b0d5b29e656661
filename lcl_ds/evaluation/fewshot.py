"""Few-shot classification: a linear classifier on a handful of images of each class, over several draws."""

import numpy as np
import torch
from torch import Tensor

from lcl_ds.evaluation.probe import linear_probe

SHOTS = (1, 5, 10)
"""Training images of each class."""
DRAWS = 10
"""How often they are drawn."""
PENALTY = 1e-2
"""Of the classifier: so few images leave none to choose it by."""


def fewshot(
    features: Tensor, classes: Tensor, train: Tensor, test: Tensor, shots: int, draws: int = DRAWS
) -> np.ndarray | None:
    """Measure the accuracy of classifiers that are trained on ``shots`` images of each class.

    Returns:
        float64 [draws]; None where a class has fewer training images.
    """
    by_class = [train[classes[train] == number] for number in classes[train].unique().tolist()]
    if min(map(len, by_class)) < shots:
        return None
    generator = torch.Generator().manual_seed(0)
    accuracies = []
    for _ in range(draws):
        drawn = torch.cat([of[torch.randperm(len(of), generator=generator)[:shots]] for of in by_class])
        accuracies.append(linear_probe(features, classes, drawn, test, [PENALTY]).accuracy)
    return np.array(accuracies)
