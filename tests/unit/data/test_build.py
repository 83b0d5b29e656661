"""``python -m lcl_ds.data build`` and ``check``: every format to shards that training reads."""

import bz2
import fcntl
import gzip
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from lcl_ds.data.__main__ import main
from lcl_ds.data.corpora import READERS, build_join
from lcl_ds.data.corpora.build_join import first_of_each
from lcl_ds.data.documents import BadSampleError, read_document
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.storage import expand_paths
from lcl_ds.data.stream.lanes import Lane, LaneSettings
from lcl_ds.files import one_of_many
from lcl_ds.tokens import TextTokenizer
from tests.support.corpora import MAKERS, PARQUET, make_img2dataset, make_mmc4, make_shards, picture
from tests.support.disks import no_file_larger_than
from tests.support.ranks import ROOT
from tests.support.tars import write_tar


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
    assert len(paths) == 2
    assert [sample["__key__"] for sample in samples] == [source.sample(number).key for number in range(5)]
    assert [sample["000.jpg"] for sample in samples] == [picture(number) for number in range(5)]


@pytest.mark.parametrize("deduplicate", [False, True])
@pytest.mark.parametrize("make", [make_mmc4, make_img2dataset], ids=["documents", "pairs"])
def test_plain_webdataset_decodes_every_sample(make, deduplicate, tmp_path):
    corpus = make(tmp_path / "in", 5)
    twice = replace(corpus, sources=corpus.sources * (1 + deduplicate))
    build(twice, tmp_path / "out", "--shard-samples", "3", *(["--deduplicate"] if deduplicate else []))
    paths = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode("pil"))
    source = source_of(tmp_path / "out")
    assert [sample["__key__"] for sample in samples] == [source.sample(number).key for number in range(5)]
    for number, sample in enumerate(samples):
        members = {suffix: value for suffix, value in sample.items() if not suffix.startswith("__")}
        assert members.keys() == source.sample(number).members.keys()
        pictures = [value for suffix, value in members.items() if suffix.endswith("jpg")]
        assert [picture.size for picture in pictures] == [(24, 32)] * (len(members) - (2 if corpus.pairs else 1))
        assert members["json"]["source_key"]


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


@pytest.mark.parametrize("more", [[], ["--deduplicate", "--holdout", "0.3"]], ids=["all", "held out"])
def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path, more):
    sources, options = several(tmp_path)
    for workers in (1, 2):
        out = str(tmp_path / f"out{workers}")
        assert main(["build", *sources, out, *options, *more, "--workers", str(workers)]) == 0
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    if more:
        assert contents(tmp_path / "out1" / "heldout") == contents(tmp_path / "out2" / "heldout")


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


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])}


def test_a_killed_build_goes_on_and_gives_the_same_bytes(tmp_path):
    sources, options = several(tmp_path, count=30)
    command = [sys.executable, "-m", "lcl_ds.data", "build", *sources]
    rest = [*options, "--deduplicate", "--workers", "2"]
    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, str(killed), *rest], env=environment(), stdout=subprocess.DEVNULL)
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


def test_a_build_begins_when_no_worker_of_a_killed_one_can_write_any_more(tmp_path):
    sources, options = several(tmp_path)
    out = tmp_path / "out"
    (out / ".build").mkdir(parents=True)
    codes = []
    command = ["build", *sources, str(out), *options, "--workers", "1"]  # which takes a tenth of a second
    build = threading.Thread(target=lambda: codes.append(main(command)))
    with one_of_many(out / ".build" / "workers"):  # as a worker does while it lives
        build.start()
        build.join(1)
        assert build.is_alive()
        assert not list(out.glob(".build/0*"))
        (out / ".build" / "000000.12345").mkdir()
    build.join()
    assert codes == [0]


def started_worker(work, build):
    """A process that prepares to work for the build with that process number, and waits once it has."""
    command = "import sys, pathlib; from lcl_ds.data.corpora import build_unit; "
    command += "build_unit._end_with = lambda build: None; "  # its thread, which ends it soon, but not at once
    command += "build_unit.start_worker(None, pathlib.Path(sys.argv[1]), int(sys.argv[2])); input('ready\\n')"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", command, str(work), str(build)], env=environment(), **pipes)


