"""Documents that the user leaves out: named in files, never decoded, the rest of the stream as it was."""

import json
import logging
from dataclasses import replace

import pytest

from lcl_ds.assembly import lane_settings
from lcl_ds.data.exclusion import read_excluded, unknown_keys
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.stream.lanes import Lane
from lcl_ds.data.stream.loader import BatchLoader
from lcl_ds.errors import UserError
from tests.support.lanes import SETTINGS, rows_of
from tests.support.small import small_config
from tests.support.tars import write_tar


def keys_of(rows):
    return [[sequence.key for sequence in row.sequences] for row in rows]


def without(keys, excluded):
    return [[key for key in row if key not in excluded] for row in keys]


def test_every_document_of_a_run_has_a_key_of_its_own_also_where_shards_repeat_theirs(tmp_path, tokenizer):
    paths = [tmp_path / "one" / "0.tar", tmp_path / "two" / "0.tar"]
    for path in paths:
        path.parent.mkdir()
        write_tar(path, [("a.json", json.dumps({"texts": ["some words"], "images": [None]}).encode())])
    sources = [Source(name, [index_shard(path) for path in paths]) for name in ("x", "y")]
    settings = replace(SETTINGS, lanes=1, row_tokens=64, pack_window=8)
    keys = {key for row in keys_of(rows_of(Lane(sources, settings, 0, tokenizer), 8)) for key in row}
    assert keys == {"x/one/0.tar/a", "x/two/0.tar/a", "y/one/0.tar/a", "y/two/0.tar/a"}
    assert unknown_keys(keys, sources) == []


def test_excluded_documents_are_not_drawn_and_others_take_their_room(sources, tokenizer):
    settings = replace(SETTINGS, lanes=1)
    before = keys_of(rows_of(Lane(sources, settings, 0, tokenizer), 60))
    every = sorted({key for row in before for key in row})
    excluded = frozenset(every[::3])
    lane = Lane(sources, replace(settings, excluded=excluded), 0, tokenizer)
    after = rows_of(lane, 60)
    assert {key for row in keys_of(after) for key in row} >= set(every) - excluded
    assert not {key for row in keys_of(after) for key in row} & excluded
    used = sum(len(sequence.tokens.input_ids) for row in after for sequence in row.sequences)
    assert used > 0.95 * len(after) * settings.row_tokens


def test_what_is_excluded_everywhere_is_said_and_is_no_endless_search(sources, tokenizer):
    keys = {source.key_in_shard(n, source.sample(n).key) for source in sources for n in range(len(source))}
    with pytest.raises(UserError, match="data.exclude: names every document"):
        Lane(sources, replace(SETTINGS, excluded=frozenset(keys)), 0, tokenizer).next_row()


def test_they_are_counted_apart_from_bad_samples_and_not_decoded(sources, tokenizer, monkeypatch):
    lane = Lane(sources, SETTINGS, 0, tokenizer)
    rows_of(lane, 1)
    state = lane.state()
    excluded = {key for row in keys_of(rows_of(lane, 4)) for key in row}
    lane = Lane(sources, replace(SETTINGS, excluded=frozenset(excluded), max_bad_share=0), 0, tokenizer, state)
    monkeypatch.setattr("lcl_ds.data.stream.lanes.decode_image", lambda *_: pytest.fail("decoded"))
    rows = rows_of(lane, 4)
    assert keys_of(rows) == [[]] * 4
    assert sum(row.skipped_samples for row in rows) == len(excluded)
    assert {reason for _, reason in lane._skips.counts} == {"excluded by data.exclude"}


