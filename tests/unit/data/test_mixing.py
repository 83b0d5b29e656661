"""Sources by weight, by images, by step; rows in groups of as many images each."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from lcl_ds.data.settings import SourceSettings
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.stream.lanes import Lane
from lcl_ds.data.stream.mixing import Mixture, images_per_sample, weight_at
from lcl_ds.data.stream.packing import choose_group, pack
from lcl_ds.errors import UserError
from tests.support.lanes import SETTINGS, batches_of, rows_of, same
from tests.support.tars import write_tar


def test_a_weight_holds_from_its_step_on():
    schedule = {0: 1.0, 100: 0.0, 500: 3.0}
    assert [weight_at(schedule, step) for step in (0, 99, 100, 499, 500, 10**6)] == [1, 1, 0, 0, 3, 3]
    assert weight_at(2.0, 7) == 2.0


def test_a_schedule_must_say_what_holds_at_the_start():
    for bad in ({5: 1.0}, {}, {0: -1.0}, {0: 0.0}, 0.0):
        with pytest.raises(ValueError, match=r"weight"):
            SourceSettings(name="a", paths="x", weight=bad)


def shard_of(folder, name, images, samples=20):
    members = []
    for i in range(samples):
        texts = ["word"] + [None] * images
        record = {"texts": texts, "images": [None, *(f"{n:03d}.jpg" for n in range(images))]}
        members.append((f"{i:03d}.json", json.dumps(record).encode()))
        members += [(f"{i:03d}.{n:03d}.jpg", b"x") for n in range(images)]
    return index_shard(write_tar(folder / f"{name}.tar", members))


def test_mixed_by_images_two_sources_give_as_many_images_each(tmp_path):
    few, many = (Source(str(n), [shard_of(tmp_path, str(n), n)], 1.0) for n in (1, 4))
    assert (images_per_sample(few), images_per_sample(many)) == (1, 4)
    draws = np.random.default_rng(0).random(20_000)
    for by, expected in (("samples", 4.0), ("images", 1.0)):
        mixture = Mixture([few, many], by)
        chosen = Counter(mixture.choose(0, draw) for draw in draws)
        assert chosen[1] * 4 / chosen[0] == pytest.approx(expected, rel=0.05)


def test_a_source_without_images_cannot_be_mixed_by_images(tmp_path):
    text = Source("text", [shard_of(tmp_path, "text", 0)])
    with pytest.raises(UserError, match="source text has no images"):
        Mixture([text], "images")


def test_a_source_of_weight_zero_is_never_drawn(tmp_path):
    shard = shard_of(tmp_path, "a", 1)
    mixture = Mixture([Source("a", [shard], {0: 1.0, 10: 0.0}), Source("b", [shard], {0: 0.0, 10: 1.0})])
    almost_one = np.nextafter(1.0, 0.0)
    assert [mixture.choose(step, draw) for step in (0, 10) for draw in (0.0, 0.5, almost_one)] == [0, 0, 0, 1, 1, 1]


def test_the_curriculum_changes_the_sources_at_its_step(sources, tokenizer):
    documents, pairs = sources
    documents.weight, pairs.weight = {0: 1.0, 30: 0.0}, {0: 0.0, 30: 1.0}
    settings = replace(SETTINGS, lanes=1, rows_per_step=2, pack_window=32)
    lane = Lane([documents, pairs], settings, 0, tokenizer)
    names = [{s.key.split("/")[0] for s in row.sequences} for row in rows_of(lane, 120)]
    assert names[0] == {"documents"}
    first = next(i for i, name in enumerate(names) if "pairs" in name)
    assert 60 <= first < 60 + 32  # the window after row 60, the first row of step 30
    assert names[-1] == {"pairs"}
    resumed = Lane([documents, pairs], settings, 0, tokenizer, None)
    rows_of(resumed, 59)
    again = Lane([documents, pairs], settings, 0, tokenizer, json.loads(json.dumps(resumed.state())))
    assert all(same(again.next_row(), resumed.next_row()) for _ in range(40))


def mmc4_like(count, rng):
    """Tokens and images of documents as MMC4's: some hundred tokens of text, one to six images of 49 tokens."""
    text = np.clip(rng.lognormal(5.8, 0.9, count), 20, 1600).astype(int)
    images = np.clip(rng.poisson(3.2, count) + 1, 1, 6)
    return (text + 51 * images + 2).tolist(), images.tolist()


