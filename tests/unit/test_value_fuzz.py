"""Values of every kind at every field of every format, through ``build``, ``check`` and a batch.

Every record has one odd value. Where it cannot do without that value it is counted, once; else it arrives whole. The
suite runs 60 records of each format; ``python -m tests.unit.test_value_fuzz 10000`` runs that many in all.
"""

import base64
import copy
import hashlib
import io
import json
import logging
import random
import shutil
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from lcl_ds.data.__main__ import main as run_data
from lcl_ds.data.demo.corpus import build_demo
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.stream.lanes import Lane, LaneSettings
from lcl_ds.data.stream.packing import collate
from lcl_ds.tokens import TextTokenizer
from tests.support.corpora import has_pyarrow, picture, tiff_of, url_of
from tests.support.tars import write_tar


class Raw(str):
    """JSON text that no Python value gives."""


LONG, NOT_UTF8, DEEP = Raw("1" * 5000), Raw('"\udcff\udcfe"'), Raw("[" * 100_000)
NULL, BLANK, STRINGS, SMALL = [None], ["", " "], ["abc", "3.5x"], [0, 3.5, 1e308]
EMPTY = [[]]
LISTS = [[[]], [None], [{}], [[[[]]]]]
OTHERS = [
    *(float("nan"), float("inf"), float("-inf"), 10**400, -(10**400), -1, True),
    *("\ud800", "nul\0", {}, {"a": {}}, {"type": "image"}, LONG, NOT_UTF8),
]
ALL = [*NULL, *BLANK, *STRINGS, *SMALL, *EMPTY, *LISTS, *OTHERS]


def but(*left_out):
    """All values but some."""
    return [value for value in ALL if not any(value is other for values in left_out for other in values)]


TEXT = [value for value in but(NULL, BLANK, STRINGS) if value != "nul\0"]
NAME = but(NULL)
NO_INDEX = [value for value in ALL if value not in (0, False)]
NO_SIMILARITY = [value for value in ALL if value not in (3.5, 1e308)]


# Each format: a good record by its number, the fields it needs with values that are none, and fields that it can do
# without. A path leads into the record; () is the record.

MMC4_NEEDS = {
    (): [*ALL, DEEP],
    ("text_list",): ALL,
    ("text_list", 1): TEXT,
    ("image_info",): ALL,
    ("image_info", 0): ALL,
    ("image_info", 0, "matched_text_index"): NO_INDEX,
    ("image_info", 0, "matched_sim"): NO_SIMILARITY,
}
MMC4_SPARES = [("url",), ("similarity_matrix",), ("more",), ("image_info", 0, "face_detections")]


def mmc4(number):
    entries = [
        {"image_name": f"{number}/{i}.jpg", "raw_url": url_of(i), "matched_text_index": 2 * i, "matched_sim": 0.3}
        for i in range(2)
    ]
    return {"url": "u", "text_list": [f"{word} {number}" for word in ("one", "two", "three")], "image_info": entries}


def mmc4_in_tar(number):
    record = mmc4(number)
    for i, entry in enumerate(record["image_info"]):
        entry["image_base64"] = base64.b64encode(pixels(number, i)).decode()
    return record


def comm(number):
    def image(i):
        return {"type": "image", "image_path": f"{number}/{i}.jpg", "url": "none"}

    text = {"type": "text", "content": f"step {number}"}
    summary = [{"type": "text", "content": f"about {number}"}]
    return {
        "data_id": f"d{number}",
        "title": f"a {number}",
        "summary_info": summary,
        "step_info": [[text, image(0)], [image(1)]],
    }


COMM_NEEDS = {
    (): [*ALL, DEEP],
    ("title",): TEXT,
    ("summary_info",): but(NULL, EMPTY),
    ("summary_info", 0): ALL,
    ("step_info",): ALL,
    ("step_info", 0): but(EMPTY),
    ("step_info", 0, 0): ALL,
    ("step_info", 0, 0, "type"): ALL,
    ("step_info", 0, 0, "content"): TEXT,
    ("step_info", 1, 0, "image_path"): ALL,
}
COMM_SPARES = [("data_id",), ("dataset_type",), ("step_info", 1, 0, "url"), ("step_info", 0, 1, "more")]


