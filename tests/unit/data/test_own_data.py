"""One's own images become shards: folders, tables, Hugging Face files; what cannot be used is counted and named."""

import csv
import io
import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from lcl_ds.data.__main__ import main
from lcl_ds.data.documents import read_document, read_labels
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.storage import expand_paths
from tests.support.corpora import picture


def build(out, *arguments):
    """Build into ``out`` and return the manifest."""
    assert main(["build", *map(str, arguments[:1]), str(out), "--workers", "1", *map(str, arguments[1:])]) == 0
    return json.loads((out / "manifest.json").read_text())


def refused(capsys, out, *arguments):
    """Return the one sentence with which a build is refused, of which nothing stays."""
    assert main(["build", *map(str, arguments[:1]), str(out), "--workers", "1", *map(str, arguments[1:])]) == 2
    assert not out.exists()
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


def samples_of(out, pattern="*.tar"):
    """Segments and images' bytes, and labels, of every sample, by the name that it had in its input."""
    source = Source("built", [index_shard(path) for path in expand_paths(f"{out}/{pattern}")])
    samples = {}
    for number in range(len(source)):
        document = read_document(source, number)
        record = json.loads(source.read(number, "json"))
        parts = [
            part if isinstance(part, str) else source.read(number, document.images[part]) for part in document.segments
        ]
        samples[record["source_key"]] = document, parts, read_labels(source, number, document)
    return samples


def put(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


# folders


def test_an_image_and_the_text_beside_it_are_a_pair(tmp_path, capsys):
    photos = put(
        tmp_path / "photos",
        {
            "IMG 1.JPG": picture(1),
            "IMG 1.txt": "\ufeffa red door\n",
            "tour/Höhe.png": picture(2, "PNG"),
            unicodedata.normalize("NFD", "tour/Höhe") + ".txt": "a hill",
            "tour/Höhe.json": json.dumps({"place": "Alps", "stars": 4, "url": "https://example.org/2", "exif": "{}"}),
        },
    )
    manifest = build(tmp_path / "out", photos, "--format", "folder")
    assert (manifest["samples"], manifest["skips"]) == (2, {})
    assert "1/1 0:00:00 2 documents" in capsys.readouterr().out  # the bar of progress
    samples = samples_of(tmp_path / "out")
    document, parts, labels = samples["tour/Höhe.png"]
    assert document.is_pair
    assert parts == ["a hill", picture(2, "PNG")]
    assert labels[0].items() >= {"place": "Alps", "stars": 4}.items()
    assert samples["IMG 1.JPG"][1] == ["a red door", picture(1)]


def test_what_cannot_be_used_of_a_folder_is_counted_and_named(tmp_path, capsys):
    files = {f"{n}.{s}": data for n in range(3) for s, data in (("jpg", picture(n)), ("txt", f"text {n}"))}
    files |= {
        "cut.jpg": picture(7)[:-200],
        "cut.txt": "cut short",
        "zero.jpg": b"",
        "zero.txt": "no bytes",
        "iphone.HEIC": b"\0\0\0\x18ftypheic",
        "iphone.txt": "of a telephone",
        "mute.jpg": picture(8),
        "blank.jpg": picture(9),
        "blank.txt": " \n",
        "orphan.txt": "no picture",
        "latin.jpg": picture(10),
        "latin.txt": b"H\xf6he",
        ".hidden.jpg": picture(11),
        "._0.jpg": b"of a Mac",
        "notes.pdf": b"%PDF",
    }
    manifest = build(tmp_path / "out", put(tmp_path / "in", files), "--format", "folder")
    assert sorted(samples_of(tmp_path / "out")) == ["0.jpg", "1.jpg", "2.jpg"]
    examples = {reason: sorted(names) for reason, names in manifest["sources"][0]["examples"].items()}
    assert examples == {
        "a damaged image": ["cut.jpg"],
        "an empty file": ["zero.jpg"],
        "an image in none of the accepted formats": ["iphone.HEIC"],
        "an image without a caption": ["blank.jpg", "mute.jpg"],
        "a caption without an image": ["orphan.txt"],
        "text that is not UTF-8": ["latin.jpg"],
    }
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("cut.jpg", "zero.jpg", "iphone.HEIC", "mute.jpg", "orphan.txt", "latin.jpg"))


