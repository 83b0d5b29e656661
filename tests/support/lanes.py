"""A small stream, and how its rows are compared."""

import json

import numpy as np

from lcl_ds.data.stream.lanes import LaneSettings
from lcl_ds.data.stream.loader import BatchLoader, merge_states

SETTINGS = LaneSettings(
    lanes=4, data_seed=1, augmentation_seed=2, row_tokens=256, row_images=12, image_tokens=16, image_size=32
)


def rows_of(lane, count):
    return [lane.next_row() for _ in range(count)]


def same(a, b):
    return all(
        x.key == y.key and np.array_equal(x.tokens.input_ids, y.tokens.input_ids) and np.array_equal(x.pixels, y.pixels)
        for x, y in zip(a.sequences, b.sequences, strict=True)
    )


def batches_of(sources, tokenizer, world_size, workers, count, rows=8, state=None, settings=SETTINGS):
    """The first global micro-batches as sets of rows, whatever the split."""
    loaders = [
        BatchLoader(sources, settings, tokenizer, rows // world_size, rank, world_size, workers, state)
        for rank in range(world_size)
    ]
    steps = []
    for _ in range(count):
        batches = [next(loader) for loader in loaders]
        steps.append({tuple(row.tolist()) for batch in batches for row in batch.input_ids})
    return steps, json.loads(json.dumps(merge_states([loader.state() for loader in loaders])))
