"""k nearest neighbours: what the most similar training images say of a test image."""

import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS = 20
TEMPERATURE = 0.07
"""Of the votes' weights, ``exp(cosine / temperature)``, as in DINO's evaluation."""
QUERIES = 1024
"""Test images that are compared at a time."""


def knn(features: Tensor, classes: Tensor, train: Tensor, test: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Let the nearest training images by cosine vote on every test image.

    Args:
        features: [M, D].
        classes: int64 [M].
        train, test: disjoint int64 indices.

    Returns:
        bool [len(test)], which are right.
    """
    normed = F.normalize(features, dim=1)
    bank, targets = normed[train], classes[train]
    count = int(classes.max()) + 1
    hits = []
    for rows in test.split(QUERIES):
        similarity, nearest = (normed[rows] @ bank.T).topk(min(neighbours, len(train)), dim=1)
        # Relative to the nearest one: weights of similarities near 1 would overflow nothing, but those near -1 vanish.
        weights = ((similarity - similarity[:, :1]) / TEMPERATURE).exp()
        votes = torch.zeros(len(rows), count, dtype=weights.dtype).scatter_add_(1, targets[nearest], weights)
        hits.append(votes.argmax(1) == classes[rows])
    return torch.cat(hits)
