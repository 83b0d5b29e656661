"""Documents seen as sequences, as pairs and with hidden text."""

import json

import numpy as np
import pytest

from lcl_ds.data.demo.corpus import make_document
from lcl_ds.data.documents import BadSampleError, Document, read_document
from lcl_ds.data.sequences import DocumentView, MaskedView, PairView, Sequencer
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.stream.packing import PackedSequence, Row, collate
from lcl_ds.tokens import Vocabulary
from tests.support.tars import write_tar

V = Vocabulary(text_size=50)
N, ROW = 3, 40
ENCODER = Sequencer(lambda text: [ord(c) - 96 for c in text if c != " "], V, N, ROW, 9)
STORY = Document("s", ("ab", 0, "cd", 1, "e"), ("0.jpg", "1.jpg"))
PICTURE = [V.soi, V.image, V.image, V.image, V.eoi]


def rng():
    return np.random.default_rng(0)


def batch_of(view, *sequences):
    rows = [Row((PackedSequence("k", s, np.zeros((len(s.images), 3, 8, 8), np.uint8)),)) for s in sequences]
    return collate(rows, ROW, 8, V, view.readout_names)


def test_a_pair_takes_the_matched_sentence_else_the_one_before_else_the_one_after():
    assert STORY.image_texts() == [("ab", 0), ("cd", 1)]
    matched = Document("s", STORY.segments, STORY.images, matches=(4, None))
    assert matched.image_texts() == [("e", 0), ("cd", 1)]
    assert Document("s", (0, "x"), ("0.jpg",)).image_texts() == [("x", 0)]
    assert Document("s", (0, 1), ("0.jpg", "1.jpg")).image_texts() == []


def test_matched_sentences_are_read_by_mmc4s_name(tmp_path):
    record = {
        "texts": ["one", " ", None, "two", None],
        "images": [None, None, "000.jpg", None, "001.jpg"],
        "matched_text_index": [None, None, 3, None, 1],
    }
    members = [("a.json", json.dumps(record).encode()), ("a.000.jpg", b"x"), ("a.001.jpg", b"y")]
    document = read_document(Source("mine", [index_shard(write_tar(tmp_path / "x.tar", members))]), 0)
    assert document.segments == ("one", 0, "two", 1)
    assert document.matches == (2, None)  # a blank sentence describes nothing
    record["matched_text_index"] = [1]
    members[0] = ("a.json", json.dumps(record).encode())
    with pytest.raises(BadSampleError, match="matched_text_index"):
        read_document(Source("mine", [index_shard(write_tar(tmp_path / "y.tar", members))]), 0)


def test_the_demos_matched_sentences_name_what_their_pictures_show():
    for index in range(50):
        texts, scenes, matched = make_document(0, "train-documents", index)
        for scene, match in zip(scenes, matched, strict=True):
            assert (scene is None) == (match is None)
            if scene is not None:
                assert f"{scene.large.colour} {scene.large.shape}" in texts[match]


def test_clip_sees_the_text_alone_and_reads_its_end():
    view = PairView(("text",))
    first, second = view.encode(STORY, ENCODER, rng())
    assert first.input_ids.tolist() == [V.sot, 1, 2, V.eot]
    batch = batch_of(view, first, second)
    assert batch.slot_images.tolist() == []
    assert batch.image_count == 2
    assert batch.readouts["context"].positions.tolist() == [3, ROW + 3]
    assert batch.readouts["context"].images.tolist() == [0, 1]
    assert len(batch.labels) == 0


def test_the_passes_of_a_pair_share_one_image_and_restart_positions():
    view = PairView(("text", "caption", "match"))
    tokens, _ = view.encode(STORY, ENCODER, rng())
    told = [V.sot, *PICTURE, 1, 2, V.eot]
    assert tokens.input_ids.tolist() == [V.sot, 1, 2, V.eot, *told, *told]
    batch = batch_of(view, tokens)
    assert batch.image_count == 1
    assert batch.position_ids[0, :22].tolist() == [*range(4), *range(9), *range(9)]
    assert batch.slot_images.tolist() == [0, 0]
    assert batch.slot_positions.tolist() == [4 + 2, 13 + 2]
    assert {name: r.positions.tolist() for name, r in batch.readouts.items()} == {
        "context": [3],
        "matched": [12],
        "mismatched": [21],
    }
    assert batch.labels.tolist() == [1, 2, V.eot]
    assert batch.label_positions.tolist() == [4 + 5, 4 + 6, 4 + 7]


def test_the_text_of_a_pair_is_cut_to_what_a_row_holds():
    (tokens,) = PairView(("text", "caption")).encode(Document("l", ("a" * 99, 0), ("0.jpg",)), ENCODER, rng())
    assert ROW - 2 < len(tokens.input_ids) <= ROW
    with pytest.raises(ValueError, match="cannot hold a pair in 3 passes"):
        PairView(("caption", "caption", "match")).encode(STORY, Sequencer(ENCODER.encode, V, N, 20, 9), rng())


def test_a_document_without_pairs_is_a_bad_sample_for_pairs():
    with pytest.raises(BadSampleError, match="no image with text"):
        PairView(("text",)).encode(Document("t", ("ab",), ()), ENCODER, rng())
    view = PairView(("text",))
    assert view.without_images(view.encode(STORY, ENCODER, rng())[0], [0], ENCODER) is None


def test_hidden_text_is_labelled_in_place_and_control_tokens_never_hidden():
    view = MaskedView(text_share=0.5)
    document = Document("d", ("abcdefghijklmnopqrst", 0), ("0.jpg",))
    (tokens,) = view.encode(document, ENCODER, rng())
    (plain,) = DocumentView().encode(document, ENCODER, rng())
    positions, labels = tokens.label_positions, tokens.labels
    assert 4 < len(positions) < 16
    assert (tokens.input_ids[positions] == V.image).all()
    assert labels.tolist() == plain.input_ids[positions].tolist()
    assert np.delete(tokens.input_ids, positions).tolist() == np.delete(plain.input_ids, positions).tolist()
    assert (labels < V.text_size).all()
    assert view.encode(document, ENCODER, rng())[0].input_ids.tolist() == tokens.input_ids.tolist()


def test_a_lost_image_leaves_hidden_text_hidden():
    view = MaskedView(text_share=0.9)
    (tokens,) = view.encode(STORY, ENCODER, rng())
    left = view.without_images(tokens, [0], ENCODER)
    assert left.images == (1,)
    restored = left.input_ids.copy()
    restored[left.label_positions] = left.labels
    assert restored.tolist() == [V.sot, 1, 2, 3, 4, *PICTURE, 5, V.eot]
    assert left.labels.tolist() == tokens.labels.tolist()
    only = DocumentView().encode(Document("i", (0,), ("0.jpg",)), ENCODER, rng())[0]
    assert DocumentView().without_images(only, [0], ENCODER) is None
