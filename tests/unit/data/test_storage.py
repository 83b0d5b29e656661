"""Shards wherever they lie: lists, URLs, HTTP with byte ranges, commands."""

import http.server
import json
import os
import threading
from pathlib import Path

import fsspec
import pytest

from lcl_ds.config import load_config, recipe_path
from lcl_ds.data.__main__ import main
from lcl_ds.data.corpus import open_data
from lcl_ds.data.documents import read_document
from lcl_ds.data.shards import storage
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.storage import cached_name, expand_paths, materialise, read_range
from lcl_ds.data.stream.lanes import Lane
from lcl_ds.errors import UserError
from lcl_ds.files import printable
from lcl_ds.tokens import TextTokenizer
from tests.support.lanes import SETTINGS, same
from tests.support.tars import write_tar

MEMBERS = [(f"{i:03d}.{suffix}", f"{i} {suffix}".encode() * 50) for i in range(30) for suffix in ("json", "000.jpg")]


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / "a.tar", MEMBERS)


@pytest.fixture
def memory():
    """fsspec's in-memory file system, emptied afterwards."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.rm("/", recursive=True)


def everything(source):
    return [(source.sample(i).key, source.read(i, "json"), source.read(i, "000.jpg")) for i in range(len(source))]


def test_a_list_names_shards_relative_to_itself(tmp_path, tar):
    write_tar(tmp_path / "b.tar", MEMBERS[:2])
    (tmp_path / "shards.txt").write_text("# made by hand\na.tar\nb.tar\n\nmemory://x/c.tar\n")
    actual = expand_paths(tmp_path / "shards.txt")
    assert actual == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar", "memory://x/c.tar"]


def test_an_empty_or_missing_list_is_named(tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match=r"empty\.txt: it lists no shards"):
        expand_paths(f"{tmp_path}/empty.txt")
    with pytest.raises(UserError, match=r"none\.txt: cannot be read"):
        expand_paths(f"{tmp_path}/none.txt")


def test_globs_leave_indices_out(tmp_path, tar):
    index_shard(tar)
    assert expand_paths(f"{tmp_path}/*") == [str(tar)]


def test_a_remote_shard_reads_like_a_local_one(tmp_path, tar, memory):
    memory.pipe("/bucket/a.tar", tar.read_bytes())
    remote = Source("s", [index_shard("memory://bucket/a.tar", tmp_path / "cache")])
    local = Source("s", [index_shard(tar)])
    assert everything(remote) == everything(local)
    assert remote.fingerprint() == local.fingerprint()
    assert (tmp_path / "cache" / cached_name("memory://bucket/a.tar", ".index")).is_file()


def test_only_the_bytes_that_are_needed_are_fetched(tmp_path, tar, memory, monkeypatch):
    memory.pipe("/bucket/a.tar", tar.read_bytes())
    index_shard("memory://bucket/a.tar", tmp_path / "cache")
    fetched = []
    cat = type(memory).cat_file
    monkeypatch.setattr(
        type(memory),
        "cat_file",
        lambda self, path, start=None, end=None: fetched.append(end - start) or cat(self, path, start, end),
    )
    source = Source("s", [index_shard("memory://bucket/a.tar", tmp_path / "cache")])
    assert len(fetched) == 4  # an index beside it, then the first header, the middle one, and the end with the last
    source.read(7, "json")
    assert sum(fetched) < len(tar.read_bytes()) // 4


def test_an_index_beside_a_remote_shard_is_used(tmp_path, tar, memory, monkeypatch):
    index_shard(tar)
    memory.pipe("/bucket/a.tar", tar.read_bytes())
    memory.pipe("/bucket/a.tar.index", (tmp_path / "a.tar.index").read_bytes())
    monkeypatch.setattr("lcl_ds.data.shards.shard.scan_shard", lambda *_: pytest.fail("the headers were read again"))
    assert everything(Source("s", [index_shard("memory://bucket/a.tar", tmp_path / "cache")]))[3][1] == MEMBERS[6][1]


def test_remote_globs_and_lists(tmp_path, tar, memory):
    for name in ("00.tar", "01.tar", "02.tar", "00.tar.index"):
        memory.pipe(f"/bucket/{name}", tar.read_bytes())
    memory.pipe("/bucket/shards.txt", b"01.tar\n")
    assert expand_paths("memory://bucket/*.tar*") == [f"memory:///bucket/{i}.tar" for i in ("00", "01", "02")]
    assert expand_paths("memory://bucket/{00..01}.tar") == ["memory://bucket/00.tar", "memory://bucket/01.tar"]
    assert expand_paths("memory://bucket/shards.txt") == ["memory://bucket/01.tar"]
    with pytest.raises(UserError, match="no such file"):
        expand_paths("memory://bucket/*.zip")


@pytest.mark.parametrize("location", ["memory://none/x.tar", "nonsense://x/y.tar", "s3://bucket/x.tar"])
def test_what_cannot_be_reached_is_named(tmp_path, location):
    with pytest.raises(UserError, match=location):
        index_shard(location, tmp_path)


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves one file with byte ranges; every third request fails once."""

    data = b""
    requests = 0

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        cls = type(self)
        cls.requests += 1
        if cls.requests % 3 == 0:
            self.send_error(503)
            return
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(first), int(last) + 1 if last else len(cls.data)
        piece = cls.data[start:end]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(piece)))
        self.send_header("Content-Range", f"bytes {start}-{start + len(piece) - 1}/{len(cls.data)}")
        self.end_headers()
        if body:
            self.wfile.write(piece)

    def log_message(self, *_):
        pass


