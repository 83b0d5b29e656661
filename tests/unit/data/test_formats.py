"""Readers of published formats, on small corpora of their exact shape."""

import base64
import io
import json
import re
import sys
import zipfile
from dataclasses import replace

import pytest
import torch
from PIL import Image

from lcl_ds.data.corpora import READERS
from lcl_ds.data.corpora.local_images import LocalImages, open_images
from lcl_ds.data.corpora.record import ReadOptions, read_each
from lcl_ds.data.documents import BadSampleError
from lcl_ds.errors import UserError
from tests.support.corpora import MAKERS, PAGES, PARQUET, SENTENCES, mmc4_record, picture, write_parquet
from tests.support.tars import write_tar


@pytest.fixture
def corpus(tmp_path):
    """A corpus by name, its records read."""

    def make(name, **options):
        if name in PARQUET:
            pytest.importorskip("pyarrow")
        made = MAKERS[name](tmp_path / name)
        images, _ = open_images(made.images, tmp_path / "work")
        read = READERS[made.format](made.sources[0], ReadOptions(images, **options))
        return made, list(read)

    return make


def shape(document):
    """Texts, and images as ``I``, in reading order."""
    return ["I" if text is None else text for text in document.texts]


@pytest.mark.parametrize("name", MAKERS)
def test_every_record_becomes_a_document_of_parallel_lists(corpus, name):
    made, documents = corpus(name)
    assert len(documents) == made.documents + made.pairs
    assert len({document.key for document in documents}) == len(documents)
    assert all(document.is_pair == (made.pairs > 0) for document in documents)
    for document in documents:
        lists = (document.texts, document.images, document.matched_text_index, document.matched_sim)
        assert {len(values) for values in lists} == {len(document.texts)}
        for text, image, match, _ in zip(*lists, strict=True):
            assert (text is None) != (image is None)
            assert match is None or (image is not None and document.texts[match] is not None)


@pytest.mark.parametrize("name", ["mmc4", "mmc4-tar", "obelics", "omnicorpus", "mint-html", "mint-pdf"])
def test_the_url_is_kept(corpus, name):
    assert corpus(name)[1][1].url in ("https://example.org/1", "https://example.org/1.pdf")


# MMC4


def test_mmc4_puts_one_matched_image_before_each_sentence(corpus):
    _, documents = corpus("mmc4")
    document = documents[3]
    said = [f"{sentence} 3" for sentence in SENTENCES]
    assert shape(document) == ["I", said[0], said[1], "I", said[2], said[3], said[4], said[5]]
    assert [m for m in document.matched_text_index if m is not None] == [1, 4]
    assert [s for s in document.matched_sim if s is not None] in ([0.31, 0.25], [0.31, 0.29])
    assert document.images[0] == picture(30)
    assert sorted(document.skips) == ["a further image of a sentence", "an image below the similarity threshold"]


def test_the_image_of_a_sentence_is_drawn_by_seed(corpus, tmp_path):
    made, _ = corpus("mmc4")
    images = LocalImages((made.images[0],))

    def drawn(seed):
        return [d.matched_sim[3] for d in READERS["mmc4"](made.sources[0], ReadOptions(images, seed=seed))]

    assert drawn(0) == drawn(0)
    assert {similarity for seed in range(5) for similarity in drawn(seed)} == {0.25, 0.29}


@pytest.mark.parametrize(
    ("options", "images"),
    [
        ({"min_similarity": 0.0}, 3),
        ({"min_similarity": 0.3}, 1),
        ({"images_per_sentence": 2}, 3),
        ({"images_per_sentence": 2, "min_similarity": 0.0}, 4),
        ({"images_per_sentence": 2, "min_similarity": 0.0, "max_images": 3}, 3),
        ({"max_images": 1}, 1),
    ],
)
def test_mmc4s_rule_can_be_set(corpus, options, images):
    for document in corpus("mmc4", **options)[1]:
        assert shape(document).count("I") == images


