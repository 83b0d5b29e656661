"""Stopping at any step and going on with other ranks and workers; ``python -m tests.unit.data.test_resume 200``.

Every cut compares keys, packing, tokens and cropped pixels of what follows with the uninterrupted stream.
"""

import hashlib
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lcl_ds.data.demo import build_demo
from lcl_ds.data.lanes import Lane, LaneSettings
from lcl_ds.data.loader import BatchLoader, merge_states
from lcl_ds.data.shards import Source, expand_paths, index_shard
from lcl_ds.tokens import TextTokenizer

SETTINGS = LaneSettings(
    lanes=12,
    data_seed=1,
    augmentation_seed=2,
    row_tokens=256,
    row_images=12,
    image_tokens=16,
    image_size=32,
    rows_per_step=12,
    pack_window=16,
)
STREAMS = {
    "single": (SETTINGS, ("documents",)),
    "mixed": (replace(SETTINGS, mix_by="images"), ("documents", "pairs")),
    "grouped": (replace(SETTINGS, group_rows=2, row_pool=12), ("documents", "pairs")),
}
ROWS, STEPS, AFTER = 12, 24, 2
"""Rows of a step over all ranks, steps of the uninterrupted stream, steps compared after a cut."""


class Stream:
    """One of ``STREAMS`` over a demo corpus."""

    def __init__(self, folder: Path, name: str):
        self.settings, self.names = STREAMS[name]
        self.folder, self.tokenizer = folder, TextTokenizer(folder / "tokenizer")

    def sources(self) -> list[Source]:
        weights = {"documents": {0: 1.0, 8: 0.5}, "pairs": 1.0}
        return [
            Source(
                name, [index_shard(path) for path in expand_paths(f"{self.folder}/train-{name}-*.tar")], weights[name]
            )
            for name in self.names
        ]

    def run(self, world_size: int, workers: int, steps: int, state=None) -> tuple[list[list[str]], dict]:
        """Digests of the rows of each step, whatever rank made them, and the position after the last."""
        loaders = [
            BatchLoader(
                self.sources(), self.settings, self.tokenizer, ROWS // world_size, rank, world_size, workers, state
            )
            for rank in range(world_size)
        ]
        taken = [sorted(row for loader in loaders for row in digests(next(loader))) for _ in range(steps)]
        return taken, json.loads(json.dumps(merge_states([loader.state() for loader in loaders])))


def digests(batch) -> list[str]:
    """One per row: its tokens, positions and pixels."""
    rows = []
    for number, ids in enumerate(batch.input_ids):
        inside = batch.slot_positions.div(ids.numel(), rounding_mode="floor") == number
        parts = ids, batch.position_ids[number], batch.images[batch.slot_images[inside]]
        rows.append(hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest())
    return rows


def random_cuts(folder: Path, count: int, seed: int = 0):
    """(description, whether what followed was the same) of each cut."""
    rng = np.random.default_rng(seed)
    streams = {name: Stream(folder, name) for name in STREAMS}
    whole = {name: stream.run(1, 0, STEPS)[0] for name, stream in streams.items()}
    for number in range(count):
        name = list(STREAMS)[number % len(STREAMS)]
        (ranks, workers), (ranks_after, workers_after) = ((int(rng.choice([1, 2])), int(rng.integers(4))) for _ in "ab")
        cut = int(rng.integers(1, STEPS - AFTER))
        before, state = streams[name].run(ranks, workers, cut)
        after, _ = streams[name].run(ranks_after, workers_after, AFTER, state)
        what = f"{name}: {ranks}x{workers} to {ranks_after}x{workers_after} at step {cut}"
        yield what, before + after == whole[name][: cut + AFTER]


def test_what_follows_a_cut_equals_the_uninterrupted_stream(demo_folder):
    results = dict(random_cuts(demo_folder, 4))
    assert all(results.values()), [what for what, same in results.items() if not same]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_world_size_keeps_the_global_order(demo_folder, before, after):
    stream = Stream(demo_folder, "grouped")
    whole, _ = stream.run(1, 0, 6)
    head, state = stream.run(before, 1, 3)
    tail, _ = stream.run(after, 0, 3, state)
    assert head + tail == whole


def restart_seconds(folder: Path, position: int) -> float:
    """From a lane's saved position, after ``position`` rows of that lane, to its next row; best of five."""
    stream = Stream(folder, "grouped")
    sources = stream.sources()
    lane = Lane(sources, stream.settings, 0, stream.tokenizer)
    for _ in range(position):
        lane._next_pieces()
    state = lane.state()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        Lane(sources, stream.settings, 0, stream.tokenizer, state).next_row()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as folder:
        build_demo(Path(folder) / "demo", documents=400, pairs=400, heldout_documents=1, shard_size=64)
        same = 0
        for number, (what, equal) in enumerate(random_cuts(Path(folder) / "demo", count), start=1):
            same += equal
            if not equal or number % 20 == 0:
                print(f"{number}: {what}: {'same' if equal else 'DIFFERENT'}", flush=True)
        print(f"{same} of {count} cuts are followed by the uninterrupted stream")
        near, far = (restart_seconds(Path(folder) / "demo", position) for position in (10, 100_000))
        print(f"restart at row 10: {near * 1e3:.1f} ms, at row 100,000: {far * 1e3:.1f} ms, ratio {far / near:.2f}")


if __name__ == "__main__":
    main()
