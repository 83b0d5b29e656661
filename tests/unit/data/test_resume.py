"""Stopping at any step and going on with other ranks and workers; ``python -m tests.unit.data.test_resume 200``.

Every cut compares keys, packing, tokens and cropped pixels of what follows with the uninterrupted stream.
"""

import hashlib
import json
import shutil
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lcl_ds.data.demo.corpus import build_demo
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import AT_HAND, Source
from lcl_ds.data.shards.storage import expand_paths
from lcl_ds.data.stream.lanes import Lane, LaneSettings
from lcl_ds.data.stream.loader import BatchLoader, check_same_data, merge_states, shard_differences
from lcl_ds.errors import UserError
from lcl_ds.tokens import TextTokenizer
from tests.support.tars import write_tar

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
        contents = ids, batch.position_ids[number], batch.images[batch.slot_images[inside]]
        rows.append(hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in contents)).hexdigest())
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


def shards_in(folder, **contents):
    """``a=3`` makes ``a/00000.tar`` with keys from 3 on: shards of one base name, as img2dataset writes them."""
    for name, first in contents.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        members = [(f"{i:03d}.txt", b"a cat" * (1 + i)) for i in range(first, first + 4)]
        write_tar(folder / name / "00000.tar", members)
    return fingerprint_of(folder)


def fingerprint_of(*folders):
    paths = expand_paths([f"{folder}/**/00000.tar" for folder in folders])
    return Source("s", [index_shard(path) for path in paths]).fingerprint()


def differences(saved, now):
    return shard_differences(json.loads(json.dumps(saved)), now)


def test_every_shard_has_its_own_place_in_the_fingerprint(tmp_path):
    saved = shards_in(tmp_path / "d", a=0, b=10, c=20)
    assert list(saved) == ["s/a/00000.tar", "s/b/00000.tar", "s/c/00000.tar"]
    assert len(set(saved.values())) == 3


def test_shards_that_moved_to_another_folder_are_the_same(tmp_path, monkeypatch):
    saved = shards_in(tmp_path / "here", a=0, b=10)
    shutil.move(tmp_path / "here", tmp_path / "mount [2]")
    (tmp_path / "there").symlink_to(tmp_path / "mount [2]")
    assert fingerprint_of(tmp_path / "there") == saved
    monkeypatch.chdir(tmp_path / "there")
    assert fingerprint_of(".") == saved
    shutil.copytree(tmp_path / "there" / "a", tmp_path / "x" / "1")
    shutil.copytree(tmp_path / "there" / "b", tmp_path / "x" / "y" / "2")
    assert differences(saved, fingerprint_of(tmp_path / "x", tmp_path / "x" / "y")) == []  # the same, in this order


def test_what_became_of_shards_of_one_name_is_told_apart(tmp_path):
    folder = tmp_path / "d"
    saved = shards_in(folder, a=0, b=10, c=20)
    a, b = folder / "a", folder / "b"
    advice = "restore it or start a new run"

    a.rename(tmp_path / "a")
    assert differences(saved, fingerprint_of(folder)) == [f"shard s/a/00000.tar of the checkpoint is missing; {advice}"]
    b.rename(tmp_path / "b")
    missing = [f"shard s/{name}/00000.tar of the checkpoint is missing; {advice}" for name in "ab"]
    assert differences(saved, fingerprint_of(folder)) == missing

    (tmp_path / "a").rename(b)
    (tmp_path / "b").rename(a)
    order = "the same shards are in another order: "
    (problem,) = differences(saved, fingerprint_of(folder))
    assert problem.startswith(f"{order}s/a/00000.tar is the one that the checkpoint knows as s/b/00000.tar;")

    a.rename(folder / "z")
    b.rename(folder / "y")
    (problem,) = differences(saved, fingerprint_of(folder))
    assert problem.startswith(f"{order}s/y/00000.tar is the one that the checkpoint knows as s/a/00000.tar;")
    (folder / "y").rename(a)
    (folder / "z").rename(b)
    assert differences(saved, fingerprint_of(folder)) == []

    now = shards_in(folder, a=50, b=10)
    assert differences(saved, now) == [f"shard s/a/00000.tar changed since the checkpoint; {advice}"]
    now = shards_in(folder, a=0, d=60)
    assert differences(saved, now) == ["shard s/d/00000.tar is new since the checkpoint; remove it or start a new run"]
    now = shards_in(folder, d=20)  # a copy of c
    assert differences(saved, now) == ["shard s/d/00000.tar is new since the checkpoint; remove it or start a new run"]


def test_sources_in_another_order_are_other_data(tmp_path):
    one, two = {"a/0.tar": "1"}, {"b/0.tar": "2"}
    assert differences({**one, **two}, {**one, **two}) == []
    assert differences({**one, **two}, {**two, **one}) == [
        "the checkpoint has the sources in the order a, b; restore it"
    ]


@pytest.mark.parametrize("saved", [None, [], {"s/00000.tar": "0123"}, {"other": 1}])
def test_a_fingerprint_of_another_kind_is_a_sentence(saved):
    with pytest.raises(UserError, match=r"^data.shards: "):
        check_same_data({"lane_count": 4, "fingerprint": saved}, 4, {"s/a/00000.tar": "0123456789abcdef"})


def test_one_file_by_two_names_is_taken_once_and_said(tmp_path, caplog):
    shards_in(tmp_path, a=0)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    paths = [f"{tmp_path}/{name}/00000.tar" for name in ("a", "b", "a/../a")]
    assert expand_paths(paths) == [f"{tmp_path}/a/../a/00000.tar"]
    assert (
        f"{tmp_path}/b/00000.tar: it is the same file as {tmp_path}/a/../a/00000.tar and is taken once" in caplog.text
    )


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


@pytest.mark.parametrize("damage", [b"\xff", b"1", None], ids=["no text", "no object", "gone"])
def test_a_document_that_waits_for_a_row_and_was_damaged_meanwhile_is_a_sentence(demo_folder, tmp_path, damage):
    path = shutil.copy(next(demo_folder.glob("train-documents-*.tar")), tmp_path)
    settings, tokenizer = replace(SETTINGS, lanes=1), TextTokenizer(demo_folder / "tokenizer")
    sources = [Source("documents", [index_shard(path)])]
    loader = BatchLoader(sources, settings, tokenizer, rows_per_batch=12)
    for _ in range(4):
        next(loader)
    state = loader.state()
    assert state["lanes"]["0"]["carried"]
    with tarfile.open(path) as tar:
        ranges = [(member.offset_data, member.size) for member in tar if member.name.endswith(".json")]
    if damage is None:
        Path(path).unlink()
    else:
        with open(path, "r+b") as file:
            for offset, size in ranges:
                file.seek(offset)
                file.write(damage * size)
    AT_HAND._keep(0)
    loader = BatchLoader(sources, settings, tokenizer, rows_per_batch=12, state=state)
    with pytest.raises(UserError, match="waits for its row"):
        next(loader)
