"""A sample that is read for too long is named."""

import logging
import threading
import time
from dataclasses import replace

import pytest

from lcl_ds.data.stream.loader import BatchLoader
from lcl_ds.data.stream.stalls import StallWatch
from tests.support.lanes import SETTINGS


def test_a_slow_read_is_named_with_shard_and_key_once(sources, tokenizer, caplog, monkeypatch):
    source = sources[1]
    read = source.read
    slow = source.sample(5).key

    def read_slowly(number, suffix):
        if source.sample(number).key == slow and suffix == "txt":
            time.sleep(0.4)
        return read(number, suffix)

    monkeypatch.setattr(source, "read", read_slowly)
    settings = replace(SETTINGS, lanes=1, stall_seconds=0.1)
    with caplog.at_level(logging.WARNING):
        loader = BatchLoader([source], settings, tokenizer, 1)
        while not caplog.records:
            next(loader)
    (record,) = caplog.records
    assert record.message.startswith(f"still reading {source.shards[0].path}: {slow} after 0.")


def test_a_sample_is_named_without_reading_from_the_disk_that_hangs(sources, tokenizer, caplog, monkeypatch):
    source = sources[1]

    def hangs(self):
        assert threading.current_thread().name != "stall-watch"
        time.sleep(0.6)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(type(source.shards[0]), "load_index", hangs)
    watch = StallWatch(0.1)
    watch.begin(source, 5)
    with caplog.at_level(logging.WARNING), pytest.raises(OSError, match="Input/output"):
        source.sample(5)
    watch.end()
    (record,) = caplog.records
    assert record.message.startswith(f"still reading {source.shards[0].path}: sample 5 after 0.")


def test_reading_at_ordinary_speed_is_not_named(sources, tokenizer, caplog):
    loader = BatchLoader(sources, replace(SETTINGS, stall_seconds=0.5), tokenizer, 4)
    for _ in range(10):
        next(loader)
    time.sleep(0.8)  # nothing is being read between two batches
    assert not caplog.records
