"""``python -m lcl_ds.data inspect``: a batch as a person reads it."""

import base64
import io
import json
import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
from PIL import Image

from lcl_ds.data.__main__ import main
from lcl_ds.data.sequences import MaskedView, PairView
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.storage import expand_paths
from lcl_ds.data.stream.lanes import LaneSettings
from lcl_ds.data.stream.loader import BatchLoader
from lcl_ds.grids import NativeResolution
from lcl_ds.report.batch_page import _shown_side, _size_text, page, passages_of
from lcl_ds.tokens import TextTokenizer
from tests.support.corpora import picture
from tests.support.shapes import write_shapes
from tests.support.tars import write_tar

SETTINGS = LaneSettings(
    lanes=1,
    data_seed=1,
    augmentation_seed=2,
    row_tokens=256,
    row_images=12,
    image_tokens=16,
    image_size=32,
    pack_window=20,
)


@pytest.fixture(scope="module")
def tokenizer(demo_folder):
    return TextTokenizer(demo_folder / "tokenizer")


@pytest.fixture
def batch(demo_folder, tokenizer):
    shards = [index_shard(path) for path in expand_paths(f"{demo_folder}/train-*.tar")]
    return next(BatchLoader([Source("demo", shards)], SETTINGS, tokenizer, 5))


def test_the_passages_are_the_rows_cut_where_positions_restart(batch, tokenizer):
    passages = passages_of(batch, tokenizer)
    assert [token.id for passage in passages for token in passage.tokens] == batch.input_ids.flatten().tolist()
    starts = [(passage.row, passage.start) for passage in passages]
    assert starts == [tuple(index) for index in np.argwhere(batch.position_ids.numpy() == 0).tolist()]
    assert sum(not passage.is_padding for passage in passages) == batch.document_count


def test_marks_stand_where_losses_and_readouts_are(batch, tokenizer):
    tokens = [token for passage in passages_of(batch, tokenizer) for token in passage.tokens]
    assert [i for i, token in enumerate(tokens) if token.has_loss] == sorted(batch.label_positions.tolist())
    assert [token.image for token in tokens if token.image is not None] == batch.slot_images.tolist()
    pairs = batch.readouts["context"]
    marked = [(i, token.readouts[0]) for i, token in enumerate(tokens) if token.readouts]
    expected = zip(pairs.positions.tolist(), pairs.images.tolist(), strict=True)
    assert marked == [(position, ("context", image)) for position, image in expected]
    assert all(tokens[i].text == "<start_of_image>" for i, _ in marked)
    assert sum(token.inside_image for token in tokens) == batch.image_count * 15


def test_the_page_shows_text_and_pixels(batch, tokenizer):
    html = page(batch, tokenizer, "a title")
    pictures = re.findall(r"base64,([^\"]+)", html)
    assert len(pictures) == batch.image_count
    first = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[0]))))
    assert (first.transpose(2, 0, 1) == batch.images[0].numpy()).all()
    shown = unescape(re.sub(r"<[^>]*>", "", re.sub(r"<figure.*?</figure>", "", html, flags=re.DOTALL)))
    assert "32 x 32 pixels, shown 3 times as large" in shown
    document = passages_of(batch, tokenizer)[0]
    assert "".join(t.text for t in document.tokens if t.image is None and not t.inside_image)[:40] in shown


