"""A small corpus is sampled fairly: every sample about once an epoch; ``python -m tests.unit.data.test_sampling``.

The stream is read row by row and each row's samples are counted, as training would see them.
"""

import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from lcl_ds.data.demo.corpus import build_demo
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.storage import expand_paths
from lcl_ds.data.stream.lanes import Lane, LaneSettings, choose_lanes
from lcl_ds.tokens import TextTokenizer

DEFAULTS = LaneSettings(
    lanes=0, data_seed=0, augmentation_seed=0, row_tokens=256, row_images=16, image_tokens=16, image_size=32
)


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "demo"
    build_demo(folder, documents=527, pairs=527, heldout_documents=1, shard_size=100)
    return folder


def source_of(folder, name, weight=1.0):
    return Source(name, [index_shard(p) for p in expand_paths(f"{folder}/train-{name}-*.tar")], weight)


def stream_of(sources, settings, tokenizer):
    """(keys of the samples, tokens) of the rows of all lanes in their global order; pictures are not decoded."""
    settings = settings if settings.lanes else replace(settings, lanes=choose_lanes(sources, settings, tokenizer))
    lanes = [Lane(sources, settings, n, tokenizer) for n in range(settings.lanes)]
    while True:
        for lane in lanes:
            pieces = lane._next_pieces()
            keys = {(piece.source, piece.sample, piece.draw, lane.number) for piece in pieces}
            yield [key[:2] for key in sorted(keys)], sum(len(piece.tokens.input_ids) for piece in pieces)


def fairness(sources, settings, tokenizer, rows_per_step, epochs):
    """Duplicates in the worst step, samples never seen, most and least showings, padding, after some epochs."""
    wanted = epochs * sum(len(source) for source in sources)
    shown: Counter = Counter()
    worst, rows, tokens, step = 0, 0, 0, []
    for keys, length in stream_of(sources, settings, tokenizer):
        rows, tokens = rows + 1, tokens + length
        shown.update(keys)
        step += keys
        if rows % rows_per_step == 0:
            worst, step = max(worst, len(step) - len(set(step))), []
        if shown.total() >= wanted:
            break
    counts = [shown[s, n] for s, source in enumerate(sources) for n in range(len(source))]
    return worst, counts.count(0), max(counts), min(counts), 1 - tokens / (rows * settings.row_tokens)


@pytest.mark.parametrize("name", ["documents", "pairs"])
@pytest.mark.parametrize(("lanes", "group_rows", "most_padding"), [(0, 1, 0.04), (0, 2, 0.04), (8, 1, 0.07)])
def test_after_three_epochs_of_a_small_corpus_each_sample_came_two_to_four_times(
    small_corpus, name, lanes, group_rows, most_padding
):
    settings = replace(DEFAULTS, lanes=lanes, group_rows=group_rows)
    tokenizer = TextTokenizer(small_corpus / "tokenizer")
    worst, unseen, most, least, padding = fairness([source_of(small_corpus, name)], settings, tokenizer, 8, epochs=3)
    assert unseen == 0
    assert least >= 2
    assert most <= 4
    assert padding < most_padding
    assert worst <= 12  # where an epoch ends and the next begins


def test_the_number_of_lanes_follows_the_size_of_the_corpus(small_corpus):
    tokenizer = TextTokenizer(small_corpus / "tokenizer")

    def lanes(shards):
        source = source_of(small_corpus, "pairs")
        return choose_lanes([Source("pairs", source.shards * shards)], DEFAULTS, tokenizer)

    assert [lanes(n) for n in (1, 4, 16, 64, 256)] == sorted(lanes(n) for n in (1, 4, 16, 64, 256))
    assert lanes(1) <= 2
    assert lanes(256) == 64


@pytest.mark.parametrize(("lanes", "group_rows", "early", "late"), [(1, 1, 0, 3), (8, 1, 0, 3), (16, 4, 6, 6)])
def test_weights_that_change_by_step_take_effect_at_that_step(small_corpus, lanes, group_rows, early, late):
    """``early``, ``late``: steps' worth of rows with the new source before the change, and with the old one after."""
    sources = [source_of(small_corpus, "documents", {0: 1, 50: 0}), source_of(small_corpus, "pairs", {0: 0, 50: 1})]
    settings = replace(DEFAULTS, lanes=lanes, group_rows=group_rows, rows_per_step=16)
    stream = stream_of(sources, settings, TextTokenizer(small_corpus / "tokenizer"))
    rows = [{source for source, _ in next(stream)[0]} for _ in range(100 * 16)]
    assert sum(1 in row for row in rows[: 50 * 16]) <= early * 16
    assert sum(0 in row for row in rows[50 * 16 :]) <= late * 16
    assert rows[-1] == {1}


CORPORA = (("pairs", 256, 8), ("pairs", 2048, 1), ("documents", 256, 32), ("documents", 2048, 4))
"""Samples, tokens of a row, and rows of a step: about 80 samples."""


def main() -> None:
    """Print the figures of a corpus of 527 samples; an argument sets the number of lanes."""
    lanes = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "demo"
        build_demo(folder, documents=527, pairs=527, heldout_documents=1, shard_size=100)
        tokenizer = TextTokenizer(folder / "tokenizer")
        for name, row_tokens, rows in CORPORA:
            sources = [source_of(folder, name)]
            settings = replace(DEFAULTS, row_tokens=row_tokens, lanes=lanes, row_images=row_tokens // 16)
            worst, unseen, most, least, padding = fairness(sources, settings, tokenizer, rows, epochs=2)
            print(
                f"{name}, rows of {row_tokens}: {lanes or choose_lanes(sources, settings, tokenizer)} lanes; "
                f"at most {worst} duplicates in a step of about 80; after two epochs {unseen} of 527 never seen, "
                f"showings {least} to {most}; padding {padding:.1%}"
            )


if __name__ == "__main__":
    main()