def test_a_worker_holds_the_lock_of_workers_while_it_lives(tmp_path):
    worker = started_worker(tmp_path, os.getpid())
    assert worker.stdout.readline() == "ready\n"
    with (tmp_path / ".workers.lock").open("w") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        worker.communicate("\n")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_worker_that_begins_after_its_build_was_killed_ends_at_once(tmp_path):
    """It must not touch a folder that the next try has begun to clear."""
    worker = started_worker(tmp_path, os.getppid())
    assert worker.communicate("\n")[0] == ""
    assert worker.returncode == 1


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
    real = build_join.put_in_place
    out = tmp_path / "out"
    for stop in range(3):
        calls = iter(range(100))

        def interrupted(*arguments, calls=calls, stop=stop):
            if next(calls) == stop:
                raise KeyboardInterrupt
            real(*arguments)

        monkeypatch.setattr(build_join, "put_in_place", interrupted)
        assert main(["build", *sources, str(out), *rest]) == 130
        assert not (out / "manifest.json").exists()
    monkeypatch.setattr(build_join, "put_in_place", real)
    assert main(["build", *sources, str(out), *rest]) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_build_is_not_made_again_and_a_folder_in_use_is_left_alone(tmp_path, capsys):
    corpus = make_mmc4(tmp_path / "in")
    build(corpus, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    build(corpus, tmp_path / "out")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert main(["build", *arguments_of(corpus, tmp_path / "out", "--min-similarity", "0.3")]) == 2
    assert "it holds a finished build of other input files or settings (min_similarity)" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    assert main(["build", *arguments_of(corpus, tmp_path / "mine")]) == 2
    assert "it is not empty and holds no build that could go on" in capsys.readouterr().err


def test_a_source_that_cannot_be_read_ends_the_build_and_repaired_goes_on(tmp_path, capsys):
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
    again = tmp_path / "again"
    assert main(["build", *sources, str(again), *options, "--workers", "1"]) == 2
    Path(sources[2]).write_bytes(whole)
    assert main(["build", *sources, str(again), *options, "--workers", "1"]) == 0
    assert len(source_of(again)) == len(source_of(out)) + 9


def test_a_source_that_changed_between_two_tries_is_read_again(tmp_path, monkeypatch):
    sources, options = several(tmp_path)
    rest = [*options, "--workers", "1", "--shard-samples", "2"]
    real, calls = build_join.put_in_place, iter(range(100))

    def interrupted(*arguments):
        if next(calls) == 5:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(build_join, "put_in_place", interrupted)
    assert main(["build", *sources, str(tmp_path / "out"), *rest]) == 130
    monkeypatch.undo()
    write_tar(Path(sources[0]), [("0.json", json.dumps({"texts": ["new"], "images": [None]}).encode())])
    assert main(["build", *sources, str(tmp_path / "out"), *rest]) == 0
    assert main(["build", *sources, str(tmp_path / "whole"), *rest]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_nothing_at_all_is_an_error_that_says_why(tmp_path, capsys):
    corpus = make_mmc4(tmp_path / "in")
    arguments = [str(corpus.sources[0]), str(tmp_path / "out"), "--format", "mmc4", "--workers", "1"]
    assert main(["build", *arguments]) == 2
    assert "15 times an image that is not there" in capsys.readouterr().err
    assert main(["build", str(tmp_path / "none.zip"), str(tmp_path / "x"), "--format", "mmc4"]) == 2
    assert "none.zip: no such file" in capsys.readouterr().err
    assert main(["build", *arguments, "--images", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "out").exists()  # the next try may be of other images
    assert main(["build", *arguments, "--images", str(corpus.images[0])]) == 0


# finished builds


def test_a_finished_build_is_taken_for_what_it_was_made_of(tmp_path, capsys):
    sources, options = several(tmp_path, count=2)
    out = tmp_path / "out"
    command = ["build", *sources, str(out), *options, "--workers", "1"]
    assert main(command) == 0
    assert "already" not in capsys.readouterr().out
    assert main(command) == 0
    assert "already built from these files; name a new folder to build again" in capsys.readouterr().out

    twin = shutil.copytree(tmp_path / "in", tmp_path / "twin")  # the same names and sizes in another folder
    others = [str(twin / Path(source).relative_to(tmp_path / "in")) for source in sources]
    assert main(["build", *others, str(out), *options, "--workers", "1"]) == 2
    assert "it holds a finished build of other input files or settings (sources)" in capsys.readouterr().err

    data = Path(sources[1]).read_bytes()
    Path(sources[1]).write_bytes(data.replace(b"0 of 0", b"9 of 9"))  # repaired in place, not a byte longer
    os.utime(sources[1], ns=(0, 1))
    assert main(command) == 2
    err = capsys.readouterr().err
    assert f"1 of its 2 input files changed since, the first {sources[1]}; name a new folder" in err


def test_images_that_arrived_since_are_not_passed_over_in_silence(tmp_path, capsys):
    corpus = make_mmc4(tmp_path / "in")
    missing = corpus.images[0] / "0_0.jpg"
    data = missing.read_bytes()
    missing.unlink()
    assert build(corpus, tmp_path / "out")["skips"]["an image that is not there"] == 1
    missing.write_bytes(data)
    capsys.readouterr()
    build(corpus, tmp_path / "out")
    assert "already built" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["gone", "shorter", "another"])
def test_shards_of_a_finished_build_must_be_there_and_what_they_were(change, tmp_path, capsys):
    corpus = make_shards(tmp_path / "in")
    out = tmp_path / "out"
    build(corpus, out, "--shard-samples", "2")
    shard = out / "000000-00001.tar"
    if change == "gone":
        shard.unlink()
    elif change == "shorter":
        shard.write_bytes(shard.read_bytes()[:-512])
    else:
        shard.write_bytes((out / "000000-00000.tar").read_bytes())
    assert main(["build", *arguments_of(corpus, out, "--shard-samples", "2")]) == 2
    err = capsys.readouterr().err
    assert "1 of its 3 shards are gone or changed, the first 000000-00001.tar; name a new folder" in err


# what the machine does


@pytest.mark.parametrize("size", [0, 100, 1024, 9000, 15_000])
def test_a_disk_that_fills_up_leaves_nothing_half_done_and_the_next_try_goes_on(size, tmp_path, capsys):
    sources, options = several(tmp_path)
    Path(sources[2]).write_bytes(Path(make_shards(tmp_path / "more", 40).sources[0]).read_bytes())
    rest = [*options, "--workers", "1", "--shard-samples", "50"]
    command = ["build", *sources, str(tmp_path / "out"), *rest]
    for _ in range(2):
        with no_file_larger_than(size):
            assert main(command) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {tmp_path / 'out'}"), err
        assert err.count("\n") == 1
        left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        assert not [path for path in left if path.name.endswith(".partial") or path.parent.suffix]
    assert main(command) == 0
    assert main(["build", *sources, str(tmp_path / "whole"), *rest]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_killed_tries_left_is_removed_at_the_next_start(tmp_path, monkeypatch):
    sources, options = several(tmp_path)
    command = ["build", *sources, str(tmp_path / "out"), *options, "--workers", "1"]
    work = tmp_path / "out" / ".build"

    def killed(path, options):
        for folder in (work / "000001.99999", work / "000002.88888"):
            folder.mkdir()
            (folder / "000001-00000.tar").write_bytes(bytes(100))
        (work / ".images-0.sqlite.7.partial").touch()
        (tmp_path / "out" / ".000000-00000.tar.7.partial").touch()
        raise SystemExit

    monkeypatch.setattr("lcl_ds.data.corpora.build_folder.remove_leftovers", lambda out: None)
    monkeypatch.setitem(READERS, "shards", killed)
    with pytest.raises(SystemExit):
        main(command)
    monkeypatch.undo()
    real = READERS["shards"]
    seen = []

    def looking(path, options):
        seen.append(sorted(path.name for path in work.iterdir() if path.suffix != ".lock"))
        return real(path, options)

    monkeypatch.setitem(READERS, "shards", looking)
    assert main(command) == 0
    assert seen[0] == [f"000000.{os.getpid()}", "settings.json"]
    assert not [name for name in contents(tmp_path / "out") if name.endswith(".partial")]


def test_a_worker_that_is_killed_is_a_sentence_and_the_next_try_goes_on(tmp_path):
    image = picture(0)
    sources = [
        str(
            write_tar(
                tmp_path / f"{n}.tar",
                [(f"{k:05d}.{s}", d) for k in range(2000) for s, d in (("jpg", image), ("txt", b"cat"))],
            )
        )
        for n in range(2)
    ]
    command = ["build", *sources, str(tmp_path / "out"), "--format", "img2dataset", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lcl_ds.data", *command], env=environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob(".build/*.*/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == 2
    assert "error: a worker process was killed" in err
    assert "Traceback" not in err
    assert not list((tmp_path / "out").glob(".build/*.*/*"))
    assert main([*command[:-1], "1"]) == 0
    assert len(source_of(tmp_path / "out")) == 4000


def test_places_that_cannot_be_used_are_named_before_the_work(tmp_path, capsys):
    corpus = make_shards(tmp_path / "in")
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    source = str(corpus.sources[0])

    def error_of(source, out):
        assert main(["build", source, str(out), "--format", "shards", "--workers", "1"]) == 2
        return capsys.readouterr().err

    assert "file: is a file; name a new folder" in error_of(source, tmp_path / "file")
    assert "a part of the path is a file and no folder" in error_of(source, tmp_path / "file" / "out")
    assert "is a folder; name its files" in error_of(str(tmp_path / "in"), tmp_path / "out")
    assert "is not a plain file" in error_of(str(tmp_path / "pipe"), tmp_path / "out")
    assert "build reads local files; download it" in error_of("https://example.org/x.tar", tmp_path / "out")
    assert "build reads local files; download it" in error_of("s3://bucket/{0..9}.tar", tmp_path / "out")
    assert "write the command's output to one" in error_of(f"pipe:cat {source}", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert main(["build", source, str(tmp_path / "new" / "er" / "out"), "--format", "shards", "--workers", "1"]) == 0


@pytest.mark.parametrize(("pack", "name"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")])
def test_a_compressed_source_is_called_so(pack, name, tmp_path, capsys):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(pack(b'{"text_list": ["a"], "image_info": []}\n'))
    assert main(["build", str(path), str(tmp_path / "out"), "--format", "mmc4", "--workers", "1"]) == 2
    assert f"x.jsonl.gz: it is compressed with {name}; unpack it" in capsys.readouterr().err


# names and texts


def test_names_that_are_not_utf8_are_escaped_and_their_pairs_kept(tmp_path, capfdbinary):
    folder = os.fsencode(tmp_path) + b"/\xe9"
    os.mkdir(folder)
    tar = Path(os.fsdecode(folder + b"/caf\xe9.tar"))
    members = [
        ("b\udce9.jpg", picture(1)),
        ("b\udce9.txt", b"a cat"),
        ("c\udce9.jpg", b"<html>"),
        ("c\udce9.txt", b"b"),
    ]
    write_tar(tar, members)
    out = tmp_path / "out"
    assert main(["build", str(tar), str(out), "--format", "img2dataset", "--workers", "1"]) == 0
    assert rb"c\udce9" in capfdbinary.readouterr().out  # the one that is left out is named
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["sources"][0]["source"] == r"caf\udce9.tar"
    assert manifest["sources"][0]["examples"] == {
        "an image in none of the accepted formats": [r"c\udce9"],
    }
    assert json.loads(source_of(out).read(0, "json"))["source_key"] == r"b\udce9"


def test_what_was_left_out_is_counted_by_record_and_named(tmp_path, capsys):
    corpus = make_shards(tmp_path / "in", 9)
    members = [(f"{n}.json", json.dumps({"texts": [n, "b"], "images": [None, None]}).encode()) for n in range(4)]
    members += [("4.json", b"{"), ("5.json", json.dumps({"texts": ["a"], "images": [None]}).encode())]
    write_tar(corpus.sources[0], members)
    (unit,) = build(corpus, tmp_path / "out", "--min-images", "0")["sources"]
    assert (unit["records"], unit["incomplete"], unit["samples"]) == (6, 5, 5)
    assert unit["skips"] == {"a text that is not a string": 4, "json that cannot be parsed": 1}
    assert unit["examples"] == {"a text that is not a string": ["0", "1", "2"], "json that cannot be parsed": ["4"]}
    assert "of 5 of 6 records something or everything was left out" in capsys.readouterr().out


def text_corpus(folder, *texts):
    corpus = make_shards(folder)
    about = [{"texts": ["", text, None], "images": [None, None, "0.jpg"]} for text in texts]
    members = [
        (f"{n}.{s}", d)
        for n, a in enumerate(about)
        for s, d in (("json", json.dumps(a).encode()), ("0.jpg", picture(n)))
    ]
    pairs = [(f"p{n}.{s}", d) for n, t in enumerate(texts) for s, d in (("jpg", picture(n)), ("txt", t.encode()))]
    write_tar(corpus.sources[0], [*members, *pairs])
    return corpus


def test_build_check_and_training_measure_text_alike(tmp_path, capsys):
    limit = 1000
    fitting = ["x" * limit, "\n" * (limit - 1) + "x", "\u20ac" * (limit // 3), "\x01" * limit]
    corpus = text_corpus(tmp_path / "in", *fitting, *(text + "xx" for text in fitting))
    out = tmp_path / "out"
    manifest = build(corpus, out, "--max-text-bytes", str(limit))
    assert manifest["samples"] == 2 * len(fitting)
    assert manifest["skips"] == {"a document with too much text": 2 * len(fitting)}
    assert manifest["longest_text_bytes"] == limit
    assert main(["check", str(out / "*.tar"), "--workers", "1", "--max-text-bytes", str(limit)]) == 0
    assert main(["check", str(out / "*.tar"), "--workers", "1", "--max-text-bytes", str(limit - 2)]) == 1
    source = source_of(out)
    for number in range(len(source)):
        read_document(source, number, limit)


def test_what_was_built_with_longer_texts_is_checked_with_them_and_the_setting_for_training_is_named(tmp_path, capsys):
    corpus = text_corpus(tmp_path / "in", "x" * 2_000_000)
    out = tmp_path / "out"
    build(corpus, out, "--max-text-bytes", "4000000")
    assert "train with data.max_text_bytes=2000000" in capsys.readouterr().out
    assert main(["check", str(out / "*.tar"), "--workers", "1"]) == 0
    with pytest.raises(BadSampleError, match="too much text"):
        read_document(source_of(out), 0)
    for nothing_about_it in (
        "[]",
        "{",
        '{"shards": 7}',
        '{"shards": {"000000-00000.tar": 1}, "longest_text_bytes": "x"}',
    ):
        (out / "manifest.json").write_text(nothing_about_it)
        assert main(["check", str(out / "*.tar"), "--workers", "1"]) == 1


def test_json_is_not_parsed_where_it_is_far_larger_than_its_texts_may_be(tmp_path):
    shard = write_tar(
        tmp_path / "a.tar", [("x.json", b'{"texts": ["a"], "images": [null], "more": "' + b"x" * 1600 + b'"}')]
    )
    with pytest.raises(BadSampleError, match="json that is too large"):
        read_document(Source("s", [index_shard(shard)]), 0, max_text_bytes=100)
    assert read_document(Source("s", [index_shard(shard)]), 0, max_text_bytes=200).segments == ("a",)


@pytest.mark.parametrize("name", ["50%25 off", "a?b", "a#b", "o [/b]", "[red]", "{a,b}", "line\nbreak", "~", "-x", "'"])
def test_a_folder_may_have_any_name(name, tmp_path, capsys):
    corpus = make_mmc4(tmp_path / "in")
    images = shutil.copytree(corpus.images[0], tmp_path / name / "images")
    write_tar(images / "more.tar", [("x.jpg", picture(1))])
    out = tmp_path / name / "out"
    command = ["build", str(corpus.sources[0]), str(out), "--format", "mmc4", "--workers", "1", "--images", str(images)]
    assert main(command) == 0
    assert str(out) in capsys.readouterr().out
    assert sum(unit["images"] for unit in json.loads((out / "manifest.json").read_text())["sources"]) == 10