def test_mmc4_keeps_at_most_six_images(tmp_path):
    (tmp_path / "images").mkdir()
    record = mmc4_record(0)
    record["text_list"] = [f"sentence {i}" for i in range(10)]
    record["image_info"] = [
        {"image_name": f"{i}.jpg", "matched_text_index": 9 - i, "matched_sim": 0.5} for i in range(10)
    ]
    for i in range(10):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(picture(i))
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    options = ReadOptions(LocalImages((tmp_path / "images",)))
    (document,) = READERS["mmc4"](tmp_path / "x.jsonl", options)
    assert [image for image in document.images if image] == [picture(9 - i) for i in range(6)]  # in reading order
    (all_of_them,) = READERS["mmc4"](tmp_path / "x.jsonl", replace(options, max_images=100))
    assert shape(all_of_them).count("I") == 10


def test_an_image_that_cannot_be_had_makes_room_for_another_of_its_sentence(corpus, tmp_path):
    made, _ = corpus("mmc4")
    (made.images[0] / "0_1.jpg").write_text("<html>404</html>")
    (made.images[0] / "1_2.jpg").unlink()
    first, second, *_ = READERS["mmc4"](made.sources[0], ReadOptions(LocalImages((made.images[0],))))
    assert [s for s in first.matched_sim if s] == [0.31, 0.29]
    assert [s for s in second.matched_sim if s] == [0.31, 0.25]


def test_open_flamingos_images_are_in_the_json(corpus):
    _, documents = corpus("mmc4-tar")
    actual = [[image for image in document.images if image] for document in documents]
    assert all(len(images) == 1 for images in actual)  # that of sentence 0 has no base64
    assert all(images[0] in (picture(10 * n + 1), picture(10 * n + 2)) for n, images in enumerate(actual))
    assert all("an image that is not there" in document.skips for document in documents)


def test_mmc4_images_come_from_tars_too(corpus, tmp_path):
    made, documents = corpus("mmc4")
    members = [(f"{path.stem}.jpg", path.read_bytes()) for path in sorted(made.images[0].iterdir())]
    tar = write_tar(tmp_path / "images.tar", members)
    images, _ = open_images([tar], tmp_path / "work")
    assert list(READERS["mmc4"](made.sources[0], ReadOptions(images))) == documents


BASE64 = base64.encodebytes(picture(7) * 3).decode()


@pytest.mark.parametrize(
    "text",
    [
        BASE64,
        BASE64.replace("\n", "\r\n "),
        BASE64.replace("\n", ""),
        str(BASE64.encode()),
        f"data:image/jpeg;base64,{BASE64}",
    ],
    ids=["lines", "lines of Windows", "one line", "Python's notation", "a URI"],
)
def test_base64_is_read_however_it_was_broken_into_lines(tmp_path, text):
    entry = {"matched_text_index": 0, "matched_sim": 0.9, "image_base64": text}
    record = json.dumps({"text_list": ["a"], "image_info": [entry]}).encode()
    (document,) = READERS["mmc4-tar"](write_tar(tmp_path / "x.tar", [("a.json", record)]), ReadOptions())
    assert document.images == (picture(7) * 3, None)
    assert document.skips == ()


@pytest.mark.parametrize(("index", "similarity"), [(1.0, "0.3"), ("1", 0.3), ("1.0", "3e-1"), (1, 1)])
def test_numbers_may_be_written_as_a_library_rewrote_them(tmp_path, index, similarity):
    (tmp_path / "a.jpg").write_bytes(picture(1))
    entry = {"image_name": "a.jpg", "matched_text_index": index, "matched_sim": similarity}
    (tmp_path / "x.jsonl").write_text(json.dumps({"text_list": ["a", "b"], "image_info": [entry]}) + "\n")
    (document,) = READERS["mmc4"](tmp_path / "x.jsonl", ReadOptions(LocalImages((tmp_path,))))
    assert document.texts == ("a", None, "b")
    assert document.matched_text_index == (None, 2, None)
    assert document.skips == ()


def zip_of(path, method, data=b'{"text_list": ["a"], "image_info": []}\n' * 50):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x.jsonl", data)
    return path


def encrypted(path):
    data = bytearray(zip_of(path, zipfile.ZIP_DEFLATED).read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(header) + flags] |= 1
    path.write_bytes(data)