def mint_pdf(number):
    return {
        "url": "u",
        "texts": [None, f"first {number}", None],
        "images": ["page_0_image_8", None, "page_4_image_12"],
        "image_metadata": [{"page": 0, "xref": 8}, {"page": 4, "xref": 12}],
    }


PARALLEL_NEEDS = {(): [*ALL, DEEP], ("texts",): ALL, ("images",): ALL, ("texts", 1): TEXT, ("images", 0): NAME}
MINT_NEEDS = {
    **PARALLEL_NEEDS,
    ("image_metadata",): ALL,
    ("image_metadata", 1): ALL,
    ("image_metadata", 1, "page"): ALL,
    ("image_metadata", 1, "xref"): ALL,
}
MINT_SPARES = [("url",), ("pdf_name",), ("image_metadata", 0, "width")]


def pair(number):
    return {"url": "u", "caption": f"caption {number}", "key": "k", "status": "success"}


PAIR_SPARES = [("url",), ("key",), ("sha256",), ("exif",), ("width",), ("error_message",)]


def document(number):
    return {
        "url": "u",
        "texts": [None, f"text {number}", None],
        "images": ["000.jpg", None, "001.jpg"],
        "matched_text_index": [1, None, 1],
        "matched_sim": [0.25, None, 0.5],
    }


DOCUMENT_NEEDS = {
    **PARALLEL_NEEDS,
    ("matched_text_index",): but(NULL),
    ("matched_text_index", 0): [value for value in NO_INDEX if value is not None],
    ("labels",): but(NULL),
}
DOCUMENT_SPARES = [("url",), ("source_key",), ("matched_sim", 0), ("matched_sim", 1)]


def pixels(number, i):
    return picture(2 * (number % 50) + i)


def dumped(record):
    """JSON of a record, as bytes; raw values stand as they are."""
    raws = []

    def replace(value):
        if isinstance(value, Raw):
            raws.append(value)
            return f"@raw{len(raws) - 1}@"
        if isinstance(value, dict):
            return {key: replace(inner) for key, inner in value.items()}
        return [replace(inner) for inner in value] if isinstance(value, list) else value

    text = json.dumps(replace(record))
    for number, raw in enumerate(raws):
        text = text.replace(f'"@raw{number}@"', raw)
    return text.encode("utf-8", "surrogateescape")


def changed(record, path, value):
    """A copy of a record with another value at a path."""
    if not path:
        return value
    record = copy.deepcopy(record)
    place = record
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return record