@pytest.mark.parametrize("options", [{}, {"group_rows": 2, "row_pool": 8}], ids=["single rows", "groups"])
@pytest.mark.parametrize("at", [1, 7, 23])
def test_an_exclusion_begins_and_ends_at_any_position(sources, tokenizer, at, options):
    """Rows that are packed lose what is excluded and stay otherwise; a lane continues as if it had not stopped."""
    settings = replace(SETTINGS, pack_window=16, **options)
    lane = Lane(sources, settings, 0, tokenizer)
    rows_of(lane, at)
    state, packed = json.loads(json.dumps(lane.state())), len(lane._pool) + len(lane._group)
    rest = keys_of(rows_of(lane, 30))
    excluded = frozenset(key for row in rest for key in row[:1])
    with_exclusion = replace(settings, excluded=excluded)
    lane = Lane(sources, with_exclusion, 0, tokenizer, state)
    states, rows = [], []
    for _ in range(30):
        states.append(json.loads(json.dumps(lane.state())))
        rows += keys_of([lane.next_row()])
    assert packed == 0 or rows[0] == without(rest[:1], excluded)[0]
    if not options:
        assert rows[:packed] == without(rest[:packed], excluded)
    assert not excluded & {key for row in rows for key in row}
    for cut in (1, 4, 11, 22):
        assert keys_of(rows_of(Lane(sources, with_exclusion, 0, tokenizer, states[cut]), 30 - cut)) == rows[cut:]
        freed = Lane(sources, settings, 0, tokenizer, states[cut])  # what was packed without them stays as it was
        ready = len(freed._pool) if not options else 1
        assert [without([row], excluded)[0] for row in keys_of(rows_of(freed, ready))] == rows[cut : cut + ready]


def test_a_batch_of_which_nothing_is_left_is_one_of_padding(sources, tokenizer):
    loader = BatchLoader(sources, SETTINGS, tokenizer, SETTINGS.lanes)
    next(loader)
    state = loader.state()
    excluded = frozenset(next(loader).keys)
    batch = next(BatchLoader(sources, replace(SETTINGS, excluded=excluded), tokenizer, SETTINGS.lanes, state=state))
    assert (batch.keys, batch.image_count, batch.token_count, len(batch.labels)) == ((), 0, 0, 0)


def test_files_name_documents_by_line_or_as_a_run_names_them(tmp_path):
    (tmp_path / "keys.txt").write_bytes("\ufeffweb/0.tar/a\r\n\nweb/0.tar/b c\n  web/0.tar/{d}".encode())
    record = {"step": 3, "documents": ["web/1.tar/e", "web/1.tar/\udcff"], "applied": False}
    (tmp_path / "skipped_steps.jsonl").write_text(json.dumps(record) + '\n{"step": 4, "docum')
    paths = [str(tmp_path / name) for name in ("keys.txt", "skipped_steps.jsonl")]
    lines = {"web/0.tar/a", "web/0.tar/b c", "web/0.tar/{d}"}
    assert read_excluded(paths) == lines | {"web/1.tar/e", "web/1.tar/\udcff"}
    assert small_config(f"data.exclude={paths[0]}").data.exclude == paths[:1]
    config = small_config(f"data.exclude=[{paths[0]}]")
    assert lane_settings(config).excluded == lines
    assert lane_settings(config, training=False).excluded == frozenset()


def test_files_that_name_nothing_are_refused_with_the_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('web/a\n{"step": 1}\n{"documents": [1]}\n{"documents"\n')
    with pytest.raises(UserError) as caught:
        read_excluded([str(tmp_path / "bad.jsonl"), str(tmp_path / "gone"), str(tmp_path)])
    starts = [f"bad.jsonl: line {n} is neither a key nor a record" for n in (2, 3, 4)]
    starts += ["gone: cannot be read: ", f"{tmp_path}: cannot be read: "]
    assert all(start in problem for start, problem in zip(starts, caught.value.problems, strict=True))


def test_keys_that_name_no_document_are_named(sources, tokenizer, caplog):
    caplog.set_level(logging.WARNING, "lcl_ds")
    known = next(iter(rows_of(Lane(sources, SETTINGS, 0, tokenizer), 1)[0].sequences)).key
    shard = known.rsplit("/", 1)[0]
    unknown = ["elsewhere/0.tar/a", f"{shard}/nothing", known.split("/")[-1]]
    assert sorted(unknown_keys([known, *unknown], sources)) == sorted(unknown)
    BatchLoader(sources, replace(SETTINGS, excluded=frozenset([known, *unknown])), tokenizer, 4)
    assert "data.exclude: 3 of 4 keys name no document" in caplog.text
    BatchLoader(sources, replace(SETTINGS, excluded=frozenset([known])), tokenizer, 4)
    assert len(caplog.records) == 1