def test_images_of_all_shapes_are_shown_whole_in_their_own(tmp_path, tokenizer):
    source = Source("s", [index_shard(write_shapes(tmp_path / "s.tar"))])
    native = NativeResolution(patch_size=8, least=16, most=16)
    settings = replace(SETTINGS, native=native, row_image_tokens=200)
    batch = next(BatchLoader([source], settings, tokenizer, 2))
    html = page(batch, tokenizer, "a title")
    sizes = [(int(w), int(h)) for w, h in re.findall(r'width="(\d+)" height="(\d+)"', html)]
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", html)]
    longest = max(max(picture.size) for picture in pictures)
    assert len({picture.size for picture in pictures}) == 4
    assert [picture.size for picture in pictures] == [(8 * grid.columns, 8 * grid.rows) for grid in batch.grids]
    shown = _shown_side(longest)
    assert sizes == [tuple(side * shown // longest for side in picture.size) for picture in pictures]
    assert "Images are whole, in their own aspect ratio." in text_of(html)


def text_of(html):
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def test_every_box_names_source_key_and_piece_of_its_document(tmp_path, tokenizer):
    """A document of three images is cut where two fit into a row, and a caption pair is whole."""
    texts, images = ["one", None, "two", None, "three", None], [None, "0.jpg", None, "1.jpg", None, "2.jpg"]
    record = json.dumps({"texts": texts, "images": images}).encode()
    members = [
        ("d.json", record),
        *((f"d.{i}.jpg", picture(i)) for i in range(3)),
        ("p.jpg", picture(4)),
        ("p.txt", b"x"),
    ]
    source = Source("web", [index_shard(write_tar(tmp_path / "a.tar", members))])
    settings = replace(SETTINGS, row_images=2, pack_window=2, shuffle_blocks=1)
    batch = next(BatchLoader([source], settings, tokenizer, 6))
    found = {(p.source, p.document, p.piece) for p in passages_of(batch, tokenizer) if not p.is_padding}
    document, pair = ("web", "a.tar/d"), ("web", "a.tar/p")
    assert found == {(*document, "piece 1 of 2"), (*document, "piece 2 of 2, continued"), (*pair, "")}
    shown = text_of(page(batch, tokenizer, "t"))
    assert all(f"{name} {document} {piece}".strip() in shown for name, document, piece in found)


def test_a_text_that_is_compared_with_an_image_has_it_at_its_side(demo_folder, tokenizer):
    sources = [Source("demo", [index_shard(path) for path in expand_paths(f"{demo_folder}/train-documents-*.tar")])]
    made = next(BatchLoader(sources, replace(SETTINGS, view=PairView(("text",))), tokenizer, 1))
    documents = [passage for passage in passages_of(made, tokenizer) if not passage.is_padding]
    assert [passage.distant_images for passage in documents] == [{i} for i in range(made.image_count)]
    assert {passage.piece for passage in documents} & {"pair 2 of 2", "pair 2 of 3", "pair 2 of 4"}
    assert page(made, tokenizer, "t").count("<img ") == made.image_count


def test_hidden_tokens_are_shown_as_hidden(demo_folder, tokenizer):
    sources = [Source("demo", [index_shard(path) for path in expand_paths(f"{demo_folder}/train-documents-*.tar")])]
    made = next(BatchLoader(sources, replace(SETTINGS, view=MaskedView()), tokenizer, 1))
    tokens = [token for passage in passages_of(made, tokenizer) for token in passage.tokens]
    assert [i for i, token in enumerate(tokens) if token.is_hidden] == sorted(made.label_positions.tolist())
    assert sum(token.inside_image for token in tokens) == made.image_count * 15


@pytest.mark.parametrize(("side", "shown"), [(32, 96), (64, 128), (96, 96), (224, 224), (384, 224)])
def test_images_are_shown_whole_times_as_large_or_made_smaller_and_the_page_says_so(side, shown):
    assert _shown_side(side) == shown
    said = _size_text(side, shown)
    assert said.startswith(f"{side} x {side} pixels")
    assert ("as large" in said, "smaller" in said) == (shown > side, shown < side)


def test_text_cannot_become_markup(tmp_path, tokenizer):
    record = json.dumps({"texts": ["<script>alert(1)</script>", None], "images": [None, "000.jpg"]}).encode()
    shard = write_tar(tmp_path / "a.tar", [("a.json", record), ("a.000.jpg", picture(0))])
    made = next(BatchLoader([Source("s", [index_shard(shard)])], replace(SETTINGS, pack_window=2), tokenizer, 1))
    html = page(made, tokenizer, "<script>")
    assert "<script>" not in html
    assert "&lt;script" in html


def test_the_command_writes_a_page_or_prints_rows(tmp_path, demo_folder, capsys):
    shards, tokenizer = f"{demo_folder}/train-documents-*.tar", ["--tokenizer", f"{demo_folder}/tokenizer"]
    demo = ["--recipe", "demo", *tokenizer]
    assert main(["inspect", shards, *demo, "--rows", "2", "--html", str(tmp_path / "page.html")]) == 0
    assert "<dd>2 of 256 tokens</dd>" in (tmp_path / "page.html").read_text()
    capsys.readouterr()
    assert main(["inspect", shards, *tokenizer, "--rows", "1", "--set", "objective.name=clip"]) == 0
    out = capsys.readouterr().out
    assert "<start_of_text>" in out
    assert "context: image 0" in out
    assert main(["inspect", f"{tmp_path}/none.tar", *tokenizer]) == 2
    assert main(["inspect", shards, "--tokenizer", f"{tmp_path}/none"]) == 2
    assert "--tokenizer: no tokenizer at" in capsys.readouterr().err
    assert main(["inspect", shards, "--recipe", "demo", "--tokenizer", f"{tmp_path}/none"]) == 2
    assert "data.tokenizer: no tokenizer at" in capsys.readouterr().err
