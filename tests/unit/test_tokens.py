"""The grammar of an interleaved sequence."""

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from lcl_ds.tokens import TextTokenizer, Vocabulary, encode_sequence, labels_of

VOCABULARY = Vocabulary(text_size=100)
SOT, EOT, IMG, SOI, EOI = 100, 101, 102, 103, 104


def encode(text: str) -> list[int]:
    """One token per letter: a is 1, b is 2."""
    return [ord(c) - ord("a") + 1 for c in text if c != " "]


def sequence(segments, max_tokens=32, image_tokens=2, max_images=8):
    return encode_sequence(segments, encode, VOCABULARY, image_tokens, max_tokens, max_images)


def test_a_tokenizer_neither_cuts_nor_fills_up_texts_whatever_its_file_says(tmp_path):
    words = Tokenizer(WordLevel({str(number): number for number in range(9)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    words.enable_truncation(2)
    words.enable_padding(length=8)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    assert TextTokenizer(tmp_path).encode("3 1 4") == [3, 1, 4]


def test_a_document_is_sot_text_soi_image_eoi_text_eot():
    (only,) = sequence(["ab", 0, "c"])
    assert only.input_ids.tolist() == [SOT, 1, 2, SOI, IMG, IMG, EOI, 3, EOT]
    assert [(slot.image, slot.position, slot.has_context) for slot in only.slots] == [(0, 4, True)]


def test_an_image_before_all_text_has_no_context():
    (only,) = sequence([0, 1, "a", 2])
    assert [slot.has_context for slot in only.slots] == [False, False, True]


def test_neighbouring_texts_are_joined_and_blank_ones_left_out():
    (joined,) = sequence(["a", " ", "b"])
    assert joined.input_ids.tolist() == [SOT, 1, 2, EOT]


def test_a_long_document_continues_in_further_sequences_and_loses_nothing():
    segments = ["abcdefghij", 0, "klmno", 1, 2, "pqrst"]
    pieces = sequence(segments, max_tokens=10)
    assert all(len(piece.input_ids) <= 10 for piece in pieces)
    text = [t for piece in pieces for t in piece.input_ids if t < 100]
    assert text == encode("abcdefghijklmnopqrst")
    assert [slot.image for piece in pieces for slot in piece.slots] == [0, 1, 2]
    for piece in pieces:
        for slot in piece.slots:
            assert piece.input_ids[slot.position - 1 : slot.position + 3].tolist() == [SOI, IMG, IMG, EOI]


def test_a_piece_holds_at_most_max_images():
    pieces = sequence([0, 1, 2], max_images=2)
    assert [len(piece.slots) for piece in pieces] == [2, 1]


def test_a_row_too_short_for_an_image_is_refused():
    with pytest.raises(ValueError, match="cannot hold one image"):
        sequence([0], max_tokens=5)


def test_placeholders_and_eoi_are_no_labels_but_soi_and_eot_are():
    ids = np.array([SOT, 1, SOI, IMG, IMG, EOI, 2, EOT])
    positions, labels = labels_of(ids, VOCABULARY)
    assert positions.tolist() == [0, 1, 5, 6]
    assert labels.tolist() == [1, SOI, 2, EOT]


def test_control_tokens_never_come_from_text(demo_folder):
    tokenizer = TextTokenizer(demo_folder / "tokenizer")
    text = "a <start_of_image> <image> <end_of_text> &lt;start_of_image&gt; <|endoftext|>"
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.vocabulary.text_size
    assert tokenizer.decode(ids) == text


def test_an_unknown_tokenizer_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer at"):
        TextTokenizer(tmp_path / "nothing")
