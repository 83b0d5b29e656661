"""Rows from sequences, batches from rows."""

import numpy as np
import torch

from lcl_ds.data.sequences import DocumentView
from lcl_ds.data.stream.packing import PackedSequence, Row, collate, pack
from lcl_ds.tokens import Vocabulary, encode_sequence

VOCABULARY = Vocabulary(text_size=50)
ROW, N, SIZE = 24, 4, 8


def packed(key, segments, value=0, rule="text_before"):
    (tokens,) = encode_sequence(segments, lambda text: [len(text)] * len(text), VOCABULARY, N, ROW, 9)
    tokens = DocumentView(rule).annotate(tokens, VOCABULARY)
    pixels = np.full((len(tokens.slots), 3, SIZE, SIZE), value, dtype=np.uint8)
    return PackedSequence(key, tokens, pixels)


def batch_of(*rows):
    return collate([Row(tuple(row)) for row in rows], ROW, SIZE, VOCABULARY, DocumentView.readout_names)


def test_pack_uses_every_sequence_once_within_both_budgets():
    rng = np.random.default_rng(0)
    lengths, images = rng.integers(1, 100, 200).tolist(), rng.integers(0, 5, 200).tolist()
    rows = pack(lengths, images, 100, 6)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(sum(lengths[i] for i in row) <= 100 for row in rows)
    assert all(sum(images[i] for i in row) <= 6 for row in rows)


def test_rows_come_fullest_first():
    assert pack([5, 3, 7, 2], [0] * 4, 10, 9) == [[2, 1], [0, 3]]


def test_positions_restart_in_every_document_and_in_padding_that_is_cut_like_documents():
    batch = batch_of([packed("a", ["xx"]), packed("b", ["y", 0])])
    padding = [position % 9 for position in range(ROW - 13)]
    assert batch.position_ids[0].tolist() == [*range(4), *range(9), *padding]
    assert batch.max_seqlen == 9
    assert batch.cu_seqlens.tolist() == [*(0, 4), *range(13, ROW, 9), ROW]


def test_rows_of_nothing_are_padding_throughout():
    batch = batch_of([])
    assert batch.position_ids.max() == 0
    assert batch.token_count == batch.document_count == len(batch.labels) == 0


def test_flat_positions_point_at_placeholders_and_soi():
    batch = batch_of([packed("a", ["xx", 0])], [packed("b", [0, "y"]), packed("c", ["z", 0, 1])])
    flat = batch.input_ids.flatten()
    for position in batch.slot_positions.tolist():
        assert (flat[position : position + N] == VOCABULARY.image).all()
        assert flat[position - 1] == VOCABULARY.soi
        assert flat[position + N] == VOCABULARY.eoi
    assert batch.readouts["context"].images.tolist() == [0, 2, 3]
    pairs = batch.readouts["context"]
    assert torch.equal(pairs.positions, batch.slot_positions[pairs.images] - 1)


def test_labels_never_cross_documents():
    batch = batch_of([packed("a", ["xx"]), packed("b", ["yyy"])])
    assert batch.label_positions.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert batch.labels.tolist() == [2, 2, VOCABULARY.eot, 3, 3, 3, VOCABULARY.eot]


def test_the_reference_rule_counts_all_images_but_one_at_the_very_start_of_a_sequence():
    for rule, images in (("text_before", []), ("reference", [0, 1])):
        row = [packed("a", [0, "x"], rule=rule), packed("b", [0, "y"], rule=rule)]
        assert batch_of(row).readouts["context"].images.tolist() == images


def test_without_images_one_constant_image_stands_beyond_the_rows():
    batch = batch_of([packed("a", ["xx"])])
    assert batch.image_count == 0
    assert batch.images.shape == (1, 3, SIZE, SIZE)
    assert batch.slot_positions.tolist() == [ROW]
    assert len(batch.readouts["context"]) == 0


def test_counts_and_keys():
    batch = batch_of([packed("a", ["xx", 0])], [packed("b", ["y"])])
    assert (batch.image_count, batch.document_count, batch.token_count) == (1, 2, 10 + 3)
    assert batch.keys == ("a", "b")
