"""Images that keep their aspect ratio: their grids, what is shown of them, and rows within two budgets in tokens."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lcl_ds.assembly import lane_settings, open_checked_data
from lcl_ds.data.images import ORIENTATION, decode_image, upright_size
from lcl_ds.data.native import HEADER_BYTES
from lcl_ds.data.sequences import PairView
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.stream.lanes import Lane, LaneSettings, keyed_rng
from lcl_ds.data.stream.loader import BatchLoader
from lcl_ds.data.stream.packing import collate
from lcl_ds.errors import UserError
from lcl_ds.grids import Grid, NativeResolution, choose_grid
from tests.support.lanes import rows_of
from tests.support.shapes import photo, write_shapes
from tests.support.small import small_config
from tests.support.tars import write_tar

NATIVE = NativeResolution(patch_size=8, least=24, most=24)
SETTINGS = LaneSettings(
    lanes=1,
    data_seed=1,
    augmentation_seed=2,
    row_tokens=256,
    row_images=9,
    image_tokens=24,
    image_size=40,
    native=NATIVE,
    row_image_tokens=150,
    pack_window=32,
)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def lane_of(tmp_path, tokenizer, members, settings=SETTINGS):
    return Lane([Source("s", [index_shard(write_tar(tmp_path / "s.tar", members))])], settings, 0, tokenizer)


def document(key, texts, pictures):
    """Members of a document: all texts, then all pictures."""
    names = [f"{number:03d}.jpg" for number in range(len(pictures))]
    record = {"texts": [*texts, *[None] * len(names)], "images": [*[None] * len(texts), *names]}
    members = [(f"{key}.json", json.dumps(record).encode())]
    return members + [(f"{key}.{name}", data) for name, data in zip(names, pictures, strict=True)]


@pytest.mark.parametrize(
    ("width", "height", "least", "grid"),
    [
        (640, 640, 256, (16, 16)),
        (100, 100, 256, (16, 16)),
        (640, 480, 256, (14, 18)),
        (480, 640, 256, (18, 14)),
        (4000, 200, 256, (3, 72)),
        (160, 96, 4, (6, 10)),
        (20, 20, 4, (2, 2)),
        (3, 3, 1, (1, 1)),
        (1600, 1600, 4, (16, 16)),
    ],
)
def test_a_grid_keeps_the_aspect_ratio_within_the_bounds(width, height, least, grid):
    assert choose_grid(width, height, 16, least, 256) == grid


def test_no_grid_is_larger_than_the_budget_and_common_ones_fill_it():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        width, height = (int(side) for side in 10 ** rng.uniform(0, 5, 2))
        most = int(rng.integers(1, 300))
        rows, columns = choose_grid(width, height, 14, int(rng.integers(1, most + 1)), most)
        assert min(rows, columns) >= 1
        assert rows * columns <= most
        width, height = (int(side) for side in rng.integers(500, 1000, 2))
        rows, columns = choose_grid(width, height, 14, 196, 196)
        assert rows * columns > 0.9 * 196
        assert 0.88 < columns / rows * height / width < 1.13


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_a_turned_image_is_that_of_what_is_decoded(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = Image.fromarray(np.zeros((16, 40, 3), np.uint8))
    image.paste((255, 0, 0), (0, 0, 20, 16))
    expected = (40, 16) if orientation < 5 else (16, 40)
    for format in ("JPEG", "PNG", "WEBP"):
        data = encoded(image, format, exif=exif)
        assert upright_size(data) == expected
        whole = decode_image(data, expected[::-1])
        red = whole[0].astype(int) > 128
        assert whole.shape == (3, *expected[::-1])
        assert 0.45 < red.mean() < 0.55


def test_the_whole_image_is_shown_and_a_crop_is_of_its_own_shape():
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, :6], pixels[:, -6:] = (255, 0, 0), (0, 0, 255)
    data = encoded(Image.fromarray(pixels))
    whole = decode_image(data, (8, 24))
    assert whole[0, :, 0].min() > 200
    assert whole[2, :, -1].min() > 200
    assert decode_image(data, 8)[:, :, [0, -1]].max() == 0  # the square in the middle
    drawn = [decode_image(data, (8, 24), (0.9, 1.0), keyed_rng(seed)) for seed in range(5)]
    assert len({image.tobytes() for image in drawn}) > 1
    assert (decode_image(data, (8, 24), (1.0, 1.0), keyed_rng(0)) == whole).all()


def test_a_square_is_cropped_as_in_a_run_of_squares():
    data = photo(np.random.default_rng(0), (1, 1), side=60)
    for seed in range(5):
        as_square, whole = (decode_image(data, size, (0.5, 0.9), keyed_rng(seed)) for size in (24, (24, 24)))
        assert (as_square == whole).all()


def strange_images(rng):
    """By what is strange about them: encoded pictures of 48 x 32 pixels, and others."""
    wide = Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    long_header = encoded(wide, "JPEG")
    note = b"\xff\xe1" + (40_002).to_bytes(2, "big") + b"x" * 40_000
    return {
        "grey": (encoded(wide.convert("L"), "JPEG"), (4, 6)),
        "16 bit": (encoded(Image.fromarray(rng.integers(0, 65536, (32, 48), dtype=np.uint16))), (4, 6)),
        "CMYK": (encoded(wide.convert("CMYK"), "JPEG"), (4, 6)),
        "transparent": (encoded(wide.convert("RGBA")), (4, 6)),
        "palette": (encoded(wide.convert("P"), "GIF"), (4, 6)),
        "turned": (encoded(wide, "JPEG", exif=turned), (6, 4)),
        "turned at the end": (encoded(wide, "WEBP", exif=turned), (6, 4)),
        "a long header": (long_header[:2] + 3 * note + long_header[2:], (4, 6)),
        "huge": (encoded(Image.new("RGB", (6000, 3000), "red"), "JPEG"), (3, 7)),
        "tiny": (encoded(wide.resize((3, 3))), (4, 5)),
        "a strip": (encoded(wide.resize((60, 3))), (1, 22)),
        "one pixel": (encoded(wide.resize((1, 1))), None),
        "a line": (encoded(wide.resize((400, 1))), None),
        "cut off in its header": (encoded(wide, "JPEG")[:100], None),
        "no image": (b"<html>404</html>", None),
        "empty": (b"", None),
    }


def test_images_of_all_kinds_get_the_grid_of_what_is_seen_and_bad_ones_are_left_out(tmp_path, tokenizer, caplog):
    images = strange_images(np.random.default_rng(0))
    assert len(images["a long header"][0]) > HEADER_BYTES
    members = [m for n, (data, _) in enumerate(images.values()) for m in document(f"{n:02d}", ["ab"], [data])]
    lane = lane_of(tmp_path, tokenizer, members, replace(SETTINGS, max_bad_share=0.9))
    seen, bad = {}, 0
    for row in rows_of(lane, 12):
        bad += row.skipped_samples
        for sequence in row.sequences:
            number = int(sequence.key.rpartition("/")[2])
            seen[number] = [grid[:2] for grid in sequence.grids]
            assert len(sequence.pixels) == sum(grid.patches for grid in sequence.grids)
    assert seen == {n: [grid] if grid else [] for n, (_, grid) in enumerate(images.values())}
    assert bad >= sum(grid is None for _, grid in images.values())
    assert "an image in none of the accepted formats" in caplog.text
    assert "an image too small or too narrow" in caplog.text


@pytest.mark.parametrize("damaged_first", [True, False])
def test_an_image_whose_pixels_are_damaged_is_taken_out_with_all_of_its_tokens(tmp_path, tokenizer, damaged_first):
    rng = np.random.default_rng(0)
    good, damaged = photo(rng, (2, 1)), photo(rng, (1, 1), side=200)  # of 21 and 20 tokens
    damaged = damaged[: len(damaged) // 2].replace(b"\xff\xd9", b"") + b"\xff\xd8\xff"
    whole, left = (
        next(
            sequence
            for row in rows_of(lane_of(tmp_path, tokenizer, document("a", ["ab"], pictures)), 3)
            for sequence in row.sequences
        )
        for pictures in ([good], [damaged, good] if damaged_first else [good, damaged])
    )
    assert [grid[:2] for grid in left.grids] == [grid[:2] for grid in whole.grids] == [(3, 7)]
    assert left.tokens.input_ids.tolist() == whole.tokens.input_ids.tolist()


@pytest.mark.parametrize("pictures", [0, 40])
def test_documents_of_any_number_of_images_stay_within_both_budgets(tmp_path, tokenizer, pictures):
    rng = np.random.default_rng(0)
    shapes = [photo(rng, aspect) for aspect in [(1, 1), (5, 1), (2, 3), (16, 9)]]
    members = [
        m
        for n in range(4)
        for m in document(f"{n}", ["a b c"], [shapes[int(rng.integers(4))] for _ in range(pictures)])
    ]
    lane = lane_of(tmp_path, tokenizer, members)
    for row in rows_of(lane, 8):
        grids = [grid for sequence in row.sequences for grid in sequence.grids]
        assert sum(grid.tokens for grid in grids) <= SETTINGS.row_image_tokens
        assert sum(len(sequence.tokens.input_ids) for sequence in row.sequences) <= SETTINGS.row_tokens
        assert pictures == 0 or len(grids) > 2
        batch = collate([row], 256, 40, tokenizer.vocabulary, ("context",), NATIVE)
        assert batch.packed.count == max(1, len(grids))
        assert batch.grids == tuple(grids)
        if not grids:
            assert batch.packed.slot_places.tolist() == [*range(256, 256 + batch.packed.grids[0].tokens)]
            assert batch.packed.beyond == batch.packed.grids[0].tokens == 20
            assert (batch.images == 127).all()


def test_a_pair_has_room_for_its_text_beside_its_own_image(tmp_path, tokenizer):
    settings = replace(SETTINGS, view=PairView(("text", "caption")), row_tokens=64)
    text = " ".join("a" * 60)
    for aspect in ((1, 1), (20, 1)):
        image = encoded(Image.new("RGB", (40 * aspect[0], 40 * aspect[1]), "red"))
        lane = lane_of(tmp_path, tokenizer, document("a", [text], [image]), settings)
        (sequence,) = rows_of(lane, 1)[0].sequences
        (grid,) = sequence.grids
        assert grid[:2] == choose_grid(*(40 * side for side in aspect), 8, 24, 24)
        assert len(sequence.tokens.input_ids) in (63, 64)
        collate([lane.next_row()], 64, 40, tokenizer.vocabulary, settings.view.readout_names, NATIVE)


def test_rows_of_ten_aspect_ratios_have_hardly_any_padding(tmp_path, tokenizer):
    source = Source("s", [index_shard(write_shapes(tmp_path / "s.tar", documents=300))])
    native = NativeResolution(patch_size=8, least=100, most=100)
    budgets = {"row_tokens": 2048, "row_image_tokens": 2048, "pack_window": 128}
    lane = Lane([source], replace(SETTINGS, native=native, image_tokens=100, **budgets), 0, tokenizer)
    rows = [lane._next_pieces() for _ in range(12)]
    tokens = sum(len(piece.tokens.input_ids) for row in rows for piece in row)
    assert len({grid[:2] for row in rows for piece in row for grid in piece.grids}) == 10
    assert 1 - tokens / (12 * 2048) < 0.02


def test_a_lane_continues_exactly_from_any_row(tmp_path, tokenizer):
    source = Source("s", [index_shard(write_shapes(tmp_path / "s.tar"))])
    settings = replace(SETTINGS, group_rows=2, row_pool=8)

    def contents(row):
        return [(s.key, s.tokens.input_ids.tolist(), s.pixels.tobytes(), s.grids) for s in row.sequences]

    whole = [contents(row) for row in rows_of(Lane([source], settings, 0, tokenizer), 12)]
    for cut in (1, 6):
        lane = Lane([source], settings, 0, tokenizer)
        rows_of(lane, cut)
        state = json.loads(json.dumps(lane.state()))
        assert [contents(row) for row in rows_of(Lane([source], settings, 0, tokenizer, state), 4)] == whole[
            cut : cut + 4
        ]


def test_settings_become_bounds_and_budgets(demo_folder):
    shards = [f"data.shards={demo_folder}/train-pairs-*.tar", f"data.tokenizer={demo_folder}/tokenizer"]
    native = ["model.vision.resolution=native", "data.row_tokens=96"]
    settings = lane_settings(small_config(*shards, *native))
    assert settings.native == NativeResolution(patch_size=8, least=4, most=4)
    assert (settings.image_tokens, settings.image_budget) == (4, 12 * 4)
    config = small_config(*shards, *native, "model.vision.max_image_tokens=9", "model.vision.min_image_tokens=2")
    settings = lane_settings(config)
    assert settings.native == NativeResolution(patch_size=8, least=2, most=9)
    assert (settings.image_tokens, settings.image_budget) == (9, 12 * 9)
    assert lane_settings(config, training=False).native is None
    data = open_checked_data(config)
    batch = next(BatchLoader(data.sources, settings, data.tokenizer, 2))
    assert set(batch.grids) == {Grid(3, 3, 9)}
    assert batch.picture(0).shape == (3, 24, 24)


def opened(config):
    open_checked_data(config)
    return config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.vision.max_image_tokens=9"], "max_image_tokens: all images are squares; set resolution=native"),
        (["data.row_image_tokens=90"], "data.row_image_tokens: all images have as many tokens"),
        (["+model.vision.min_image_tokens=9"], "model.vision.min_image_tokens: 9 is more than the 4 patches"),
        (
            ["+model.vision.max_image_tokens=4", "model.vision.min_image_tokens=9"],
            "min_image_tokens: 9 is more than max_image_tokens",
        ),
        (["+data.row_image_tokens=3"], "data.row_image_tokens: 3 cannot hold one image of 4 tokens"),
        (["+model.vision.max_image_tokens=99"], "data.row_tokens: 96 cannot hold one image of 99 tokens plus 4"),
        (["+train.image_sizes={0: 16}"], "train.image_sizes: sizes of squares by step, but model.vision.resolution"),
        (["+model.vision.attention=flash_attention_2"], "attention: flash_attention_2 does not read packed images"),
    ],
)
def test_settings_that_do_not_fit_are_named(demo_folder, overrides, message):
    shards = [f"data.shards={demo_folder}/train-pairs-*.tar", f"data.tokenizer={demo_folder}/tokenizer"]
    native = ["model.vision.resolution=native"] if overrides[0].startswith("+") else []
    given = [text.removeprefix("+") for text in overrides]
    with pytest.raises(UserError, match=message):
        lane_settings(opened(small_config(*shards, "data.row_tokens=96", *native, *given)))