def test_groups_hold_about_as_many_images_each_and_no_row_waits_for_ever():
    rng = np.random.default_rng(0)
    lengths, images = mmc4_like(6000, rng)
    rows = [sum(images[i] for i in row) for row in pack(lengths, images, 2048, 24)]
    rng.shuffle(rows)
    mean, pool, groups, oldest = np.mean(rows), [], [], 0
    for number, count in enumerate(rows):
        pool.append((number, count))
        if len(pool) == 64:
            chosen = choose_group([c for _, c in pool], 4, mean)
            assert len(set(chosen)) == 4
            assert chosen[0] == 0
            groups.append(sum(pool[i][1] for i in chosen))
            oldest = max(oldest, number - min(pool[i][0] for i in chosen))
            pool = [row for i, row in enumerate(pool) if i not in chosen]
    ranks = np.array(groups[: len(groups) // 8 * 8]).reshape(-1, 8)
    alone = np.array(rows[: len(rows) // 32 * 32]).reshape(-1, 4, 8).sum(1)
    assert (ranks.max(1) / ranks.mean(1)).mean() < 1.03 < (alone.max(1) / alone.mean(1)).mean()
    assert oldest < 64 * 8


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_group_of_any_size_is_chosen_from_the_oldest_on(size):
    chosen = choose_group([5, 1, 9, 5, 5, 2, 8, 5], size, 5.0)
    assert chosen[0] == 0
    assert len(set(chosen)) == size
    assert sum([5, 1, 9, 5, 5, 2, 8, 5][i] for i in chosen) == 5 * size


GROUPED = replace(SETTINGS, group_rows=4, row_pool=8, pack_window=16)


def test_a_lane_with_groups_continues_exactly_from_any_row(sources, tokenizer):
    lane = Lane(sources, GROUPED, 0, tokenizer)
    states, rows = [], []
    for _ in range(60):
        states.append(json.loads(json.dumps(lane.state())))
        rows.append(lane.next_row())
    for at in (0, 1, 4, 7, 22, 41, 59):
        resumed = Lane(sources, GROUPED, 0, tokenizer, states[at])
        for row in rows[at:]:
            assert same(resumed.next_row(), row)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (2, 1)])
def test_the_stream_of_groups_is_the_same_for_any_ranks_and_workers(sources, tokenizer, world_size, workers):
    expected, _ = batches_of(sources, tokenizer, 1, 0, 5, settings=GROUPED)
    actual, state = batches_of(sources, tokenizer, world_size, workers, 2, settings=GROUPED)
    rest, _ = batches_of(sources, tokenizer, 1, 0, 3, state=state, settings=GROUPED)
    assert actual + rest == expected


def test_groups_must_divide_the_rows_of_a_rank(sources, tokenizer):
    with pytest.raises(UserError, match="data.group_rows: 4 does not divide the 2 rows"):
        batches_of(sources, tokenizer, 4, 0, 1, settings=GROUPED)


def test_documents_and_images_are_counted_by_source(sources, tokenizer):
    from lcl_ds.data.stream.loader import BatchLoader

    batch = next(BatchLoader(sources, SETTINGS, tokenizer, 8))
    assert set(batch.sources) == {"documents", "pairs"}
    assert sum(counts.documents for counts in batch.sources.values()) == batch.document_count
    assert sum(counts.images for counts in batch.sources.values()) == batch.image_count
