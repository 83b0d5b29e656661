"""The policy for bad input: left out, counted, named, and too much of it ends the run."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from lcl_ds.data.documents import BadSampleError, read_document
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.stream import lanes, skips
from lcl_ds.data.stream.lanes import Lane, LaneSettings
from lcl_ds.data.stream.loader import BatchLoader
from lcl_ds.data.stream.skips import RECENT, Skips, is_power_of_ten
from lcl_ds.errors import UserError
from lcl_ds.tokens import TextTokenizer
from tests.support.corpora import picture
from tests.support.ranks import ROOT
from tests.support.tars import write_tar

SETTINGS = LaneSettings(
    lanes=2,
    data_seed=1,
    augmentation_seed=2,
    row_tokens=64,
    row_images=4,
    image_tokens=4,
    image_size=16,
    pack_window=40,
)
GOOD = json.dumps({"texts": ["fine"], "images": [None]}).encode()


@pytest.fixture(scope="module")
def tokenizer(demo_folder):
    return TextTokenizer(demo_folder / "tokenizer")


def source_of(tmp_path, *members, name="mine"):
    return Source(name, [index_shard(write_tar(tmp_path / f"{name}.tar", members))])


def record(texts, images, **more):
    return json.dumps({"texts": texts, "images": images, **more}).encode()


BAD_MEMBERS = {
    "json that cannot be parsed": [("x.json", b"{")],
    "json that is not an object": [("x.json", b"[1]")],
    "json without parallel lists": [("x.json", record(["a"], []))],
    "not parallel to 'images'": [("x.json", record(["a"], [None], matched_text_index=[1, 2]))],
    "without text and images": [("x.json", record([" ", None], [None, None]))],
    "a text that is not a string": [("x.json", record(["a", 7], [None, None]))],
    "not UTF-8": [("x.json", b'{"texts": ["\xff"], "images": [null]}')],
    "not valid Unicode": [("x.json", b'{"texts": ["\\udc80"], "images": [null]}')],
    "too much text": [("x.json", record(["x" * 2_000_000], [None]))],
    "neither a document": [("x.jpg", picture(0))],
    "a caption pair without an image": [("x.txt", b"a caption")],
    "a caption pair without text": [("x.txt", b" "), ("x.jpg", picture(0))],
}


@pytest.mark.parametrize(("reason", "members"), BAD_MEMBERS.items(), ids=BAD_MEMBERS)
def test_every_kind_of_bad_sample_has_a_reason(tmp_path, reason, members):
    with pytest.raises(BadSampleError, match=reason):
        read_document(source_of(tmp_path, *members), 0)


@pytest.mark.parametrize("text", [b"1" * 5000, b"[" * 100_000, b'{"texts": NaN}', b"null", b""])
def test_strange_json_is_a_bad_sample(tmp_path, text):
    with pytest.raises(BadSampleError):
        read_document(source_of(tmp_path, ("x.json", text)), 0)


def test_the_text_limit_can_be_set(tmp_path):
    source = source_of(tmp_path, ("x.json", record(["a" * 100], [None])))
    assert read_document(source, 0).segments == ("a" * 100,)
    with pytest.raises(BadSampleError, match="too much text"):
        read_document(source, 0, max_text_bytes=50)


def test_an_image_that_is_missing_or_cannot_be_decoded_goes_and_its_text_stays(tmp_path, tokenizer):
    members = [("x.json", record(["a", None, None, "b"], [None, "000.jpg", "001.jpg", None])), ("x.000.jpg", b"<html>")]
    settings = replace(SETTINGS, lanes=1, pack_window=1)
    row = Lane([source_of(tmp_path, *members)], settings, 0, tokenizer).next_row()
    (sequence,) = row.sequences
    assert len(sequence.pixels) == 0
    assert tokenizer.decode(sequence.tokens.input_ids) == "<start_of_text> a b <end_of_text>".replace("a b", "ab")
    assert row.skipped_samples == 2


def test_what_is_left_out_is_named_at_a_bounded_rate(tmp_path, caplog):
    source = source_of(tmp_path, ("a.json", GOOD))
    counted = Skips(max_bad_share=0.9)
    for _ in range(120):
        counted.bad(source, 0, BadSampleError("one reason"))
        counted.good()
    counted.bad(source, 0, OSError(5, "Input/output error"))
    path = source.shards[0].path
    assert caplog.messages == [
        *(f"left out {path}: a: one reason ({n} so far)" for n in (1, 10, 100)),
        f"left out {path}: a: a read error (Input/output error) (1 so far)",
    ]
    assert counted.counts == {("mine", "one reason"): 120, ("mine", "a read error (Input/output error)"): 1}
    assert [n for n in range(1, 12_000) if is_power_of_ten(n)] == [1, 10, 100, 1000, 10_000]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_share_of_recent_ones_beyond_the_limit_ends_the_run(tmp_path, share):
    source = source_of(tmp_path, ("a.json", GOOD))
    counted = Skips(share)
    allowed = int(share * RECENT)
    for _ in range(3):
        for number in range(RECENT):
            if number < allowed:
                counted.bad(source, 0, BadSampleError("tolerable"))
            else:
                counted.good()
    for _ in range(allowed):  # takes the place of as many bad ones
        counted.bad(source, 0, BadSampleError("tolerable"))
    with pytest.raises(UserError, match=f"{allowed + 1} of the last {RECENT} .* data.max_bad_share {share:g} allows"):
        counted.bad(source, 0, BadSampleError("one too many"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_nothing_but_damage_stops_and_says_why(tmp_path, tokenizer, workers):
    source = source_of(tmp_path, ("a.json", b"{"), ("b.json", b"{"))
    loader = BatchLoader([source], SETTINGS, tokenizer, 4, workers=workers)
    with pytest.raises(UserError, match=r"1000 of the last 1000 .*mine: json that cannot be parsed \(1000\)") as error:
        next(loader)
    assert len(error.value.problems) == 1
    assert "Traceback" not in str(error.value)
    del error  # its frames hold the loader, whose processes would end only when it is collected


HELD = """
import sys
from lcl_ds.data.stream.loader import BatchLoader
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.tokens import TextTokenizer
from tests.unit.data.test_skips import SETTINGS