def test_images_without_a_text_beside_them_get_the_caption_that_is_made_of_their_labels(tmp_path):
    files = {"a.jpg": picture(1), "a.txt": "a hill", "b.jpg": picture(2), "b.json": json.dumps({"place": "the_lake"})}
    build(tmp_path / "out", put(tmp_path / "in", files), "--format", "folder", "--caption", "at {place}")
    texts = {key: parts[0] for key, (_, parts, _) in samples_of(tmp_path / "out").items()}
    assert texts == {"a.jpg": "a hill", "b.jpg": "at the lake"}


def test_the_folders_of_classes_become_labels(tmp_path):
    files = {f"{name}/deep/{n}.jpg": picture(n) for n, name in enumerate(("red_fox", "hare", "hare"))}
    folder = put(tmp_path / "in", {**files, "outside.jpg": picture(9)})
    manifest = build(tmp_path / "out", folder, "--format", "imagefolder")
    assert manifest["skips"] == {"an image outside of the folders of classes": 1}
    samples = samples_of(tmp_path / "out")
    assert {key: labels for key, (_, _, labels) in samples.items()} == {
        "red_fox/deep/0.jpg": [{"label": "red_fox"}],
        "hare/deep/1.jpg": [{"label": "hare"}],
        "hare/deep/2.jpg": [{"label": "hare"}],
    }
    build(tmp_path / "pairs", folder, "--format", "imagefolder", "--caption", "a photo of a {label}.")
    document, parts, labels = samples_of(tmp_path / "pairs")["red_fox/deep/0.jpg"]
    assert document.is_pair
    assert parts == ["a photo of a red fox.", picture(0)]
    assert labels[0]["label"] == "red_fox"


def test_a_large_folder_is_cut_into_parts_that_mix_its_folders(tmp_path):
    folder = put(tmp_path / "in", {f"{n // 10}/{n}.jpg": picture(n) for n in range(40)})
    manifest = build(tmp_path / "out", folder, "--format", "imagefolder", "--shard-samples", "10")
    assert [shard["samples"] for shard in manifest["shards"].values()] == [10] * 4
    first = samples_of(tmp_path / "out", "000000-00000.tar")
    assert len({labels[0]["label"] for _, _, labels in first.values()}) > 1
    assert len(samples_of(tmp_path / "out")) == 40


def test_a_folder_that_changed_since_it_was_built_is_noticed(tmp_path, capsys):
    folder = put(tmp_path / "in", {"a/0.jpg": picture(0)})
    build(tmp_path / "out", folder, "--format", "imagefolder")
    build(tmp_path / "out", folder, "--format", "imagefolder")
    assert "already built" in capsys.readouterr().out
    put(folder, {"a/1.jpg": picture(1)})
    assert main(["build", str(folder), str(tmp_path / "out"), "--format", "imagefolder", "--workers", "1"]) == 2
    assert f"changed since, the first {folder}; name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "format", "sentence"),
    [
        ({"a.txt": "alone"}, "folder", "there are no images in it or below it"),
        ({"a.jpg": b"x"}, "folder", "none of its 1 images has a caption beside it, as in a.txt; use --format csv"),
        ({"a/a.jpg": b"x"}, "folder", "use --format imagefolder if its folders are classes"),
        ({"a.jpg": b"x", "list.tsv": b""}, "folder", "list.tsv with --format tsv"),
        ({"a.jpg": b"x"}, "imagefolder", "lie in no folders that could name their classes; use --format folder"),
        ({"train/a/1.jpg": b"x", "val/a/1.jpg": b"x"}, "imagefolder", "holds the splits train, val; name one of them"),
        ({"a.jpg": b"x", "a.txt": "a"}, "folder", "left out were 1 times an image in none of the accepted formats"),
        ({"a.parquet": b"x"}, "csv", "is a folder; name its files"),
        ({"a.txt": "x"}, "huggingface", "it holds no .parquet or .arrow files"),
        ({"train-0.parquet": b"", "test-0.parquet": b""}, "huggingface", "it holds test, train; name one of them"),
    ],
)
def test_a_folder_with_nothing_of_the_format_is_refused_in_one_sentence(files, format, sentence, tmp_path, capsys):
    folder = put(tmp_path / "in", files)
    assert sentence in refused(capsys, tmp_path / "out", folder, "--format", format)


# tables


