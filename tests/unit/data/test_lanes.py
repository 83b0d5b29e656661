"""The stream of rows: deterministic, resumable anywhere, the same for any ranks and workers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lcl_ds.data.sequences import without_images
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.stream import lanes
from lcl_ds.data.stream.lanes import Lane
from lcl_ds.data.stream.loader import BatchLoader, GroupStream
from lcl_ds.errors import UserError
from lcl_ds.tokens import Vocabulary, encode_sequence
from tests.support.lanes import SETTINGS, batches_of, rows_of, same
from tests.support.tars import write_tar


def test_a_lane_continues_exactly_from_any_row(sources, tokenizer):
    lane = Lane(sources, SETTINGS, 0, tokenizer)
    states, rows = [], []
    for _ in range(40):
        states.append(json.loads(json.dumps(lane.state())))
        rows.append(lane.next_row())
    for at in (0, 1, 7, 23, 39):
        resumed = Lane(sources, SETTINGS, 0, tokenizer, states[at])
        for row in rows[at:]:
            assert same(resumed.next_row(), row)
    assert len(json.dumps(states[-1])) < 4000


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_lane_goes_on_with_the_next_samples_when_images_get_another_number_of_tokens(sources, tokenizer, rows):
    before = Lane(sources, replace(SETTINGS, image_tokens=4, image_size=16), 0, tokenizer)
    draws = [piece.draw for _ in range(rows) for piece in before._next_pieces()]
    state = json.loads(json.dumps(before.state()))
    lane = Lane(sources, SETTINGS, 0, tokenizer, state)
    assert (lane.rows_returned, lane.state()["draws"]) == (rows, before._draws)
    first = lane._next_pieces()
    assert min(piece.draw for piece in first) > max(draws)
    resumed = Lane(sources, SETTINGS, 0, tokenizer, json.loads(json.dumps(lane.state())))
    expected, actual = ([piece.address() for _ in range(9) for piece in x._next_pieces()] for x in (lane, resumed))
    assert actual == expected


def test_padding_is_at_most_two_percent(sources, tokenizer):
    lane = Lane(sources, replace(SETTINGS, lanes=1), 0, tokenizer)
    used = sum(len(piece.tokens.input_ids) for _ in range(200) for piece in lane._next_pieces())
    assert used / (200 * SETTINGS.row_tokens) >= 0.98


def test_an_epoch_of_all_lanes_holds_every_document_once(sources, tokenizer):
    documents = sources[:1]
    settings = replace(SETTINGS, lanes=2, shuffle_blocks=1)
    lanes = [Lane(documents, settings, n, tokenizer) for n in range(2)]
    numbers = [lane._next_sample(0) for lane in lanes for _ in range(80)]
    assert sorted(numbers) == list(range(160))


def test_sources_are_drawn_by_weight(sources, tokenizer):
    rows = rows_of(Lane(sources, SETTINGS, 0, tokenizer), 200)
    names = [s.key.split("/")[0] for row in rows for s in row.sequences]
    assert 0.55 < names.count("documents") / len(names) < 0.78


def test_pairs_come_image_first_about_half_the_time(sources, tokenizer):
    rows = rows_of(Lane(sources[1:], SETTINGS, 0, tokenizer), 30)
    first = [s.tokens.slots[0].has_context for row in rows for s in row.sequences]
    assert 0.4 < np.mean(first) < 0.6


@pytest.mark.parametrize("seed", ["data_seed", "augmentation_seed"])
def test_each_seed_changes_its_own_part(sources, tokenizer, seed):
    before = rows_of(Lane(sources, SETTINGS, 0, tokenizer), 8)
    after = rows_of(Lane(sources, replace(SETTINGS, **{seed: 99}), 0, tokenizer), 8)
    keys = [[[s.key for s in row.sequences] for row in rows] for rows in (before, after)]
    assert (sorted(map(str, keys[0])) == sorted(map(str, keys[1]))) == (seed == "augmentation_seed")
    assert not all(len(a.sequences) == len(b.sequences) and same(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (2, 2), (4, 1)])
def test_the_global_stream_is_the_same_for_any_ranks_and_workers(sources, tokenizer, world_size, workers):
    expected, _ = batches_of(sources, tokenizer, 1, 0, 6)
    assert batches_of(sources, tokenizer, world_size, workers, 6)[0] == expected


@pytest.mark.parametrize(("before", "after"), [((1, 0), (2, 1)), ((2, 2), (1, 0))])
def test_a_position_continues_on_other_ranks_and_workers(sources, tokenizer, before, after):
    expected, _ = batches_of(sources, tokenizer, 1, 0, 6)
    head, state = batches_of(sources, tokenizer, *before, 2)
    tail, _ = batches_of(sources, tokenizer, *after, 4, state=state)
    assert head + tail == expected


def test_other_data_than_the_position_was_saved_for_is_refused(sources, tokenizer):
    _, state = batches_of(sources, tokenizer, 1, 0, 1)
    with pytest.raises(UserError, match="train-pairs-000000.tar of the checkpoint is missing"):
        BatchLoader(sources[:1], SETTINGS, tokenizer, 8, state=state)
    state["fingerprint"]["documents/train-documents-000000.tar"] = "other"
    with pytest.raises(UserError, match="train-documents-000000.tar changed"):
        BatchLoader(sources, SETTINGS, tokenizer, 8, state=state)


@pytest.mark.parametrize(("world_size", "workers"), [(3, 0), (6, 0), (3, 2), (12, 0), (1, 3)])
def test_lanes_need_not_be_a_multiple_of_ranks_and_workers(sources, tokenizer, world_size, workers):
    expected, _ = batches_of(sources, tokenizer, 1, 0, 6, rows=12)
    head, state = batches_of(sources, tokenizer, world_size, workers, 3, rows=12)
    tail, _ = batches_of(sources, tokenizer, 2, 1, 2, rows=12, state=state)
    assert head + tail == expected[:5]
    tail, _ = batches_of(sources, tokenizer, world_size, workers, 3, rows=12, state=state)
    assert head + tail == expected


def test_what_is_left_out_is_counted_once_where_ranks_share_a_lane(tmp_path, tokenizer):
    good = json.dumps({"texts": ["a red star"], "images": [None]}).encode()
    members = [(f"{i:03d}.json", b"{" if i % 10 == 3 else good) for i in range(200)]
    source = Source("mine", [index_shard(write_tar(tmp_path / "x.tar", members))])
    settings = replace(SETTINGS, lanes=1, row_tokens=32)
    counts = []
    for world_size in (1, 3):
        loaders = [
            BatchLoader([source], settings, tokenizer, 12 // world_size, r, world_size) for r in range(world_size)
        ]
        counts.append([sum(next(loader).skipped_samples for loader in loaders) for _ in range(5)])
    assert counts[0] == counts[1]
    assert sum(counts[0]) > 0


def test_a_lost_image_takes_its_tokens_along_and_leaves_the_text():
    vocabulary = Vocabulary(10)
    (tokens,) = encode_sequence(["a", 0, "b", 1, "c"], lambda t: [ord(t) - 96], vocabulary, 3, 64, 9)
    left = without_images(tokens, [0], lambda image: 3)
    assert left.input_ids.tolist() == [10, 1, 2, 13, 12, 12, 12, 14, 3, 11]
    assert [(slot.image, slot.position) for slot in left.slots] == [(1, 4)]


def test_damaged_samples_are_left_out_counted_and_named(tmp_path, tokenizer, caplog):
    good = json.dumps({"texts": ["a red star", None], "images": [None, "000.jpg"]}).encode()
    members = []
    for i in range(60):
        bad = {7: b"\xff", 8: b"[1]", 9: b"{"}.get(i)
        members += [(f"{i:03d}.json", bad or good), (f"{i:03d}.000.jpg", b"no image")]
    source = Source("mine", [index_shard(write_tar(tmp_path / "x.tar", members))])
    lane = Lane([source], replace(SETTINGS, lanes=1), 0, tokenizer)
    rows = [lane.next_row()]
    while len(names := {s.key for row in rows for s in row.sequences}) < 57:  # an epoch
        rows.append(lane.next_row())
    assert not names & {"mine/007", "mine/008", "mine/009"}
    assert all(len(s.pixels) == 0 and not s.tokens.slots for row in rows for s in row.sequences)
    assert sum(row.skipped_samples for row in rows) >= 3 + 57
    assert f"{source.shards[0].path}: 0" in caplog.text
    assert "text that is not UTF-8" in caplog.text


def test_batches_can_move_to_pinned_memory_and_devices(sources, tokenizer):
    batch = next(BatchLoader(sources, SETTINGS, tokenizer, 4))
    moved = batch.to(torch.device("meta"))
    assert moved.images.device.type == "meta"
    assert moved.keys == batch.keys


@pytest.mark.parametrize(("workers", "group_rows"), [(1, 1), (3, 1), (1, 4)])
def test_loader_processes_are_two_micro_steps_ahead(sources, tokenizer, workers, group_rows):
    settings = replace(SETTINGS, group_rows=group_rows)
    loader = BatchLoader(sources, settings, tokenizer, rows_per_batch=8, workers=workers)
    next(loader)
    groups = loader._groups
    asked_for = (groups._send_idx - groups._rcvd_idx) * group_rows  # type: ignore[attr-defined]
    assert 16 <= asked_for <= 16 + workers * group_rows


def test_samples_are_measured_once_for_all_lanes_also_where_images_had_another_size(sources, tokenizer, monkeypatch):
    settings = replace(SETTINGS, group_rows=2)
    smaller = replace(settings, image_tokens=4, image_size=16)
    lane_states = {}
    for n in range(settings.lanes):
        lane = Lane(sources, smaller, n, tokenizer)
        rows_of(lane, 2)
        lane_states[str(n)] = lane.state()
    measured = []
    measure = lanes.measure_sizes
    monkeypatch.setattr(lanes, "measure_sizes", lambda *args: measured.append(args[1].image_tokens) or measure(*args))
    groups = iter(GroupStream(sources, settings, tokenizer, 0, 1, settings.lanes, lane_states))
    for _ in range(settings.lanes):
        next(groups)
    assert sorted(measured) == [4, 16]
