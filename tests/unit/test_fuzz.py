"""Mutated shards, samples, images and source files: no crash, no hang, every skipped sample counted.

The suite runs a few hundred cases; ``python -m tests.unit.test_fuzz 10000`` runs that many.
"""

import io
import json
import logging
import random
import signal
import sys
import tempfile
import traceback
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lcl_ds.data.corpora import READERS
from lcl_ds.data.corpora.local_images import open_images
from lcl_ds.data.corpora.record import ReadOptions
from lcl_ds.data.demo.corpus import build_demo
from lcl_ds.data.documents import BadSampleError
from lcl_ds.data.images import check_image, decode_image
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.stream.lanes import Lane, LaneSettings, keyed_rng
from lcl_ds.data.stream.packing import collate
from lcl_ds.errors import UserError
from lcl_ds.tokens import TextTokenizer
from tests.support.corpora import MAKERS, PARQUET, has_pyarrow, mmc4_record, picture
from tests.support.tars import write_tar

LIMIT_S = 20
"""A single case that takes longer hangs."""
SAMPLES = 24
SETTINGS = LaneSettings(
    lanes=1,
    data_seed=0,
    augmentation_seed=0,
    row_tokens=8192,
    row_images=200,
    image_tokens=4,
    image_size=16,
    pack_window=SAMPLES,
    shuffle_blocks=2,  # of 16 samples: one window is one epoch
    max_text_bytes=5000,
    max_bad_share=0.999,
)