def table(folder, rows, name="list.csv", delimiter=",", encoding="utf-8"):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return put(folder, {name: text.getvalue().encode(encoding)}) / name


ROWS = [
    ["file_name", "caption", "colour", "size", "url"],
    ["images/1.jpg", "a door, red", "red", "2", "https://example.org/1"],
    ["images\\Höhe.jpg", "a hill; high", "", "3", ""],
]


@pytest.mark.parametrize(
    ("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-8"), (",", "utf-16")]
)
def test_a_table_of_any_program_becomes_pairs_with_labels(delimiter, encoding, tmp_path):
    folder = put(tmp_path / "in", {"images/1.jpg": picture(1), "images/Höhe.jpg": picture(2)})
    path = table(folder, ROWS, delimiter=delimiter, encoding=encoding)
    assert build(tmp_path / "out", path, "--format", "csv")["skips"] == {}
    samples = samples_of(tmp_path / "out")
    document, parts, labels = samples["list.csv:2"]
    assert document.is_pair
    assert parts == ["a door, red", picture(1)]
    assert labels[0].items() >= {"colour": "red", "size": "2", "url": "https://example.org/1"}.items()
    assert samples["list.csv:3"][1] == ["a hill; high", picture(2)]
    assert "colour" not in samples["list.csv:3"][2][0]


def test_a_table_finds_images_by_any_path_below_its_folder_or_those_of_images(tmp_path):
    put(tmp_path, {"elsewhere/1.jpg": picture(1), "other/2.jpg": picture(2), "lists/3.jpg": picture(3)})
    names = [tmp_path / "elsewhere/1.jpg", "../elsewhere/1.jpg", "2.jpg", "3.jpg", "none.jpg"]
    path = table(tmp_path / "lists", [["path", "text"], *([name, f"text {n}"] for n, name in enumerate(names))])
    manifest = build(tmp_path / "out", path, "--format", "csv", "--images", tmp_path / "other")
    assert manifest["samples"] == 4
    assert manifest["skips"] == {"an image that is not there": 1}
    assert [parts[1] for _, parts, _ in samples_of(tmp_path / "out").values()] == [picture(n) for n in (1, 1, 2, 3)]


def test_a_line_with_too_many_or_too_few_cells_costs_itself_alone(tmp_path):
    folder = put(tmp_path / "in", {"1.jpg": picture(1)})
    lines = ["path,caption", "1.jpg,good", "1.jpg,a dog, running", "1.jpg", ",no picture", "", '1.jpg,"open', "1.jpg,b"]
    path = put(folder, {"a.csv": "\n".join(lines)}) / "a.csv"
    manifest = build(tmp_path / "out", path, "--format", "csv")
    assert manifest["samples"] == 1
    assert manifest["sources"][0]["examples"] == {
        "a caption without an image": ["a.csv:5"],
        "a line that is none of a table (unexpected end of data)": ["a.csv:7"],
        "a line with more cells than the first one (quote texts that hold commas)": ["a.csv:3"],
        "an image without a caption": ["a.csv:4"],
    }


HEADER = [["path", "caption"]]


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        ([*HEADER, ["1.jpg", "a"], ["2.jpg", "b"]], [], "none of the 2 images that it names is there"),
        (
            [["photo", "caption"], ["1.jpg", "a"]],
            [],
            "there are photo, caption: say which one it is with --image-column NAME",
        ),
        (
            [["path", "words"], ["1.jpg", "a"]],
            [],
            "there are path, words: say which one it is with --text-column NAME, or make captions",
        ),
        (HEADER, ["--text-column", "titel"], "it has no column 'titel'; there are path, caption"),
        (HEADER, [], "it holds no records"),
        ([["path", "caption", "caption"]], [], "its first line names the column 'caption' twice"),
        ([["url", "caption"], ["https://example.org/1", "a"]], [], "name the folders or tars of the images: --images"),
    ],
)
def test_a_table_that_names_no_image_is_refused_in_one_sentence(rows, options, sentence, tmp_path, capsys):
    path = table(tmp_path / "in", rows)
    assert sentence in refused(capsys, tmp_path / "out", path, "--format", "csv", *options)


