"""Documents that the user leaves out: named in files, never decoded, the rest of the stream as it was."""

import json
import logging
from dataclasses import replace

import numpy as np
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


def test_excluded_documents_leave_their_rows_and_everything_else_stays(sources, tokenizer):
    whole = Lane(sources, SETTINGS, 0, tokenizer)
    before = rows_of(whole, 30)
    excluded = {row.sequences[0].key for row in before[::3]}
    lane = Lane(sources, replace(SETTINGS, excluded=frozenset(excluded)), 0, tokenizer)
    after = rows_of(lane, 30)
    assert keys_of(after) == without(keys_of(before), excluded)
    assert lane.state() == whole.state()
    for row, same in zip(before, after, strict=True):
        kept = [sequence for sequence in row.sequences if sequence.key not in excluded]
        assert all(map(np.array_equal, [s.pixels for s in kept], [s.pixels for s in same.sequences]))


def test_they_are_counted_apart_from_bad_samples_and_not_decoded(sources, tokenizer, monkeypatch):
    excluded = {key for row in keys_of(rows_of(Lane(sources, SETTINGS, 0, tokenizer), 4)) for key in row}
    lane = Lane(sources, replace(SETTINGS, excluded=frozenset(excluded), max_bad_share=0), 0, tokenizer)
    monkeypatch.setattr("lcl_ds.data.stream.lanes.decode_image", lambda *_: pytest.fail("decoded"))
    rows = rows_of(lane, 4)
    assert keys_of(rows) == [[]] * 4
    assert sum(row.skipped_samples for row in rows) == len(excluded)
    assert {reason for _, reason in lane._skips.counts} == {"excluded by data.exclude"}


@pytest.mark.parametrize("at", [1, 7, 23])
def test_documents_that_wait_when_the_exclusion_begins_are_left_out_as_well(sources, tokenizer, at):
    lane = Lane(sources, SETTINGS, 0, tokenizer)
    rows_of(lane, at)
    state = json.loads(json.dumps(lane.state()))
    rest = keys_of(rows_of(lane, 30))
    excluded = {key for row in rest for key in row[:1]}
    continued = Lane(sources, replace(SETTINGS, excluded=frozenset(excluded)), 0, tokenizer, state)
    assert keys_of(rows_of(continued, 30)) == without(rest, excluded)


def test_a_batch_of_which_nothing_is_left_is_one_of_padding(sources, tokenizer):
    loader = BatchLoader(sources, SETTINGS, tokenizer, 2)
    excluded = frozenset(next(loader).keys)
    batch = next(BatchLoader(sources, replace(SETTINGS, excluded=excluded), tokenizer, 2))
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