def mutate(data, rng):
    """Bytes cut, changed, zeroed, doubled or mixed up in one to three places."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randrange(len(data) + 1), rng.choice([1, 2, 8, 64, 512, 700])
        match rng.randrange(7):
            case 0:
                del data[at:]
            case 1:
                del data[at : at + length]
            case 2:
                data[at : at + length] = rng.randbytes(length)
            case 3:
                data[at : at + length] = bytes(length)
            case 4:
                data[at:at] = data[at : at + length]
            case 5 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case _:
                data[at : at + length] = b"\xff" * length
    return bytes(data)


def encoded(rng):
    """An image of a random format and mode."""
    format, mode = rng.choice(
        [(f, m) for f, modes in MODES.items() for m in modes],
    )
    pixels = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 255, (40, 30, 4), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("RGB")
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) << 8) if mode == "I;16" else image.convert(mode)
    options = {"exif": exif_of(rng.randint(1, 8))} if format in ("JPEG", "PNG", "WEBP") else {}
    if format in ("GIF", "WEBP") and rng.random() < 0.5:
        options |= {"save_all": True, "append_images": [image.transpose(0)]}
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P", "L"),
    "BMP": ("RGB", "L", "P", "1"),
}


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def check_image_case(rng, folder):
    """A mutated image is decoded or refused, and the check agrees with training about which."""
    data = mutate(encoded(rng), rng)
    try:
        pixels = decode_image(data, 16, (0.9, 1.0), keyed_rng(rng.randrange(1 << 30)))
    except BadSampleError:
        return "refused"
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == np.uint8
    check_image(data)
    return "decoded"


def document(rng, number):
    """Members of a good sample: a document with one image, or a pair."""
    if rng.random() < 0.3:
        return {"jpg": picture(number), "txt": f"caption {number}".encode()}
    record = {"texts": [f"text {number}", None], "images": [None, "000.jpg"]}
    return {"json": json.dumps(record).encode(), "000.jpg": picture(number)}


def bomb():
    """A PNG of 4 GPx in a few bytes."""
    buffer = io.BytesIO()
    Image.new("L", (60_000, 1)).save(buffer, "PNG")
    data = buffer.getvalue()
    header = data[12:20] + (60_000).to_bytes(4, "big") + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


TEXT_DAMAGE = [
    lambda text, rng: text[: len(text) // 2] + b"\xff",
    lambda text, rng: b"\xfe" + text,
    lambda text, rng: b"x" * 6000,
    lambda text, rng: b" " if text[:1] != b"{" else b"[]",
    lambda text, rng: b"" if text[:1] != b"{" else b'{"texts": ["\\ud800"], "images": [null]}',
    lambda text, rng: b"\n" if text[:1] != b"{" else b"[" * 4000,
    lambda text, rng: b"\t" if text[:1] != b"{" else b'{"texts": [null, ""], "images": [null, null]}',
    lambda text, rng: b"\0\xff" if text[:1] != b"{" else b'{"texts": ["a"], "images": []}',
]
IMAGE_DAMAGE = [
    lambda image, rng: image[: rng.randrange(len(image) - 20)],
    lambda image, rng: b"<!DOCTYPE html><html>404</html>",
    lambda image, rng: rng.randbytes(rng.randrange(1, 500)),
    lambda image, rng: bytes(rng.randrange(1, 500)),
    lambda image, rng: bomb(),
    lambda image, rng: picture(0, "TIFF"),
    lambda image, rng: picture(0, "GIF", side=1)[:10] + b"\0" * 9,
    lambda image, rng: None,
]
"""Each costs exactly one document or image."""


def check_count_case(rng, folder):
    """Samples damaged in ways that show: as many are counted as were damaged, and all others arrive."""
    share = rng.random()
    members, damaged, good = [], 0, set()
    for number in range(SAMPLES):
        sample = document(rng, number)
        if rng.random() < share:
            damaged += 1
            image = next(suffix for suffix in sample if suffix.endswith("jpg"))
            text = "txt" if "txt" in sample else "json"
            if rng.random() < 0.5:
                sample[text] = rng.choice(TEXT_DAMAGE)(sample[text], rng)
            else:
                sample[image] = rng.choice(IMAGE_DAMAGE)(sample[image], rng)
        else:
            good.add(f"{number:04d}")
        members += [(f"{number:04d}.{suffix}", data) for suffix, data in sample.items() if data is not None]
    shard = write_tar(folder / f"{rng.randrange(1 << 60)}.tar", members)
    good = {f"s/{shard.name}/{key}" for key in good}
    lane = lane_of(shard)
    try:
        row = lane.next_row()
    except UserError:
        assert damaged == SAMPLES
        return "too many damaged"
    assert row.skipped_samples == damaged, f"{damaged} damaged, {row.skipped_samples} counted"
    whole = {sequence.key for sequence in row.sequences if len(sequence.pixels)}
    assert whole == good, f"not the same samples: {whole ^ good}"
    return f"{damaged * 4 // SAMPLES} quarters damaged and counted"


def named(error, path):
    """A refusal says which file it means."""
    assert str(path) in str(error)
    return "refused"


def lane_of(path):
    return Lane([Source("s", [index_shard(path)])], SETTINGS, 0, check_count_case.tokenizer)


def check_shard_case(rng, folder):
    """A shard with mutated bytes is refused as a whole, or gives rows; nothing else happens."""
    members = [(f"{n:04d}.{s}", data) for n in range(SAMPLES) for s, data in document(rng, n).items()]
    path = write_tar(folder / f"{rng.randrange(1 << 60)}.tar", members)
    if rng.random() < 0.3:
        index_shard(path)  # the old index is there too
    path.write_bytes(mutate(path.read_bytes(), rng))
    try:
        lane = lane_of(path)
        rows = [lane.next_row() for _ in range(3)]
    except UserError as error:
        return named(error, path)
    vocabulary = check_count_case.tokenizer.vocabulary
    batch = collate(rows, SETTINGS.row_tokens, SETTINGS.image_size, vocabulary, SETTINGS.view.readout_names)
    assert int(batch.input_ids.max()) < vocabulary.size
    return "rows"


def check_source_case(rng, folder):
    """A published file with mutated bytes or records: every record is a document or a reason."""
    corpora = check_source_case.corpora
    name = rng.choice(sorted(corpora))
    corpus, images = corpora[name]
    path = folder / f"{rng.randrange(1 << 60)}-{corpus.sources[0].name}"
    if name == "mmc4" and rng.random() < 0.7:
        path = path.with_suffix(".jsonl")
        path.write_bytes(b"".join(mutate(json.dumps(mmc4_record(n)).encode(), rng) + b"\n" for n in range(4)))
    else:
        path.write_bytes(mutate(corpus.sources[0].read_bytes(), rng))
    try:
        documents = list(READERS[corpus.format](path, ReadOptions(images)))
    except UserError as error:
        return named(error, path)
    for read in documents:
        assert read.texts or read.skips
        assert len(read.texts) == len(read.images) == len(read.matched_text_index)
    return "read"


CASES = (check_image_case, check_count_case, check_shard_case, check_source_case)


def run_case(number, folder):
    """One case, by its number alone; raises what went wrong."""
    rng = random.Random(number)
    case = CASES[number % len(CASES)]
    signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        return f"{case.__name__}: {case(rng, folder)}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for path in folder.iterdir():
            if path.is_file():
                path.unlink()


class TooLongError(BaseException):
    """No error of a picture or a record, so nothing takes it for one."""


def _too_long(*_):
    raise TooLongError(f"it takes longer than {LIMIT_S} s")


def prepare(folder, tokenizer):
    """What the cases share: a tokenizer, and the corpora that they mutate."""
    check_count_case.tokenizer = TextTokenizer(tokenizer)
    check_source_case.corpora = {}
    for name, make in MAKERS.items():
        if name in PARQUET and not has_pyarrow():
            continue
        corpus = make(folder / name)
        images, _ = open_images(corpus.images, folder / "work")
        check_source_case.corpora[name] = corpus, images


@pytest.fixture(scope="module")
def prepared(demo_folder, tmp_path_factory):
    prepare(tmp_path_factory.mktemp("corpora"), demo_folder / "tokenizer")


@pytest.mark.parametrize("case", range(len(CASES)), ids=[case.__name__ for case in CASES])
def test_mutated_input_neither_crashes_nor_hangs_nor_goes_uncounted(case, prepared, tmp_path):
    warnings.simplefilter("ignore")
    outcomes = {run_case(number, tmp_path) for number in range(case, 400, len(CASES))}
    assert len(outcomes) >= 2, f"the mutations test nothing: {outcomes}"


def main(count):
    """Run cases 0 to ``count``; outcomes by kind and every failure, as JSON. Returns the exit code."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    outcomes, failures = Counter(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_demo(folder / "demo", documents=40, pairs=10, heldout_documents=1)
        prepare(folder / "corpora", folder / "demo" / "tokenizer")
        (folder / "cases").mkdir()
        for number in range(count):
            try:
                outcomes[run_case(number, folder / "cases")] += 1
            except (Exception, TooLongError) as error:
                failures.append(f"case {number}: {type(error).__name__}: {error}")
                traceback.print_exc()
    print(json.dumps({"outcomes": dict(sorted(outcomes.items())), "failures": failures}, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000))
