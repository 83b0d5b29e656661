"""Measure image-to-context retrieval: does an image find the context that announced it?"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lcl_ds.data.stream.packing import PackedSequence, Row, collate, pack
from lcl_ds.models.network import LCLModel
from lcl_ds.tokens import Vocabulary

LEAST_PAIRS = 2
"""Fewer say nothing: any model finds a single image among one."""
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
    device = next(model.parameters()).device
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
        image_features.append(image.cpu())
        context_features.append(context.cpu())
        for sequence in (sequence for row in rows for sequence in row.sequences):
            tokens = sequence.tokens
            for position, number in tokens.readouts["context"]:
                pixels.append(sequence.pixels[tokens.images.index(number)])
                passage = max(begin for begin in tokens.starts if begin <= position)
                context_ids.append(tokens.input_ids[passage:position])
    return PairFeatures(torch.cat(image_features), torch.cat(context_features), np.stack(pixels), context_ids)


def retrieval_scores(queries: Tensor, targets: Tensor) -> dict[str, float]:
    """Rank each query's own target among all targets by inner product.

    Args:
        queries, targets: [K, D]; row i of each belongs together.

    Returns:
        ``recall_at_1``, ``recall_at_5``, ``median_rank`` (1 is best), ``chance`` (of recall at 1) and ``pairs``.
    """
    ranks = []
    for start in range(0, len(queries), QUERIES):
        similarity = queries[start : start + QUERIES] @ targets.T
        own = similarity.diagonal(start)[:, None]
        # Ties count against the model, and so do values that are not numbers: a constant feature must not look perfect.
        ranks.append((~(similarity < own)).sum(1))
    rank = torch.cat(ranks).float()
    return {
        "pairs": len(queries),
        "recall_at_1": float((rank <= 1).float().mean()),
        "recall_at_5": float((rank <= 5).float().mean()),
        "median_rank": float(rank.median()),
        "chance": 1 / len(queries),
    }
