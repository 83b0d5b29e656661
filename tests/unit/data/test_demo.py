"""The embedded corpus: deterministic, in the documented formats, honest as a demo."""

import io
import json
import multiprocessing
import tarfile
import warnings

import numpy as np
import pytest
import webdataset
from PIL import Image
from transformers import AutoTokenizer

from lcl_ds.data.demo import corpus as demo
from lcl_ds.data.demo.scenes import COLOURS, SHAPES
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.errors import UserError


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


@pytest.fixture(scope="module")
def documents(demo_folder):
    actual = {}
    for path in sorted(demo_folder.glob("*-documents-*.tar")):
        actual[path.name] = members(path)
    return actual


def records(files):
    return {name: json.loads(data) for name, data in files.items() if name.endswith(".json")}


def test_two_builds_are_equal_to_the_byte(tmp_path):
    for name in ("a", "b"):
        demo.build_demo(tmp_path / name, documents=12, pairs=9, heldout_documents=5, shard_size=5)
    first, second = (sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in ("a", "b"))
    assert [p.relative_to(tmp_path / "a") for p in first] == [p.relative_to(tmp_path / "b") for p in second]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))
    assert (tmp_path / "a" / "train-documents-000002.tar").is_file()


def test_a_sample_does_not_depend_on_how_many_there_are(tmp_path, demo_folder):
    demo.build_demo(tmp_path / "few", documents=3, pairs=3, heldout_documents=3)
    for name in ("train-documents", "train-pairs", "heldout-documents"):
        few, many = (members(folder / f"{name}-000000.tar") for folder in (tmp_path / "few", demo_folder))
        assert all(many[key] == data for key, data in few.items())


def test_documents_have_parallel_lists_and_all_images(documents):
    for files in documents.values():
        for name, record in records(files).items():
            assert len(record["texts"]) == len(record["images"]) == len(record["labels"])
            for text, image, label in zip(record["texts"], record["images"], record["labels"], strict=True):
                assert (text is None) == (image is not None) == (label is not None)
                if image is not None:
                    picture = Image.open(io.BytesIO(files[name.replace("json", image)]))
                    assert (picture.format, picture.size) == ("JPEG", (32, 32))
                    assert label["shape"] in SHAPES
                    assert label["colour"] in COLOURS
                    assert label["count"] in (1, 2, 3)


def test_most_images_are_announced_and_nearly_all_follow_some_text(documents):
    announced = preceded = total = 0
    for files in documents.values():
        for record in records(files).values():
            said = ""
            for text, label in zip(record["texts"], record["labels"], strict=True):
                if text:
                    said += text
                    last = text
                else:
                    total += 1
                    preceded += bool(said)
                    announced += bool(said) and f"{label['shape']}" in last
    assert announced / total > 0.7
    assert preceded / total > 0.85


def test_pairs_look_like_img2dataset(demo_folder):
    files = members(demo_folder / "train-pairs-000000.tar")
    record = json.loads(files["000000003.json"])
    assert record["caption"] == files["000000003.txt"].decode()
    assert record["status"] == "success"
    assert (record["width"], record["key"]) == (32, "000000003")
    assert Image.open(io.BytesIO(files["000000003.jpg"])).size == (32, 32)


def test_plain_webdataset_reads_the_same_samples(demo_folder):
    path = demo_folder / "train-documents-000000.tar"
    source = Source("demo", [index_shard(path)])
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [source.sample(i).key for i in range(len(source))]
    assert all(sample["json"] == source.read(i, "json") for i, sample in enumerate(samples))
    assert samples[0]["000.jpg"] == source.read(0, "000.jpg")


def test_held_out_documents_are_others(documents):
    train = {data for name, files in documents.items() if name.startswith("train") for data in files.values()}
    held_out = {data for name, files in documents.items() if name.startswith("heldout") for data in files.values()}
    assert not train & held_out


def test_labels_are_balanced(documents):
    shapes = [
        label["shape"]
        for files in documents.values()
        for record in records(files).values()
        for label in record["labels"]
        if label
    ]
    counts = np.array([shapes.count(shape) for shape in SHAPES])
    assert counts.min() > 0.6 * counts.mean()


def test_the_tokenizer_loads_by_itself_and_loses_nothing(demo_folder, documents):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = AutoTokenizer.from_pretrained(demo_folder / "tokenizer")
    assert tokenizer.is_fast
    assert len(tokenizer) == demo.VOCABULARY
    texts = [t for r in records(documents["heldout-documents-000000.tar"]).values() for t in r["texts"] if t]
    assert all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for text in texts)
    assert np.mean([len(tokenizer(text)["input_ids"]) for text in texts]) < 20


def test_manifest_counts_and_hashes(demo_folder):
    manifest = json.loads((demo_folder / "manifest.json").read_text())
    assert manifest["shards"]["train-documents-000002.tar"]["samples"] == 160 - 2 * 64
    assert len(manifest["shards"]) == 3 + 2 + 1


def _ensure(folder):
    demo.ensure_demo(folder)


def test_the_corpus_is_built_once_also_for_two_processes_and_again_for_another_version(tmp_path, monkeypatch):
    calls = tmp_path / "calls"

    def build_small(out_dir):
        with calls.open("a") as file:
            file.write("built\n")
        out_dir.mkdir(parents=True)
        (out_dir / "manifest.json").write_text(json.dumps({"version": demo.VERSION, **demo.DEFAULTS}))

    monkeypatch.setattr(demo, "build_demo", build_small)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_ensure, args=(tmp_path / "demo",)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    demo.ensure_demo(tmp_path / "demo")
    assert calls.read_text().count("built") == 1
    monkeypatch.setattr(demo, "VERSION", 0)
    demo.ensure_demo(tmp_path / "demo")
    assert calls.read_text().count("built") == 2


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a demo corpus"):
        demo.ensure_demo(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