def damaged(path, method):
    data = bytearray(zip_of(path, method).read_bytes())
    data[50:60] = b"\xff" * 10
    path.write_bytes(data)


def of_an_unknown_method(path):
    data = bytearray(zip_of(path, zipfile.ZIP_DEFLATED).read_bytes())
    for header, method in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        data[data.index(header) + method] = 99
    path.write_bytes(data)


BAD_ZIPS = {
    "encrypted": encrypted,
    "damaged deflate": lambda path: damaged(path, zipfile.ZIP_DEFLATED),
    "damaged lzma": lambda path: damaged(path, zipfile.ZIP_LZMA),
    "damaged bzip2": lambda path: damaged(path, zipfile.ZIP_BZIP2),
    "an unknown method": of_an_unknown_method,
}


@pytest.mark.parametrize("make", BAD_ZIPS.values(), ids=BAD_ZIPS)
def test_a_zip_that_cannot_be_read_is_named(tmp_path, make):
    make(tmp_path / "x.jsonl.zip")
    with pytest.raises(UserError, match=r"x\.jsonl\.zip: cannot be read"):
        list(READERS["mmc4"](tmp_path / "x.jsonl.zip", ReadOptions(min_images=0)))


def test_a_line_that_is_too_long_is_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr("lcl_ds.data.corpora.record.MAX_LINE_BYTES", 100)
    good = json.dumps({"text_list": ["a"], "image_info": []}).encode()
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([good, b"x" * 250, good, b"y" * 99, b"z" * 200 + b"\n" + good]))
    read = list(READERS["mmc4"](tmp_path / "x.jsonl", ReadOptions(min_images=0)))
    assert [document.key for document in read] == [f"x.jsonl:{number}" for number in range(6)]
    assert [bool(document.texts) for document in read] == [True, False, True, False, False, True]
    assert ["a line" in document.skips[-1] for document in read if document.skips] == [True, False, True]


# parallel lists


@pytest.mark.parametrize("name", ["obelics", "omnicorpus", "mint-html"])
def test_parallel_lists_keep_their_order_and_find_images_by_url(corpus, name):
    for number, document in enumerate(corpus(name)[1]):
        assert shape(document) == ["I", f"first {number}", "I", f"second {number}"]
        assert [image for image in document.images if image] == [picture(10 * number), picture(10 * number + 1)]
        assert document.skips == ()


def test_without_pyarrow_the_command_to_install_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"x\.parquet: reading parquet needs pyarrow: pip install 'lcl_ds\[parquet\]'"):
        list(READERS["obelics"](tmp_path / "x.parquet", ReadOptions()))


def test_images_that_were_never_downloaded_are_counted(tmp_path):
    pytest.importorskip("pyarrow")
    records = [{"texts": ["a", None], "images": [None, "https://example.org/none.jpg"]}, {"texts": None, "images": []}]
    path = write_parquet(tmp_path / "x.parquet", records)
    first, second = READERS["obelics"](path, ReadOptions(min_images=0))
    assert (first.texts, first.skips) == (("a",), ("an image that is not there",))
    assert (second.texts, second.skips) == ((), ("a record without the list 'texts'",))
    assert next(iter(READERS["obelics"](path, ReadOptions()))).skips[-1] == "a document with too few images"


# MINT-1T PDF, CoMM, pairs


def test_mint_takes_the_page_that_the_metadata_names(corpus):
    for number, document in enumerate(corpus("mint-pdf")[1]):
        assert shape(document) == ["I", f"first {number}", "I", f"second {number}"]
        images = [Image.open(io.BytesIO(image)) for image in document.images if image]
        assert [image.size for image in images] == [(20, 30), (22, 30)]
        for image, colour in zip(images, (PAGES[0], PAGES[2]), strict=True):
            assert max(abs(a - b) for a, b in zip(image.getpixel((9, 9)), colour, strict=True)) < 5