def plain(value):
    """The value without raw JSON and without what torch's own reader refuses the whole file for."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return torch.zeros(2) if isinstance(value, Raw) or value == "\ud800" else value


def draw(rng, make, number, needs, spares):
    """A record with one odd value, and whether it has to be counted."""
    if rng.random() < 0.5:
        return changed(make(number), rng.choice(spares), rng.choice(ALL)), False
    path = rng.choice(sorted(needs, key=str))
    return changed(make(number), path, rng.choice(needs[path])), True


# Each writer gives the source files, whether each record has to be counted, and (texts, images) of those that need not.


def write_lines(folder, rng, count, make, needs, spares):
    drawn = [draw(rng, make, number, needs, spares) for number in range(count)]
    path = folder / "x.jsonl"
    lines = b"".join(dumped(record) + b"\n" for record, _ in drawn)
    if make is mmc4 and rng.random() < 0.5:
        path = folder / "x.jsonl.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.jsonl", lines)
    else:
        path.write_bytes(lines)
    return [path], [bad for _, bad in drawn]


def write_pth(folder, rng, count):
    """CoMM as it is published: Python objects; there is no raw JSON."""
    drawn = [draw(rng, comm, number, COMM_NEEDS, COMM_SPARES) for number in range(count)]
    torch.save([plain(record) for record, _ in drawn], folder / "x.pth")
    return [folder / "x.pth"], [bad for _, bad in drawn]


def write_samples(folder, rng, count, make, needs, spares, more):
    """A tar of ``KEY.json`` and what ``more(number)`` gives."""
    members, bad = [], []
    for number in range(count):
        record, is_bad = draw(rng, make, number, needs, spares)
        members.append((f"{number:06d}.json", dumped(record)))
        members += [(f"{number:06d}.{suffix}", data) for suffix, data in more(number).items()]
        bad.append(is_bad)
    return [write_tar(folder / "x.tar", members)], bad


def loose_images(folder, rng, count):
    """The images of numbered records, loose or in a tar."""
    named = [(f"{number}/{i}.jpg", pixels(number, i)) for number in range(count) for i in range(2)]
    if rng.random() < 0.5:
        return write_tar(folder / "images.tar", named)
    for name, data in named:
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder / "images"


TIFF = tiff_of([(250, 0, 0), (0, 0, 250)])


def shard_images(number):
    return {f"{i:03d}.jpg": pixels(number, i) for i in range(2)}


def pair_with_text(number):
    return {"jpg": pixels(number, 0), "txt": f"caption {number}".encode()}


CAPTION_NEEDS = {(): [*ALL, DEEP], ("status",): ALL, ("caption",): [*TEXT, *NULL, *BLANK]}
WRITERS = {
    "mmc4": lambda *a: write_lines(*a, mmc4, {**MMC4_NEEDS, ("image_info", 0, "image_name"): ALL}, MMC4_SPARES),
    "mmc4-tar": lambda *a: write_samples(
        *a, mmc4_in_tar, {**MMC4_NEEDS, ("image_info", 0, "image_base64"): ALL}, MMC4_SPARES, lambda number: {}
    ),
    "comm": lambda *a: write_lines(*a, comm, COMM_NEEDS, COMM_SPARES),
    "comm-pth": write_pth,
    "mint-pdf": lambda *a: write_samples(*a, mint_pdf, MINT_NEEDS, MINT_SPARES, lambda number: {"tiff": TIFF}),
    "img2dataset": lambda *a: write_samples(
        *a, pair, {("status",): ALL}, [(), ("caption",), *PAIR_SPARES], pair_with_text
    ),
    "img2dataset-json": lambda *a: write_samples(
        *a, pair, CAPTION_NEEDS, PAIR_SPARES, lambda number: {"jpg": pixels(number, 0)}
    ),
    "shards": lambda *a: write_samples(*a, document, DOCUMENT_NEEDS, DOCUMENT_SPARES, shard_images),
}


def whole(name, number):
    """Texts and images of a record of which nothing is left out."""
    first, second = pixels(number, 0), pixels(number, 1)
    match name:
        case "mmc4" | "mmc4-tar":
            return (f"one {number}", f"two {number}", f"three {number}"), (first, second)
        case "comm" | "comm-pth":
            return (f"a {number}", f"about {number}", f"step {number}"), (first, second)
        case "obelics" | "omnicorpus" | "mint-html":
            return (f"text {number}",), (first, second)
        case "mint-pdf":
            return (f"first {number}",), None  # its pages are encoded anew
        case "img2dataset" | "img2dataset-json":
            return (f"caption {number}",), (first,)
    return (f"text {number}",), (first, second)


def contents(source):
    """Texts and images of every sample that was written."""
    for number in range(len(source)):
        members = source.sample(number).members
        record = json.loads(source.read(number, "json"))
        texts = [source.read(number, "txt").decode()] if "txt" in members else [t for t in record["texts"] if t]
        yield tuple(texts), tuple(source.read(number, suffix) for suffix in sorted(members) if suffix.endswith("jpg"))


SETTINGS = LaneSettings(
    lanes=1,
    data_seed=0,
    augmentation_seed=0,
    row_tokens=4096,
    row_images=100,
    image_tokens=4,
    image_size=16,
    pack_window=8,
)


# Parquet: all values of a column are of one type, so whole columns are of another kind, or hold odd values of theirs.


def parquet_columns(number_of_rows, first, digests):
    """Good columns as Python lists, and which images they name."""
    rows = range(first, first + number_of_rows)
    metadata = [[{"img_url_sha": digest_of(n, i), "width": 1} for i in range(2)] if digests else None for n in rows]
    return {
        "texts": [[None, f"text {n}", None] for n in rows],
        "images": [[image_url(n, 0), None, image_url(n, 1)] for n in rows],
        "metadata": metadata if digests else ["[]"] * number_of_rows,
        "general_metadata": [json.dumps({"url": "u"})] * number_of_rows,
        "url": ["u"] * number_of_rows,
    }


def image_url(number, i):
    return f"https://example.org/{number}/{i}.jpg"


def digest_of(number, i):
    return hashlib.sha1(image_url(number, i).encode()).hexdigest()


def odd_columns(count):
    """Columns of a kind that no reader expects, by name."""
    import pyarrow as pa

    nanoseconds = pa.array([1_700_000_000_000_000_001] * count, pa.timestamp("ns"))
    far = pa.array([1 << 62] * count, pa.timestamp("us"))
    no_text = pa.array([b"\xff\xfe"] * count, pa.binary()).view(pa.string())
    scalars = {
        "null": pa.nulls(count),
        "nan": pa.array([float("nan")] * count),
        "integers": pa.array([2**63 - 1] * count),
        "truth": pa.array([True] * count),
        "nanoseconds": nanoseconds,
        "year 148108": far,
        "bytes": pa.array([b"\x00\xff"] * count),
        "not UTF-8": no_text,
        "decimals": pa.array([1] * count, pa.decimal128(38, 2)),
        "durations": pa.array([2**62] * count, pa.duration("ns")),
        "dictionary": pa.array(["x"] * count).dictionary_encode(),
        "empty": pa.array([""] * count),
        "JSON": pa.array(['{"url": NaN}'] * count),
        "half JSON": pa.array(["{"] * count),
        "struct": pa.StructArray.from_arrays([nanoseconds, no_text], ["at", "url"]),
    }
    offsets = pa.array(range(count + 1), pa.int32())
    lists = {f"lists of {name}": pa.ListArray.from_arrays(offsets, values) for name, values in scalars.items()}
    nested = {"lists of lists": pa.ListArray.from_arrays(offsets, lists["lists of nanoseconds"])}
    return {**scalars, **lists, **nested, "empty lists": pa.array([[]] * count, pa.list_(pa.string()))}


def odd_texts(count):
    """Lists of three texts, the second of which is none in a way that the type allows."""
    import pyarrow as pa

    values = pa.array([None, b"\xed\xa0\x80", None] * count, pa.binary()).view(pa.string())
    return pa.ListArray.from_arrays(pa.array(range(0, 3 * count + 1, 3), pa.int32()), values)


ROWS = 5


def write_parquet(folder, rng, count, digests):
    """Files of five records with one odd column: one that is needed or one that is not."""
    import pyarrow as pa
    from pyarrow import parquet

    spares = ["general_metadata", "url", *[] * digests, *["metadata"] * (not digests)]
    needs = ["texts", "images", *["metadata"] * digests]
    sources, bad = [], []
    for first in range(0, count, ROWS):
        columns = parquet_columns(ROWS, first, digests)
        is_bad = rng.random() < 0.5
        name = rng.choice(needs if is_bad else spares)
        odd = {**odd_columns(ROWS), **({"halves": odd_texts(ROWS)} if name == "texts" else {})}
        columns[name] = odd[rng.choice(sorted(odd))]
        sources.append(folder / f"{first:06d}.parquet")
        parquet.write_table(pa.table(columns), sources[-1], row_group_size=2)
        bad += [is_bad] * ROWS
    images = folder / "images"
    images.mkdir()
    for number in range(len(bad)):
        for i in range(2):
            name = digest_of(number, i) if digests else hashlib.sha256(image_url(number, i).encode()).hexdigest()
            (images / name).write_bytes(pixels(number, i))
    return sources, bad, images


def write(name, folder, rng, count):
    """Sources, which records have to be counted, where the images are."""
    if name in PARQUET:
        return write_parquet(folder, rng, count, digests=name == "omnicorpus")
    sources, bad = WRITERS[name](folder, rng, count)
    return sources, bad, loose_images(folder, rng, count) if name.startswith(("comm", "mmc4")) else None


PARQUET = ("obelics", "omnicorpus", "mint-html")
NAMES = (*WRITERS, *PARQUET)
FILE_RECORDS = 200
FORMATS = {"comm-pth": "comm", "img2dataset-json": "img2dataset"}


def run_format(name, count, seed, folder, tokenizer):
    """Build, check and batch ``count`` records or a few more; how many were damaged, counted and whole."""
    rng = random.Random(f"{name}/{seed}")
    folder.mkdir(parents=True)
    sources, bad, place = write(name, folder, rng, count)
    images = [] if place is None else ["--images", str(place)]
    format = FORMATS.get(name, name)
    expected = [whole(name, number) for number, is_bad in enumerate(bad) if not is_bad]
    log = io.StringIO()
    with redirect_stdout(log):
        arguments = [*map(str, sources), str(folder / "out"), "--format", format, "--workers", "1", *images]
        assert run_data(["build", *arguments]) == 0, log.getvalue()
        assert run_data(["check", str(folder / "out" / "shards.txt"), "--workers", "1"]) == 0, log.getvalue()
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    counted = sum(unit["incomplete"] for unit in manifest["sources"])
    assert sum(unit["records"] for unit in manifest["sources"]) == len(bad)
    assert counted == sum(bad), f"{sum(bad)} damaged, {counted} counted: {manifest['skips']}"
    source = Source("built", [index_shard(path) for path in sorted((folder / "out").glob("*.tar"))])
    actual = Counter(contents(source))
    if name == "mint-pdf":
        actual = Counter((texts, None) for texts, written in contents(source) if len(written) == 2)
    assert not Counter(expected) - actual, "a whole record is missing or lacks something"
    lane = Lane([source], SETTINGS, 0, tokenizer)
    row = lane.next_row()
    batch = collate([row], SETTINGS.row_tokens, SETTINGS.image_size, tokenizer.vocabulary, SETTINGS.view.readout_names)
    assert row.skipped_samples == 0
    assert batch.image_count > 0
    return Counter(records=len(bad), damaged=sum(bad), counted=counted, whole=len(expected))


@pytest.fixture(scope="module")
def tokenizer(demo_folder):
    return TextTokenizer(demo_folder / "tokenizer")


@pytest.mark.parametrize("name", NAMES)
def test_a_value_of_any_kind_costs_its_own_record_and_is_counted(name, tmp_path, tokenizer):
    if name in PARQUET:
        pytest.importorskip("pyarrow")
    tally = run_format(name, 60, 0, tmp_path / name, tokenizer)
    assert 0 < tally["damaged"] == tally["counted"] < tally["records"]


def main(count):
    """Run about ``count`` records; what came of them by format and every failure, as JSON. Returns the exit code."""
    logging.disable(logging.WARNING)
    names = [name for name in NAMES if name not in PARQUET or has_pyarrow()]
    each = -(-count // len(names))
    tallies, failures = {name: Counter() for name in names}, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_demo(folder / "demo", documents=40, pairs=10, heldout_documents=1)
        tokenizer = TextTokenizer(folder / "demo" / "tokenizer")
        for name in names:
            for seed in range(-(-each // FILE_RECORDS)):
                try:
                    records = min(FILE_RECORDS, each - seed * FILE_RECORDS)
                    tallies[name] += run_format(name, records, seed, folder / f"{name}-{seed}", tokenizer)
                except (Exception, SystemExit) as error:
                    failures.append(f"{name}, seed {seed}: {type(error).__name__}: {error}")
                    traceback.print_exc()
                shutil.rmtree(folder / f"{name}-{seed}", ignore_errors=True)
    total = sum(tallies.values(), Counter())
    print(json.dumps({"total": total, "formats": tallies, "failures": failures}, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000))