def test_http_with_failing_requests(tmp_path, tar, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.01)
    Ranges.data = tar.read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/a.tar"
        remote = Source("s", [index_shard(url, tmp_path / "cache")])
        assert everything(remote) == everything(Source("s", [index_shard(tar)]))
    finally:
        server.shutdown()
        server.server_close()


def test_an_error_that_passes_is_tried_again_and_one_that_stays_is_an_oserror(monkeypatch, memory):
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.001)
    memory.pipe("/x", b"0123456789")
    failures = iter([RuntimeError("busy"), ConnectionError("reset")])
    cat = type(memory).cat_file

    def sometimes(self, path, start=None, end=None):
        for failure in failures:
            raise failure
        return cat(self, path, start, end)

    monkeypatch.setattr(type(memory), "cat_file", sometimes)
    assert read_range("memory://x", 2, 5) == b"234"

    def never(self, path, start=None, end=None):
        raise RuntimeError("gone")

    monkeypatch.setattr(type(memory), "cat_file", never)
    with pytest.raises(OSError, match="memory://x: RuntimeError: gone"):
        read_range("memory://x", 0, 1)


def test_a_command_is_run_once_and_read_from_the_cache(tmp_path, tar):
    command = f"pipe:echo ran >> {tmp_path}/log; cat {tar}"
    assert expand_paths(command) == [command]
    first = Source("s", [index_shard(command, tmp_path / "cache")])
    again = Source("s", [index_shard(command, tmp_path / "cache")])
    assert everything(first) == everything(again) == everything(Source("s", [index_shard(tar)]))
    assert first.fingerprint() == again.fingerprint()
    assert (tmp_path / "log").read_text() == "ran\n"