def test_comm_reads_title_summary_and_steps(corpus):
    for number, document in enumerate(corpus("comm")[1]):
        steps = [f"step {number} 0", f"step {number} 1", "I", "I", f"step {number} 2"]
        assert shape(document) == [f"How to {number}", f"about {number}", "I", *steps]
        assert [image for image in document.images if image] == [picture(10 * number + i) for i in range(3)]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_comm_may_be_json(corpus, tmp_path, suffix):
    made, documents = corpus("comm")
    records = torch.load(made.sources[0], weights_only=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path = tmp_path / f"comm{suffix}"
    path.write_text(json.dumps(records) if suffix == ".json" else lines)
    assert list(READERS["comm"](path, ReadOptions(LocalImages((made.images[0],))))) == documents


class Trap:
    def __reduce__(self):
        return exec, ("raise AssertionError('code from data ran')",)


def test_comms_pth_files_run_no_code(tmp_path):
    torch.save([Trap()], tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth: cannot be read"):
        list(READERS["comm"](tmp_path / "x.pth", ReadOptions()))


def test_pairs_are_a_caption_and_an_image(corpus):
    for number, document in enumerate(corpus("img2dataset")[1]):
        assert document.texts == (f"caption {number}", None)
        assert document.images == (None, picture(number))


def test_failed_downloads_and_missing_parts_of_pairs_are_counted(tmp_path):
    ok = json.dumps({"status": "success", "caption": "from json"}).encode()
    failed = json.dumps({"status": "failed_to_download", "caption": "x"}).encode()
    members = [
        ("0.jpg", picture(0)),
        ("0.json", failed),
        ("1.json", ok),
        ("2.jpg", picture(2)),
        ("3.jpg", picture(3)),
        ("3.txt", b"\xff\xfe"),
        ("4.jpg", picture(4)),
        ("4.json", ok),
    ]
    documents = list(READERS["img2dataset"](write_tar(tmp_path / "a.tar", members), ReadOptions()))
    assert [d.skips for d in documents] == [
        ("a caption pair whose download had failed",),
        ("a caption without an image",),
        ("an image without a caption",),
        ("text that is not UTF-8",),
        (),
    ]
    assert documents[-1].texts == ("from json", None)


def test_our_shards_keep_their_matches(corpus):
    for document in corpus("shards")[1]:
        assert shape(document)[1] == "I"
        assert document.matched_text_index == (None, 2, None)


# what is wrong with files and records


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 100, bytes(700)], ids=["empty", "html", "zeros"])
def test_a_file_that_is_something_else_is_refused_or_counted(tmp_path, name, content):
    suffixes = {"mmc4": ".jsonl.zip", "comm": ".pth", "csv": ".csv", "jsonl": ".jsonl"}
    suffix = suffixes.get(name, ".parquet" if name in PARQUET else ".tar")
    if name in PARQUET:
        pytest.importorskip("pyarrow")
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    if name in ("mmc4", "jsonl") and content:  # lines of text, which no JSON is
        documents = list(READERS[name](path, ReadOptions()))
        assert all(document.skips and not document.texts for document in documents)
    elif name in ("mmc4", "jsonl") or (content == bytes(700) and suffix == ".tar"):
        assert list(READERS[name](path, ReadOptions())) == []
    else:
        with pytest.raises(UserError, match=re.escape(str(path))):
            list(READERS[name](path, ReadOptions()))


@pytest.mark.parametrize("name", MAKERS)
def test_a_missing_file_is_named(tmp_path, name):
    if name in PARQUET:
        pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match="none"):
        list(READERS[name](tmp_path / "none", ReadOptions()))


@pytest.mark.parametrize("cut", [512 * 3 + 100, 512 * 5, 512 * 13])
def test_a_tar_that_is_cut_gives_its_whole_samples_and_says_so(corpus, cut):
    made, documents = corpus("img2dataset")
    made.sources[0].write_bytes(made.sources[0].read_bytes()[:cut])
    *good, last = READERS["img2dataset"](made.sources[0], ReadOptions())
    assert last.skips == ("a tar that is cut short or damaged",)
    assert good == documents[: len(good)]
    assert len(good) < len(documents)