def train():
    loader = BatchLoader([Source("s", [index_shard(sys.argv[1])])], SETTINGS, TextTokenizer(sys.argv[2]), 4, workers=2)
    next(loader)
    raise ValueError("out of memory")

try:
    train()
except ValueError as error:
    held = error  # with the frames that hold the loader
sys.exit(3)
"""


def test_a_trainer_that_fails_does_not_wait_for_its_loader_processes(tmp_path, demo_folder):
    shard = write_tar(tmp_path / "a.tar", [("a.json", GOOD)])
    command = [sys.executable, "-c", HELD, str(shard), str(demo_folder / "tokenizer")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])}
    assert subprocess.run(command, env=environment, timeout=60).returncode == 3


def test_one_bad_source_of_two_does_not_stop_a_tolerant_run(tmp_path, tokenizer):
    sources = [source_of(tmp_path, ("a.json", GOOD)), source_of(tmp_path, ("b.json", b"{"), name="bad")]
    lane = Lane(sources, replace(SETTINGS, max_bad_share=0.6), 0, tokenizer)
    rows = [lane.next_row() for _ in range(150)]
    assert all(s.key == "mine/mine.tar/a" for row in rows for s in row.sequences)
    assert sum(row.skipped_samples for row in rows) > RECENT / 2


@pytest.mark.parametrize("gone", [[".tar"], [".tar", ".tar.index"]], ids=["the shard", "the shard and its index"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_goes_away_while_running_costs_its_samples(tmp_path, tokenizer, gone, workers, caplog):
    members = [("a.json", GOOD), ("b.json", GOOD)]
    shards = [index_shard(write_tar(tmp_path / f"{number}.tar", members)) for number in range(4)]
    loader = BatchLoader([Source("mine", shards)], SETTINGS, tokenizer, 4, workers=workers)
    for end in gone:
        (tmp_path / f"2{end}").unlink()
    lost = sum(next(loader).skipped_samples for _ in range(20))
    assert lost > 0
    if workers == 0:
        assert f"left out {tmp_path}/2.tar: " in caplog.text
        assert "a read error (No such file or directory)" in caplog.text


@pytest.mark.parametrize("name", ["read_document", "decode_image"])
def test_an_error_in_our_own_code_is_never_skipped(tmp_path, tokenizer, monkeypatch, name):
    source = source_of(tmp_path, ("a.json", record(["a", None], [None, "000.jpg"])), ("a.000.jpg", picture(0)))

    def broken(*_):
        raise TypeError("a bug")

    monkeypatch.setattr(lanes, name, broken)
    with pytest.raises(TypeError, match="a bug"):
        Lane([source], SETTINGS, 0, tokenizer).next_row()


def test_the_policy_is_told_in_one_place():
    assert "data.max_bad_share" in skips.__doc__