def test_a_command_that_fails_leaves_nothing(tmp_path, tar):
    command = f"pipe:head -c 1000 {tar}; exit 7"
    with pytest.raises(UserError, match="exit code 7"):
        materialise(command, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.tar"))
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_nothing_in_a_shard_becomes_a_location(tmp_path):
    """Keys and image names that look like commands and URLs are only looked up in the shard itself."""
    trap = f"pipe:touch {tmp_path}/ran"
    record = json.dumps({"texts": ["a", None, None], "images": [None, trap, "memory://x/y.jpg"]})
    source = Source("s", [index_shard(write_tar(tmp_path / "a.tar", [(f"{trap}.json", record.encode())]))])
    assert read_document(source, 0).missing_images == 2
    assert not (tmp_path / "ran").exists()


def test_a_run_trains_on_remote_shards_the_same_rows(tmp_path, demo_folder, memory):
    shards = sorted(demo_folder.glob("train-documents-*.tar"))
    for shard in shards:
        memory.pipe(f"/demo/{shard.name}", shard.read_bytes())
    rows = []
    for paths in (f"{demo_folder}/train-documents-*.tar", [f"memory://demo/{shard.name}" for shard in shards]):
        overrides = [f"data.tokenizer={demo_folder}/tokenizer", "data.demo=null", f"data.cache={tmp_path}/cache"]
        config = load_config(
            recipe_path("demo"), [*overrides, f"data.shards=[{{name: d, paths: {json.dumps(paths)}}}]"]
        )
        lane = Lane(open_data(config.data).sources, SETTINGS, 0, TextTokenizer(demo_folder / "tokenizer"))
        rows.append([lane.next_row() for _ in range(5)])
    assert all(same(a, b) for a, b in zip(*rows, strict=True))


def test_a_list_of_shards_runs_no_command(tmp_path):
    (tmp_path / "shards.txt").write_text(f"a.tar\npipe:touch {tmp_path / 'ran'}\n")
    with pytest.raises(UserError, match="it lists the command 'pipe:touch"):
        expand_paths(str(tmp_path / "shards.txt"))
    assert not (tmp_path / "ran").exists()


ODD_NAMES = [
    "[2023] laion/0.tar",
    "[/old] laion/0.tar",
    "{a,b}/0.tar",
    "{00..03}.tar",
    "a{.tar",
    "what*ever?.tar",
    "x://y/0.tar",
    "s3://bucket.tar",
    "pipe:cat 0.tar",
    " spaces at both ends .tar",
    "#1.tar",
    "a\\b.tar",
    "new\nline.tar",
    "100%.tar",
    "~.tar",
    "ü.tar",
    os.fsdecode(b"caf\xe9.tar"),
    "a.tar.index.tar",
    "list.txt.tar",
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)  # pytest-xdist cannot send other names to its workers
@pytest.mark.parametrize("way", ["absolute", "relative"])
def test_a_file_that_exists_is_found_whatever_its_name(tmp_path, monkeypatch, name, way, capfd):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tar(path, MEMBERS)
    (actual,) = expand_paths(str(path) if way == "absolute" else name)
    assert os.path.samefile(actual, path)
    assert everything(Source("s", [index_shard(actual, tmp_path / "cache")]))[3][1] == MEMBERS[6][1]
    report = tmp_path / "report.json"
    assert main(["check", str(path) if way == "absolute" else name, "--workers", "1", "--json", str(report)]) == 1
    assert os.path.samefile(json.loads(report.read_text())["shards"][0]["shard"], path)
    last = capfd.readouterr().out.splitlines()[-1]
    assert printable(name.rsplit("/", 1)[-1]) in last


@pytest.mark.parametrize("name", [name for name in ODD_NAMES if "\n" not in name])
def test_a_list_names_files_whatever_their_names(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tar(path, MEMBERS)
    (tmp_path / "mine.txt").write_bytes(os.fsencode(f"# comment\n{name}\n"))
    (actual,) = expand_paths(str(tmp_path / "mine.txt"))
    assert os.path.samefile(actual, path)


@pytest.mark.parametrize("folder", ["[2023] laion", "{a,b}", "what*ever?"])
def test_globs_and_braces_work_in_folders_with_such_signs_in_their_names(tmp_path, folder):
    (tmp_path / folder).mkdir()
    for number in range(3):
        write_tar(tmp_path / folder / f"{number}.tar", MEMBERS[:2])
    assert len(expand_paths(f"{tmp_path}/{folder}/*.tar")) == 3
    assert len(expand_paths(f"{tmp_path}/{folder}/{{0..1}}.tar")) == 2
    assert len(expand_paths(f"{tmp_path}/{folder}/[12].tar")) == 2
    assert len(expand_paths(f"{tmp_path.parent}/{tmp_path.name[:-1]}?/{folder}/*.tar")) == 3


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode(),
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.encode("utf-16"),
        lambda text: text.replace("\n", "  \n").encode(),
    ],
    ids=["UTF-8", "with a mark", "CRLF", "UTF-16", "spaces at the ends"],
)
def test_lists_of_any_editor_are_read(tmp_path, encode):
    write_tar(tmp_path / "ü 1.tar", MEMBERS[:2])
    (tmp_path / "list.txt").write_bytes(encode("# comment\n\nü 1.tar\nmemory://x/y.tar\n"))
    assert expand_paths(f"{tmp_path}/list.txt") == [f"{tmp_path}/ü 1.tar", "memory://x/y.tar"]


@pytest.mark.parametrize("text", ["ü.tar".encode("latin-1"), "a.tar".encode("utf-16-le")], ids=["Latin-1", "no mark"])
def test_a_list_in_another_encoding_is_named_with_the_line(tmp_path, text):
    write_tar(tmp_path / "ü.tar", MEMBERS[:2])
    (tmp_path / "list.txt").write_bytes(b"# comment\n" + text)
    with pytest.raises(UserError, match=r"list\.txt: line 2 is not UTF-8"):
        expand_paths(f"{tmp_path}/list.txt")