def test_columns_may_be_named_and_several_make_documents_in_their_order(tmp_path):
    folder = put(tmp_path / "in", {f"{n}.jpg": picture(n) for n in range(2)})
    path = table(folder, [["titel", "bild", "text", "zweites"], ["a title", "0.jpg", "between", "1.jpg"]])
    columns = ["--image-column", "bild", "zweites", "--text-column", "titel", "text"]
    build(tmp_path / "out", path, "--format", "csv", *columns)
    ((document, parts, _),) = samples_of(tmp_path / "out").values()
    assert not document.is_pair
    assert parts == ["a title", picture(0), "between", picture(1)]


def test_a_column_that_no_line_of_json_has_is_refused(tmp_path, capsys):
    rows = [{"image": "0.jpg", "text": "a hill"}, {"image": "0.jpg"}]
    table = put(tmp_path / "in", {"0.jpg": picture(0), "a.jsonl": "\n".join(map(json.dumps, rows))}) / "a.jsonl"
    said = refused(capsys, tmp_path / "out", table, "--format", "jsonl", "--image-column", "img")
    assert "no row has 'img'; there are image, text" in said
    assert build(tmp_path / "out", table, "--format", "jsonl", "--text-column", "text")["samples"] == 1


def test_lines_of_json_become_pairs_and_documents(tmp_path):
    folder = put(tmp_path / "in", {f"{n}.jpg": picture(n) for n in range(4)})
    rows = [
        {"image": {"path": "0.jpg"}, "caption": "one", "labels": {"kind": "cat"}, "box": [1, 2], "nothing": None},
        {"image": "0.jpg", "caption": ["first", "second", "third"]},
        {"image": ["1.jpg", "2.jpg"], "caption": "both"},
        {"images": [None, "3.jpg", None], "texts": ["before", None, "after"], "labels": [None, {"kind": "dog"}, None]},
    ]
    lines = "\n".join([*map(json.dumps, rows), "{broken", '{"caption": "alone"}'])
    path = put(folder, {"list.jsonl": lines}) / "list.jsonl"
    manifest = build(tmp_path / "out", path, "--format", "jsonl")
    assert manifest["skips"] == {"a caption without an image": 1, "json that cannot be parsed": 1}
    pair, captions, both, parallel = samples_of(tmp_path / "out").values()
    assert pair[0].is_pair
    assert pair[2][0].items() >= {"kind": "cat"}.items()
    assert not {"box", "nothing"} & pair[2][0].keys()
    assert captions[1] == ["first", picture(0), "second", "third"]
    assert both[1] == [picture(1), picture(2), "both"]
    assert parallel[1] == ["before", picture(3), "after"]
    assert parallel[2] == [{"kind": "dog"}]
    again = put(folder, {"list.json": json.dumps(rows)}) / "list.json"
    build(tmp_path / "again", again, "--format", "jsonl")
    assert [parts for _, parts, _ in samples_of(tmp_path / "again").values()] == [
        sample[1] for sample in (pair, captions, both, parallel)
    ]


# Hugging Face


def dataset(path, stream=False):
    """Rows as `datasets` writes them: an image as a struct, a class as a number whose name is in the schema."""
    pa = pytest.importorskip("pyarrow")
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", image), ("label", pa.int64()), ("text", pa.string()), ("when", pa.timestamp("ns"))],
        {b"huggingface": json.dumps({"info": {"features": features}}).encode()},
    )
    rows = [
        {"image": {"bytes": picture(0), "path": "0.jpg"}, "label": 1, "text": "a dog", "when": 1},
        {"image": {"bytes": None, "path": "1.jpg"}, "label": 0, "text": "a cat", "when": 2},
        {"image": None, "label": 0, "text": "nothing", "when": 3},
        {"image": {"bytes": picture(3)[:-200], "path": None}, "label": -1, "text": "cut", "when": 4},
    ]
    rows = pa.Table.from_pylist(rows, schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "1.jpg").write_bytes(picture(1))
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(rows, path)
    else:
        with path.open("wb") as file, (pa.ipc.new_stream if stream else pa.ipc.new_file)(file, schema) as writer:
            writer.write_table(rows)
    return path


