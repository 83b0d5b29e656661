"""``python -m lcl_ds.data build`` and ``check``: every format to shards that training reads."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset

from lcl_ds.data.__main__ import main
from lcl_ds.data.build import first_of_each
from lcl_ds.data.documents import read_document
from lcl_ds.data.formats import READERS
from lcl_ds.data.lanes import Lane, LaneSettings
from lcl_ds.data.shards import Source, expand_paths, index_shard
from lcl_ds.tokens import TextTokenizer
from tests.distributed.ranks import ROOT
from tests.unit.data.corpora import MAKERS, PARQUET, make_img2dataset, make_mmc4, make_shards, picture
from tests.unit.data.test_shards import write_tar


def arguments_of(corpus, out, *more):
    images = ["--images", *map(str, corpus.images)] if corpus.images else []
    return [*map(str, corpus.sources), str(out), "--format", corpus.format, "--workers", "1", *more, *images]


def build(corpus, out, *more):
    assert main(["build", *arguments_of(corpus, out, *more)]) == 0
    return json.loads((out / "manifest.json").read_text())


def source_of(out):
    return Source("built", [index_shard(path) for path in expand_paths(f"{out}/*.tar")])


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize("name", MAKERS)
def test_every_format_becomes_shards_that_pass_the_check_and_make_rows(name, tmp_path, demo_folder):
    if name in PARQUET:
        pytest.importorskip("pyarrow")
    corpus = MAKERS[name](tmp_path / name)
    manifest = build(corpus, tmp_path / "out", "--shard-samples", "2")
    assert manifest["samples"] == 5
    assert list(manifest["shards"]) == (tmp_path / "out" / "shards.txt").read_text().split()
    assert [shard["samples"] for shard in manifest["shards"].values()] == [2, 2, 1]
    assert (
        main(["check", str(tmp_path / "out" / "shards.txt"), "--workers", "1", "--json", str(tmp_path / "r.json")]) == 0
    )
    total = json.loads((tmp_path / "r.json").read_text())["total"]
    assert (total["documents"], total["pairs"]) == (corpus.documents, corpus.pairs)
    assert total["images"] == manifest["sources"][0]["images"]
    settings = LaneSettings(
        lanes=1,
        data_seed=0,
        augmentation_seed=0,
        row_tokens=400,
        row_images=8,
        image_tokens=4,
        image_size=16,
        pack_window=10,
    )
    lane = Lane([source_of(tmp_path / "out")], settings, 0, TextTokenizer(demo_folder / "tokenizer"))
    rows = [lane.next_row() for _ in range(3)]
    assert sum(len(sequence.pixels) for row in rows for sequence in row.sequences) > 0
    assert sum(row.skipped_samples for row in rows) == 0


def test_texts_images_and_matches_arrive(tmp_path):
    build(make_shards(tmp_path / "in"), tmp_path / "out")
    source = source_of(tmp_path / "out")
    for number in range(5):
        record = json.loads(source.read(number, "json"))
        assert record["texts"] == [f"before {number}", None, f"after {number}"]
        assert record["images"] == [None, "000.jpg", None]
        assert record["matched_text_index"] == [None, 2, None]
        assert record["source_key"] == f"{number:04d}"
        assert source.read(number, "000.jpg") == picture(number)


def test_plain_webdataset_reads_them(tmp_path):
    build(make_shards(tmp_path / "in"), tmp_path / "out", "--shard-samples", "3")
    paths = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    source = source_of(tmp_path / "out")
    assert [sample["__key__"] for sample in samples] == [source.sample(number).key for number in range(5)]
    assert [sample["000.jpg"] for sample in samples] == [picture(number) for number in range(5)]


def test_pairs_stay_pairs_and_members_keep_their_format(tmp_path):
    members = [("a.jpg", picture(1, "PNG")), ("a.txt", "čaj".encode()), ("b.png", picture(2)), ("b.txt", b"two")]
    corpus = make_img2dataset(tmp_path / "in")
    write_tar(corpus.sources[0], members)
    build(corpus, tmp_path / "out")
    source = source_of(tmp_path / "out")
    documents = [read_document(source, number) for number in range(2)]
    assert [d.images for d in documents] == [("png",), ("jpg",)]
    assert all(d.is_pair for d in documents)
    assert source.read(0, "txt").decode() == "čaj"


def several(tmp_path, count=4):
    """Sources that share some documents; sources, and documents that are alike."""
    folder = tmp_path / "in"
    paths = []
    for number in range(count):
        corpus = make_shards(folder / str(number))
        members = [
            (f"{i}.json", json.dumps({"texts": [f"{i % 7} of {number // 2}"], "images": [None]}).encode())
            for i in range(9)
        ]
        paths.append(write_tar(corpus.sources[0], members))
    return [str(path) for path in paths], ["--format", "shards", "--min-images", "0", "--shard-samples", "4"]


@pytest.mark.parametrize("more", [[], ["--deduplicate"]])
def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path, more):
    sources, options = several(tmp_path)
    for workers in (1, 2):
        out = str(tmp_path / f"out{workers}")
        assert main(["build", *sources, out, *options, *more, "--workers", str(workers)]) == 0
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")


def test_duplicates_go_and_the_first_stays(tmp_path):
    sources, options = several(tmp_path)
    assert main(["build", *sources, str(tmp_path / "out"), *options, "--deduplicate", "--workers", "1"]) == 0
    source = source_of(tmp_path / "out")
    texts = [json.loads(source.read(number, "json"))["texts"][0] for number in range(len(source))]
    assert texts == [f"{i} of {half}" for half in (0, 1) for i in range(7)]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["samples"], manifest["duplicates"]) == (14, 4 * 9 - 14)
    assert "000001-00000.tar" not in manifest["shards"]  # nothing in it was new


def test_first_of_each_agrees_with_a_set():
    hashes = np.random.default_rng(0).integers(0, 5, (200, 2)).astype("<u8")
    seen, expected = set(), []
    for row in map(tuple, hashes.tolist()):
        expected.append(row not in seen)
        seen.add(row)
    assert first_of_each(hashes).tolist() == expected


def test_a_killed_build_goes_on_and_gives_the_same_bytes(tmp_path):
    sources, options = several(tmp_path, count=30)
    command = [sys.executable, "-m", "lcl_ds.data", "build", *sources]
    rest = [*options, "--deduplicate", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])}
    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, str(killed), *rest], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(killed.glob(".build/*/unit.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "manifest.json").exists()
    assert list(killed.glob(".build/*/unit.json"))
    assert main(["build", *sources, str(killed), *rest]) == 0
    assert main(["build", *sources, str(tmp_path / "whole"), *rest]) == 0
    assert contents(killed) == contents(tmp_path / "whole")
    assert not (killed / ".build").exists()


def test_a_finished_source_is_not_read_again(tmp_path, monkeypatch):
    sources, options = several(tmp_path)
    read = []
    real = READERS["shards"]

    def stop_at_the_third(path, options):
        read.append(path)
        if len(read) == 3:
            raise KeyboardInterrupt
        return real(path, options)

    monkeypatch.setitem(READERS, "shards", stop_at_the_third)
    command = ["build", *sources, str(tmp_path / "out"), *options, "--workers", "1"]
    assert main(command) == 130
    assert main(command) == 0
    assert [str(path) for path in read] == [*sources[:3], *sources[2:]]


def test_publishing_may_be_interrupted_anywhere(tmp_path, monkeypatch):
    sources, options = several(tmp_path)
    rest = [*options, "--deduplicate", "--workers", "1"]
    assert main(["build", *sources, str(tmp_path / "whole"), *rest]) == 0
    from lcl_ds.data import build as module

    real = module._put_in_place
    out = tmp_path / "out"
    for stop in range(3):
        calls = iter(range(100))

        def interrupted(*arguments, calls=calls, stop=stop):
            if next(calls) == stop:
                raise KeyboardInterrupt
            real(*arguments)

        monkeypatch.setattr(module, "_put_in_place", interrupted)
        assert main(["build", *sources, str(out), *rest]) == 130
        assert not (out / "manifest.json").exists()
    monkeypatch.setattr(module, "_put_in_place", real)
    assert main(["build", *sources, str(out), *rest]) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_build_is_not_made_again_and_a_folder_in_use_is_left_alone(tmp_path, capsys):
    corpus = make_mmc4(tmp_path / "in")
    build(corpus, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    build(corpus, tmp_path / "out")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert main(["build", *arguments_of(corpus, tmp_path / "out", "--min-similarity", "0.3")]) == 2
    assert "it holds a finished build of other sources or settings (min_similarity)" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    assert main(["build", *arguments_of(corpus, tmp_path / "mine")]) == 2
    assert "it is not empty and holds no build that could go on" in capsys.readouterr().err


def test_a_source_that_cannot_be_read_ends_the_build_and_mended_goes_on(tmp_path, capsys):
    sources, options = several(tmp_path)
    whole = Path(sources[2]).read_bytes()
    Path(sources[2]).write_bytes(bytes(range(256)) * (len(whole) // 256))
    out = tmp_path / "out"
    assert main(["build", *sources, str(out), *options, "--workers", "1"]) == 2
    err = capsys.readouterr().err
    assert f"{sources[2]}: cannot be read as a tar" in err
    assert "--skip-unreadable" in err
    assert main(["build", *sources, str(out), *options, "--workers", "1", "--skip-unreadable"]) == 0
    assert f"not read: {sources[2]}" in capsys.readouterr().out
    Path(sources[2]).write_bytes(whole)
    assert main(["build", *sources, str(tmp_path / "again"), *options, "--workers", "1"]) == 0
    assert len(source_of(tmp_path / "again")) == len(source_of(out)) + 9


def test_nothing_at_all_is_an_error_that_says_why(tmp_path, capsys):
    corpus = make_mmc4(tmp_path / "in")
    arguments = [str(corpus.sources[0]), str(tmp_path / "out"), "--format", "mmc4", "--workers", "1"]
    assert main(["build", *arguments]) == 2
    assert "15 times an image that is not there" in capsys.readouterr().err
    assert main(["build", str(tmp_path / "none.zip"), str(tmp_path / "x"), "--format", "mmc4"]) == 2
    assert "none.zip: no such file" in capsys.readouterr().err
    assert main(["build", *arguments, "--images", str(tmp_path / "none")]) == 2


# check


def check(tmp_path, *paths):
    code = main(["check", *map(str, paths), "--workers", "1", "--json", str(tmp_path / "report.json")])
    return code, json.loads((tmp_path / "report.json").read_text())


def document(texts, images):
    return json.dumps({"texts": texts, "images": images}).encode()


GOOD = [("g.000.jpg", picture(0)), ("g.json", document(["a", None], [None, "000.jpg"]))]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("x.000.jpg", picture(0)[:-30]), ("x.json", document([None], ["000.jpg"]))], "a damaged image"),
        ([("x.000.jpg", b"<html>"), ("x.json", document([None], ["000.jpg"]))], "none of the accepted formats"),
        ([("x.json", document(["a", None], [None, "000.jpg"]))], "an image that is not there"),
        ([("x.json", b"{")], "json that cannot be parsed"),
        ([("x.json", document([], []))], "a document without text and images"),
        ([("x.bin", b"1")], "neither a document"),
        ([("x.jpg", picture(0)), ("x.txt", b"\xff")], "text that is not UTF-8"),
        ([*GOOD, ("y.json", document(["a"], [None])), *GOOD], "a key that occurred before"),
    ],
)
def test_the_check_names_what_is_bad(tmp_path, members, reason, capsys):
    shard = write_tar(tmp_path / "a.tar", [*GOOD, *[(name.replace("g.", "h.", 1), data) for name, data in members]])
    good = write_tar(tmp_path / "b.tar", GOOD)
    code, report = check(tmp_path, shard, good)
    assert code == 1
    assert any(reason in problem["reason"] for problem in report["shards"][0]["problems"])
    assert report["shards"][1]["problem_count"] == 0
    assert report["total"]["problem_count"] == 1
    assert reason in capsys.readouterr().out


def test_the_check_does_not_trust_the_index(tmp_path):
    shard = write_tar(tmp_path / "a.tar", GOOD * 1)
    index_shard(shard)
    shard.write_bytes(shard.read_bytes()[:-8000])
    code, report = check(tmp_path, shard)
    assert code == 1
    assert "end" in report["shards"][0]["problems"][0]["reason"]


def test_the_check_counts_what_is_there(tmp_path, demo_folder):
    code, report = check(tmp_path, demo_folder / "train-*.tar")
    total = report["total"]
    assert (code, total["documents"], total["pairs"], total["samples"]) == (0, 160, 120, 280)
    assert total["formats"] == {"JPEG": total["images"]}
    assert report["shards"][0]["short_side"] == {"min": 32, "median": 32, "max": 32}


def test_the_check_reads_shards_in_several_processes(tmp_path):
    shards = [write_tar(tmp_path / f"{i}.tar", GOOD if i else [("x.json", b"{")]) for i in range(3)]
    assert main(["check", *map(str, shards), "--workers", "2", "--json", str(tmp_path / "r.json")]) == 1
    report = json.loads((tmp_path / "r.json").read_text())
    assert [shard["problem_count"] for shard in report["shards"]] == [1, 0, 0]