@pytest.mark.parametrize("pattern", ["{0..9.tar", "a}.tar", "memory://x/{0..9.tar"])
def test_braces_that_cannot_be_read_are_named(pattern):
    with pytest.raises(UserError, match=r"no such file, and its braces cannot be read"):
        expand_paths(pattern)


def test_braces_of_a_command_are_its_own_where_they_do_not_pair():
    assert expand_paths("pipe:sed 's/{//' 0.tar") == ["pipe:sed 's/{//' 0.tar"]
    assert expand_paths("pipe:cat {0..1}.tar") == ["pipe:cat 0.tar", "pipe:cat 1.tar"]


def test_remote_names_with_glob_signs_are_names_where_they_exist(memory, tar):
    memory.pipe("/bucket/[1].tar", tar.read_bytes())
    memory.pipe("/bucket/1.tar", tar.read_bytes())
    assert expand_paths("memory://bucket/[1].tar") == ["memory://bucket/[1].tar"]
    assert expand_paths("memory://bucket/[12].tar") == ["memory:///bucket/1.tar"]


@pytest.mark.parametrize("whole", [True, False], ids=["whole file", "from the start on"])
def test_a_server_without_ranges_is_named_as_the_cause(tmp_path, tar, memory, monkeypatch, whole):
    memory.pipe("/bucket/a.tar", tar.read_bytes())
    cat = type(memory).cat_file
    monkeypatch.setattr(
        type(memory), "cat_file", lambda self, path, start=None, end=None: cat(self, path, None if whole else start)
    )
    with pytest.raises(UserError, match=r"a\.tar: its server does not support byte ranges .*download the shard, or"):
        index_shard("memory://bucket/a.tar", tmp_path / "cache")


def test_a_server_that_has_a_page_for_everything_has_no_index(tmp_path, tar, memory):
    """Its answer to a question for bytes of the index that it lacks is a page, whole."""
    memory.pipe("/bucket/a.tar", tar.read_bytes())
    memory.pipe("/bucket/a.tar.index", b"<html>" + bytes(9000))
    cat = type(memory).cat_file

    def page(self, path, start=None, end=None):
        return cat(self, path) if path.endswith(".index") else cat(self, path, start, end)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(memory), "cat_file", page)
        source = Source("s", [index_shard("memory://bucket/a.tar", tmp_path / "cache")])
        assert everything(source)[3][1] == MEMBERS[6][1]


def test_a_server_that_sends_too_little_is_an_error_of_reading(tmp_path, tar, memory, monkeypatch):
    memory.pipe("/bucket/a.tar", tar.read_bytes())
    source = Source("s", [index_shard("memory://bucket/a.tar", tmp_path / "cache")])
    cat = type(memory).cat_file
    for length in (0, 100, 600):
        monkeypatch.setattr(
            type(memory),
            "cat_file",
            lambda self, path, start=None, end=None, n=length: cat(self, path, start, min(end, start + n)),
        )
        with pytest.raises(OSError, match="sent|shorter"):
            source.read(3, "json")
        with pytest.raises(UserError, match="cannot be read: .*the server sent"):
            index_shard("memory://bucket/a.tar", tmp_path / "cache", rescan=True)


def test_a_server_that_does_not_tell_the_size_is_named(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(type(memory), "size", lambda self, path: None)
    with pytest.raises(UserError, match="does not tell the size; download"):
        index_shard("memory://bucket/a.tar", tmp_path / "cache")


def test_a_stream_in_place_of_a_shard_or_a_list_is_refused_and_not_waited_for(tmp_path):
    for name in ("stream.tar", "stream.txt"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"stream\.tar: is not a plain file"):
        index_shard(tmp_path / "stream.tar")
    with pytest.raises(UserError, match=r"stream\.txt: is not a plain file"):
        expand_paths(f"{tmp_path}/stream.txt")


def test_a_stream_in_place_of_an_index_is_left_alone_and_not_waited_for(tmp_path, tar):
    stream = Path(f"{tar}.index")
    stream.unlink(missing_ok=True)
    os.mkfifo(stream)
    for _ in range(2):
        shard = index_shard(tar, tmp_path / "cache")
        assert Source("s", [shard]).sample(0).members
    assert stream.is_fifo()
