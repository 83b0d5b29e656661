"""Fixtures of the tests of the stream."""

import pytest

from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.storage import expand_paths
from lcl_ds.tokens import TextTokenizer


@pytest.fixture(scope="module")
def tokenizer(demo_folder):
    return TextTokenizer(demo_folder / "tokenizer")


@pytest.fixture
def sources(demo_folder):
    def source(name, weight):
        shards = [index_shard(path) for path in expand_paths(f"{demo_folder}/train-{name}-*.tar")]
        return Source(name, shards, weight)

    return [source("documents", 2.0), source("pairs", 1.0)]
