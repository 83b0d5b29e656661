"""Measure retrieval: does an image find the context that announced it, or its captions, and they the image?"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcl_ds.data.stream.packing import PackedSequence, Row, collate, pack
from lcl_ds.evaluation.intervals import wilson
from lcl_ds.evaluation.results import Figure
from lcl_ds.models.network import LCLModel
from lcl_ds.models.placement import device_of
from lcl_ds.tokens import Vocabulary

LEAST_PAIRS = 2
"""Fewer say nothing: any model finds a single image among one."""
RECALLS = (1, 5, 10)
QUERIES = 1024
"""Queries that are ranked at a time: all at once would need a table of their number squared."""


@dataclass(frozen=True)
class PairFeatures:
    """Features of all images that have context; row i of each belongs together."""

    image: Tensor
    """fp32 [K, D], L2-normalised."""
    context: Tensor
    """fp32 [K, D], L2-normalised."""
    pixels: np.ndarray
    """uint8 [K, 3, H, W]."""
    context_ids: list[np.ndarray]
    """Token ids before the position where each context is read, from the beginning of its passage."""


def too_few_pairs(count: int) -> str:
    """Say that there are fewer pairs than :data:`LEAST_PAIRS`."""
    return (
        f"image-to-context retrieval is left out: images with text that announces them: {count}, needed: {LEAST_PAIRS}"
    )


@torch.no_grad()
def pair_features(
    model: LCLModel,
    sequences: list[PackedSequence],
    vocabulary: Vocabulary,
    row_tokens: int,
    row_images: int,
    rows_per_batch: int = 16,
) -> PairFeatures:
    """Run held-out documents, packed as in training, and collect contrastive features.

    Args:
        sequences: with at least one contrastive pair among them.
    """
    device = device_of(model)
    lengths = [len(sequence.tokens.input_ids) for sequence in sequences]
    images = [len(sequence.pixels) for sequence in sequences]
    packed = pack(lengths, images, row_tokens, row_images)
    image_features, context_features, pixels, context_ids = [], [], [], []
    readouts = sorted({"context"}.union(*(sequence.tokens.readouts for sequence in sequences)))
    for start in range(0, len(packed), rows_per_batch):
        rows = [Row(tuple(sequences[i] for i in row)) for row in packed[start : start + rows_per_batch]]
        batch = collate(rows, row_tokens, sequences[0].pixels.shape[-1], vocabulary, readouts).to(device)
        hidden_states, pooled = model(batch)
        image, context = model.pair_features(hidden_states, pooled, batch)
        image_features.append(image.float().cpu())
        context_features.append(context.float().cpu())
        for sequence in (sequence for row in rows for sequence in row.sequences):
            tokens = sequence.tokens
            for position, number in tokens.readouts["context"]:
                pixels.append(sequence.pixels[tokens.images.index(number)])
                passage = max(begin for begin in tokens.starts if begin <= position)
                context_ids.append(tokens.input_ids[passage:position])
    return PairFeatures(torch.cat(image_features), torch.cat(context_features), np.stack(pixels), context_ids)


def retrieval_scores(queries: Tensor, targets: Tensor) -> dict[str, Any]:
    """Rank each query's own target among all targets by inner product, and each target's own query.

    Args:
        queries, targets: [K, D]; row i of each belongs together.

    Returns:
        ``recall_at_1``, ``recall_at_5``, ``recall_at_10``, ``median_rank`` (1 is best), ``chance`` (of recall at 1),
        ``pairs``, and under ``reverse`` the recalls and the median rank of targets that look for their queries.
    """
    own = torch.arange(len(queries))
    return {
        "pairs": len(queries),
        **_scores(best_ranks(queries, targets, own, own)),
        "chance": 1 / len(queries),
        "reverse": _scores(best_ranks(targets, queries, own, own)),
    }


def _scores(ranks: Tensor) -> dict[str, float]:
    recalls = {f"recall_at_{k}": float((ranks <= k).float().mean()) for k in RECALLS}
    return {**recalls, "median_rank": float(ranks.float().median())}


def retrieval_figures(images: Tensor, contexts: Tensor, dataset: str) -> list[Figure]:
    """Make the figures of images and contexts that belong together row by row, both ways."""
    own = torch.arange(len(images))
    return [
        *recalls("image_to_context", best_ranks(images, contexts, own, own), dataset, len(own)),
        *recalls("context_to_image", best_ranks(contexts, images, own, own), dataset, len(own)),
    ]


def recalls(way: str, ranks: Tensor, dataset: str, candidates: int) -> Iterator[Figure]:
    """Make the figures of one way of searching.

    Args:
        ranks: int64 [Q] of the best right target, 1 is best.
        candidates: how many targets each query is compared with.
    """
    for k in RECALLS:
        hits = int((ranks <= k).sum())
        yield Figure(
            f"retrieval {way}",
            dataset,
            f"recall_at_{k}",
            hits / len(ranks),
            wilson(hits, len(ranks)),
            len(ranks),
            chance=min(1.0, k / candidates),
            settings={"candidates": candidates},
        )


def best_ranks(queries: Tensor, targets: Tensor, query_owner: Tensor, target_owner: Tensor) -> Tensor:
    """Find the rank of the best target that belongs to each query's owner, as an image has several captions.

    Args:
        queries: [Q, D].
        targets: [T, D].
        query_owner, target_owner: int64 [Q] and [T]; what has the same number belongs together. Every query's has one.

    Returns:
        int64 [Q], 1 is best. Ties count against the model, and so do values that are not numbers: a constant feature
        must not look perfect. Other targets of the same owner that rank before do not count.
    """
    ranks = []
    for rows in torch.arange(len(queries)).split(QUERIES):
        similarity = queries[rows] @ targets.T
        own = query_owner[rows, None] == target_owner
        best = similarity.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + (~(similarity < best) & ~own).sum(1))
    return torch.cat(ranks)