@pytest.mark.parametrize(
    ("name", "stream"), [("train-0.parquet", False), ("data-0.arrow", True), ("data-0.arrow", False)]
)
def test_a_data_set_of_hugging_face_becomes_pairs_with_the_names_of_its_classes(name, stream, tmp_path):
    folder = dataset(tmp_path / "in" / name, stream).parent
    put(folder, {"cache-1.arrow": b"of a map"})
    manifest = build(tmp_path / "out", folder, "--format", "huggingface")
    assert manifest["skips"] == {"a caption without an image": 1, "a damaged image": 1}
    dog, cat = samples_of(tmp_path / "out").values()
    assert dog[1] == ["a dog", picture(0)]
    assert dog[2][0]["label"] == "dog"
    assert cat[1] == ["a cat", picture(1)]
    assert cat[2][0]["label"] == "cat"


def test_rows_of_several_images_are_documents_and_bytes_alone_are_images(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in").mkdir()
    rows = [{"question": "what?", "pages": [picture(0), picture(1)], "answer": "that"}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "a.parquet")
    columns = ["--text-column", "question", "answer"]
    build(tmp_path / "out", tmp_path / "in", "--format", "huggingface", *columns)
    ((_, parts, _),) = samples_of(tmp_path / "out").values()
    assert parts == ["what?", picture(0), picture(1), "that"]


def test_a_parquet_file_without_images_is_refused_in_one_sentence(tmp_path, capsys):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.Table.from_pylist([{"a": 1, "text": "b"}]), tmp_path / "a.parquet")
    err = refused(capsys, tmp_path / "out", tmp_path / "a.parquet", "--format", "huggingface")
    assert "there are a, text: say which one it is with --image-column NAME" in err


# labels


def test_labels_stay_when_shards_are_built_from_shards(tmp_path):
    folder = put(tmp_path / "in", {f"{n}.jpg": picture(n) for n in range(2)})
    rows = [
        {"image": "0.jpg", "caption": "pair", "kind": "cat", "score": 0.5, "is_old": True},
        {"images": ["1.jpg", None], "texts": [None, "t"], "labels": [{"kind": "dog"}, None]},
    ]
    path = put(folder, {"list.jsonl": "\n".join(map(json.dumps, rows))}) / "list.jsonl"
    build(tmp_path / "first", path, "--format", "jsonl")
    build(tmp_path / "second", tmp_path / "first" / "shards.txt", "--format", "shards")
    pair, document = samples_of(tmp_path / "second").values()
    assert pair[2][0].items() >= {"kind": "cat", "score": 0.5, "is_old": True}.items()
    assert document[2] == [{"kind": "dog"}]


# held-out documents


def held_out_texts(out):
    return sorted(parts[0] for _, parts, _ in samples_of(out, "heldout/*.tar").values())


def shards_of_texts(folder, count=400, files=4):
    """Documents of text, in several files."""
    for file in range(files):
        texts = [f"text {n}" for n in range(file, count, files)]
        lines = [json.dumps({"texts": [text], "images": [None]}) for text in texts]
        put(folder, {f"{file}.jsonl": "\n".join(lines)})
    return [folder / f"{file}.jsonl" for file in range(files)]