def test_json_of_a_pair_that_cannot_be_parsed_costs_neither_text_nor_image(tmp_path):
    members = [("0.jpg", picture(0)), ("0.json", b"{"), ("0.txt", b"a cat")]
    (document,) = READERS["img2dataset"](write_tar(tmp_path / "a.tar", members), ReadOptions())
    assert (document.texts, document.is_pair, document.skips) == (("a cat", None), True, ())


def test_a_record_whose_reading_fails_in_a_way_nobody_thought_of_is_counted_with_its_key(tmp_path):
    def fail(key, record):
        return {}[record]

    bad, good = read_each([("caf\udce9", "x"), ("b", BadSampleError("reason"))], fail)
    assert (bad.key, bad.skips) == ("caf\\udce9", ("a value of an unforeseen kind (KeyError)",))
    assert (good.key, good.skips) == ("b", ("reason",))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError(), UserError("mend it")])
def test_what_the_machine_or_the_user_has_to_repair_is_not_put_down_to_a_record(error):
    def fail(key, record):
        raise error

    with pytest.raises(type(error)):
        list(read_each([("a", 1)], fail))


BAD_RECORDS = {
    "not json": (b"{", "json that cannot be parsed"),
    "not utf-8": (b'{"text_list": ["\xff"], "image_info": []}', "a document without text and images"),
    "a list": (b"[]", "json that is not an object"),
    "a long number": (b'{"text_list": [' + b"1" * 5000 + b'], "image_info": []}', "a document without text and images"),
    "nested": (b"[" * 100_000, "json that cannot be parsed"),
    "no lists": (b"{}", "a record without the list 'text_list'"),
    "null lists": (b'{"text_list": null, "image_info": null}', "a record without the list 'text_list'"),
    "nothing": (b'{"text_list": [], "image_info": []}', "a document without text and images"),
    "nulls": (b'{"text_list": [null, " "], "image_info": [null]}', "a document without text and images"),
    "too much text": (json.dumps({"text_list": ["x" * 2_000_000], "image_info": []}).encode(), "too much text"),
    "half a character": (b'{"text_list": ["\\ud800"], "image_info": []}', "a document without text and images"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_record_is_counted_and_the_next_one_read(tmp_path, line, reason):
    good = {**mmc4_record(0), "image_info": []}
    path = tmp_path / "x.jsonl"
    path.write_bytes(line + b"\n" + json.dumps(good).encode() + b"\n")
    bad, after = READERS["mmc4"](path, ReadOptions(min_images=0))
    assert bad.texts == ()
    assert reason in bad.skips[-1]
    assert len(after.texts) == 6


BAD_ENTRIES = [
    None,
    {},
    {"matched_text_index": 99, "matched_sim": 0.9},
    {"matched_text_index": -1, "matched_sim": 0.9},
    {"matched_text_index": "0", "matched_sim": 0.9},
    {"matched_text_index": 0, "matched_sim": None},
    {"matched_text_index": 0, "matched_sim": float("nan")},
    {"matched_text_index": 0, "matched_sim": 0.9, "image_name": "../secret.jpg"},
    {"matched_text_index": 0, "matched_sim": 0.9, "image_name": "/etc/passwd"},
    {"matched_text_index": 0, "matched_sim": 0.9, "image_name": "link.jpg"},
    {"matched_text_index": 0, "matched_sim": 0.9, "image_name": "nul\0.jpg"},
    {"matched_text_index": 0, "matched_sim": 0.9, "image_name": 7},
]


@pytest.mark.parametrize("entry", BAD_ENTRIES, ids=str)
def test_a_bad_image_entry_costs_that_image_only(tmp_path, entry):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.jpg").write_bytes(picture(0))
    (tmp_path / "images" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "images" / "ok.jpg").write_bytes(picture(1))
    fine = {"matched_text_index": 1, "matched_sim": 0.9, "image_name": "ok.jpg"}
    record = {**mmc4_record(0), "image_info": [entry, fine]}
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    (document,) = READERS["mmc4"](tmp_path / "x.jsonl", ReadOptions(LocalImages((tmp_path / "images",))))
    assert [image for image in document.images if image] == [picture(1)]
    assert len(document.skips) == 1