def test_the_same_documents_are_held_out_whatever_the_order_the_files_and_the_size_of_shards(tmp_path):
    files = list(map(str, shards_of_texts(tmp_path / "in")))
    options = ["--format", "jsonl", "--min-images", "0", "--holdout", "0.1"]
    variants = {"one": [], "small": ["--shard-samples", "7"]}
    for name, more in variants.items():
        assert main(["build", *files, str(tmp_path / name), *options, *more, "--workers", "1"]) == 0
    single = put(tmp_path / "all", {"z.jsonl": "\n".join(Path(file).read_text() for file in reversed(files))})
    assert main(["build", str(single / "z.jsonl"), str(tmp_path / "single"), *options, "--workers", "1"]) == 0
    chosen = held_out_texts(tmp_path / "one")
    assert 20 <= len(chosen) <= 60  # 10 % of 400
    trained = sorted(parts[0] for _, parts, _ in samples_of(tmp_path / "one").values())
    assert sorted([*chosen, *trained]) == sorted(f"text {n}" for n in range(400))
    for name in ("small", "single"):
        assert held_out_texts(tmp_path / name) == chosen
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())
    assert [facts["samples"] for facts in manifest["heldout"].values()][:-1] == [7] * (len(chosen) // 7)


def test_captions_of_one_image_are_all_on_one_side(tmp_path):
    folder = put(tmp_path / "in", {f"{n}.jpg": picture(n) for n in range(30)})
    rows = [["image", "caption"], *([f"{n}.jpg", f"caption {c} of {n}"] for n in range(30) for c in range(3))]
    build(tmp_path / "out", table(folder, rows), "--format", "csv", "--holdout", "0.3")
    sides = [{parts[1] for _, parts, _ in samples_of(tmp_path / "out", p).values()} for p in ("*.tar", "heldout/*.tar")]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_duplicates_are_left_out_of_held_out_shards_too(tmp_path):
    files = shards_of_texts(tmp_path / "in", count=200, files=2)
    files[1].write_text(files[0].read_text())
    options = ["--format", "jsonl", "--min-images", "0", "--holdout", "0.2", "--deduplicate", "--workers", "1"]
    assert main(["build", *map(str, files), str(tmp_path / "out"), *options]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["samples"], manifest["duplicates"]) == (100, 100)
    assert len(held_out_texts(tmp_path / "out")) == len(set(held_out_texts(tmp_path / "out"))) > 5


def test_a_fraction_that_leaves_nothing_to_train_on_is_refused(tmp_path, capsys):
    path = put(tmp_path / "in", {"a.jsonl": json.dumps({"texts": ["a"], "images": [None]})}) / "a.jsonl"
    options = ["--format", "jsonl", "--min-images", "0", "--holdout"]
    assert "leaves no document to train on" in refused(capsys, tmp_path / "out", path, *options, "0.9999999")
    build(tmp_path / "out", path, *options, "0.000001")
    assert "so small a fraction that nothing is held out" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["build", str(path), str(tmp_path / "x"), "--format", "jsonl", "--holdout", "1"])


def test_images_keep_their_bytes_whatever_their_mode(tmp_path):
    modes = {"CMYK": "JPEG", "P": "PNG", "LA": "PNG", "L": "JPEG"}
    files: dict[str, bytes | str] = {}
    for mode, kind in modes.items():
        buffer = io.BytesIO()
        Image.open(io.BytesIO(picture(1))).convert("L" if mode == "LA" else "RGB").convert(mode).save(buffer, kind)
        files |= {f"{mode}.{kind.lower()}": buffer.getvalue(), f"{mode}.txt": mode}
    build(tmp_path / "out", put(tmp_path / "in", files), "--format", "folder")
    parts = [parts for _, parts, _ in samples_of(tmp_path / "out").values()]
    assert {text: data for text, data in parts} == {m: files[f"{m}.{k.lower()}"] for m, k in modes.items()}


def test_links_are_followed_and_what_leads_in_a_circle_or_nowhere_does_no_harm(tmp_path):
    folder = put(tmp_path / "in", {"a/0.jpg": picture(0), "a/0.txt": "zero", "dead.txt": "a link that leads nowhere"})
    put(tmp_path / "elsewhere", {"1.jpg": picture(1), "1.txt": "one"})
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "circle").symlink_to(folder)
    (folder / "dead.jpg").symlink_to(tmp_path / "nowhere")
    manifest = build(tmp_path / "out", folder, "--format", "folder")
    assert sorted(samples_of(tmp_path / "out")) == ["a/0.jpg", "linked/1.jpg"]
    assert manifest["skips"] == {"an image that is not there": 1}


def test_rows_without_text_get_captions_of_their_labels_or_labels_alone(tmp_path, capsys):
    folder = put(tmp_path / "in", {f"{n}.jpg": picture(n) for n in range(3)})
    path = table(
        folder, [["path", "kind", "size"], ["0.jpg", "red_fox", "2"], ["1.jpg", "hare", "3"], ["2.jpg", "", "1"]]
    )
    assert "or make captions with --caption" in refused(capsys, tmp_path / "out", path, "--format", "csv")
    manifest = build(tmp_path / "pairs", path, "--format", "csv", "--caption", "a {kind} of size {size}")
    assert manifest["skips"] == {"an image without a label that its caption needs": 1}
    texts = [parts[0] for _, parts, _ in samples_of(tmp_path / "pairs").values()]
    assert texts == ["a red fox of size 2", "a hare of size 3"]
    build(tmp_path / "alone", path, "--format", "csv", "--caption", "")
    assert [labels for _, _, labels in samples_of(tmp_path / "alone").values()] == [
        [{"kind": "red_fox", "size": "2"}],
        [{"kind": "hare", "size": "3"}],
        [{"size": "1"}],
    ]
