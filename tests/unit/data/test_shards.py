"""Tars as random-access collections."""

import contextlib
import copy
import gc
import hashlib
import io
import os
import pickle
import resource
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lcl_ds.data.shards import index_file
from lcl_ds.data.shards import shard as shard_module
from lcl_ds.data.shards import source as shards
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Blocks, Source
from lcl_ds.data.shards.storage import expand_paths
from lcl_ds.data.shards.tar_members import BLOCK, MAX_NAME_BYTES, BrokenTarError, header_hash, members_of
from lcl_ds.errors import UserError
from tests.support.tars import write_tar


@pytest.fixture
def shard(tmp_path):
    members = [(f"{i:04d}.{suffix}", f"{i} {suffix}".encode()) for i in range(40) for suffix in ("json", "000.jpg")]
    return write_tar(tmp_path / "a.tar", members)


def test_samples_are_read_by_number_and_suffix(shard):
    source = Source("s", [index_shard(shard)])
    assert len(source) == 40
    assert source.read(17, "000.jpg") == b"17 000.jpg"
    assert list(source.blocks(16)) == [(0, 16), (16, 32), (32, 40)]
    assert source.where(3) == f"{shard}: 0003"


def test_blocks_do_not_cross_shards(tmp_path, shard):
    other = write_tar(tmp_path / "b.tar", [("x.txt", b"1"), ("y.txt", b"2")])
    source = Source("s", [index_shard(shard), index_shard(other)])
    assert list(source.blocks(32)) == [(0, 32), (32, 40), (40, 42)]
    assert source.read(41, "txt") == b"2"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: 512 * 9 + 100], "cut|unexpected end|truncated"),
        (lambda data: data[: 512 * 8], "end mark|unexpected end"),
        (lambda data: b"not a tar" * 200, "cannot be read"),
        (lambda data: b"", "cannot be read"),
        (lambda data: bytes(10240), "no samples"),
    ],
    ids=["cut in a member", "cut between members", "not a tar", "empty file", "empty tar"],
)
def test_a_damaged_shard_is_refused_and_named(shard, damage, message):
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        index_shard(shard)
    assert str(shard) in str(error.value)


def test_paths_expand_globs_and_braces_in_order(tmp_path):
    for i in range(12):
        (tmp_path / f"{i:02d}.tar").touch()
    assert [Path(p).name for p in expand_paths(f"{tmp_path}/{{03..05}}.tar")] == ["03.tar", "04.tar", "05.tar"]
    assert len(expand_paths([f"{tmp_path}/0*.tar", f"{tmp_path}/01.tar"])) == 10


@pytest.mark.parametrize("pattern", ["none.tar", "none-*.tar", "{00..12}.tar"])
def test_a_path_that_matches_nothing_is_named(tmp_path, pattern):
    for i in range(12):
        (tmp_path / f"{i:02d}.tar").touch()
    with pytest.raises(UserError, match="no such file"):
        expand_paths(f"{tmp_path}/{pattern}")


def layout_of(path):
    """The fingerprint's definition, over a plain listing: of checkpoints that exist, so it must not change."""
    samples = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            samples.setdefault(key, {})[suffix] = (member.offset_data, member.size)
    digest = hashlib.sha256(path.name.encode())
    for key, ranges in samples.items():
        digest.update(repr((key, sorted(ranges.items()))).encode())
    return digest.hexdigest()[:16]


def test_the_fingerprint_is_a_hash_of_name_and_layout(shard):
    assert index_shard(shard).fingerprint() == index_shard(shard).fingerprint() == layout_of(shard)


def test_the_fingerprint_changes_with_the_layout(tmp_path, shard):
    before = index_shard(shard).fingerprint()
    assert index_shard(shard).fingerprint() == before
    write_tar(shard, [("x.txt", b"1")])
    assert index_shard(shard).fingerprint() != before


@pytest.fixture
def scans(monkeypatch):
    """How often a tar's headers were read through."""
    calls = []
    scan = shard_module.scan_shard
    monkeypatch.setattr(shard_module, "scan_shard", lambda path: calls.append(path) or scan(path))
    return calls


def contents(shard):
    source = Source("s", [shard])
    return [(source.sample(i), source.read(i, "json"), source.read(i, "000.jpg")) for i in range(len(source))]


def test_the_index_is_made_once_and_lies_beside_the_shard(shard, scans):
    first = index_shard(shard)
    before = Path(f"{shard}.index").read_bytes()
    again = index_shard(shard)
    assert len(scans) == 1
    assert again.fingerprint() == first.fingerprint()
    assert contents(again) == contents(first)
    Path(f"{shard}.index").unlink()
    assert contents(index_shard(shard)) == contents(first)
    assert Path(f"{shard}.index").read_bytes() == before


def test_a_touched_shard_keeps_its_index(shard, scans):
    index_shard(shard)
    os.utime(shard, (1, 1))
    index_shard(shard)
    assert len(scans) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda shard: write_tar(shard, [("x.json", b"1"), ("x.000.jpg", b"2")]),
        lambda shard: write_tar(
            shard, [(f"{i:04d}.{s}", f"{i} {s}".encode()) for i in range(39, -1, -1) for s in ("json", "000.jpg")]
        ),
        lambda shard: Path(f"{shard}.index").write_bytes(b"damaged"),
        lambda shard: Path(f"{shard}.index").write_bytes(Path(f"{shard}.index").read_bytes()[:40]),
        lambda shard: Path(f"{shard}.index").write_bytes(bytes(8) + b"{}" * 200),
    ],
    ids=["other content", "same size, other order", "no index", "cut index", "empty header"],
)
def test_an_index_that_is_not_the_shards_is_made_anew(shard, change, scans):
    index_shard(shard)
    change(shard)
    assert index_shard(shard).fingerprint() == layout_of(shard)
    assert len(scans) == 2
    assert contents(index_shard(shard))[0][0].key == Source("s", [index_shard(shard)]).sample(0).key


def test_where_nothing_can_be_written_beside_the_shard_the_index_lies_in_the_cache(shard, tmp_path, scans, monkeypatch):
    write = index_file.write_whole

    def read_only(path, data, **options):
        if path.parent == shard.parent:
            raise PermissionError("read-only")
        write(path, data, **options)

    monkeypatch.setattr(index_file, "write_whole", read_only)
    expected = contents(index_shard(shard, tmp_path / "cache"))
    assert contents(index_shard(shard, tmp_path / "cache")) == expected
    assert len(scans) == 1
    (tmp_path / "file").touch()
    assert contents(index_shard(shard, tmp_path / "file")) == expected  # no cache either: in memory


def test_a_shard_that_changes_while_it_is_in_use_is_found_out(shard):
    source = Source("s", [index_shard(shard)])
    write_tar(shard, [("y" * 3 + ".json", b"12345678901")])
    with pytest.raises(UserError, match="changed while it was in use"):
        source.read(20, "json")


def test_few_shards_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 3)
    paths = [write_tar(tmp_path / f"{i}.tar", [(f"k{i}.txt", str(i).encode())]) for i in range(8)]
    source = Source("s", [index_shard(path) for path in paths])
    gc.collect()  # sources of earlier tests
    before = len(os.listdir("/proc/self/fd"))
    assert [source.read(i, "txt") for i in (*range(8), 0)] == [str(i).encode() for i in (*range(8), 0)]
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    del source
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_source_goes_to_another_process_without_its_descriptors(shard):
    source = Source("s", [index_shard(shard)])
    source.read(0, "json")
    assert pickle.loads(pickle.dumps(source)).read(5, "json") == copy.copy(source).read(5, "json") == b"5 json"


@pytest.mark.parametrize("size", [1, 7, 16])
def test_blocks_cover_every_sample_once(size):
    counts = np.array([5, 40, 1, 16, 33])
    expected = []
    for start, end in zip(np.cumsum(counts) - counts, np.cumsum(counts), strict=True):
        expected += [(first, min(first + size, end)) for first in range(start, end, size)]
    assert list(Blocks(counts, size)) == expected
    with pytest.raises(IndexError):
        Blocks(counts, size)[len(expected)]


def test_unusual_names_come_back_as_they_are(tmp_path):
    names = ["a/b.json", "ü.json", "n" * 150 + ".json", "../../etc/passwd.json", "/abs.json", "KEY.JSON"]
    source = Source("s", [index_shard(write_tar(tmp_path / "a.tar", [(n, n.encode()) for n in names]))])
    assert [source.sample(i).key for i in range(len(names))] == [
        "a/b",
        "ü",
        "n" * 150,
        "../../etc/passwd",
        "abs",
        "KEY",
    ]
    assert [source.read(i, "json").decode() for i in range(len(names))] == names


def test_names_in_messages_hold_no_line_breaks_and_no_terminal_commands(tmp_path):
    name = os.fsdecode(b"a\nERROR \x1b[2J caf\xe9")
    source = Source("s", [index_shard(write_tar(tmp_path / "a.tar", [(f"{name}.json", b"{}")]))])
    assert source.sample(0).key == name
    assert source.where(0).endswith(r"a.tar: a\nERROR \x1b[2J caf\udce9")


def test_links_and_devices_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("l.json", tarfile.SYMTYPE), ("h.json", tarfile.LNKTYPE), ("d.json", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("x.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    assert len(Source("s", [index_shard(tmp_path / "a.tar")])) == 1


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_the_index_knows_a_member_by_the_header_before_its_first_byte(tmp_path, form):
    """The block that reading looks at, however tarfile finds it and however long the names are."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for name in ("x.json", "y" * 300 + ".json", "z.json"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
    index, content = index_shard(path).load_index(), path.read_bytes()
    assert index.header.tolist() == [header_hash(content[end - BLOCK : end]) for end in index.offset.tolist()]
    assert len(set(index.header.tolist())) == 3


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
@pytest.mark.parametrize("size", [8 << 30, -1])
def test_nothing_is_read_at_the_size_that_a_damaged_header_claims(tmp_path, monkeypatch, kind, size):
    good, bad = tarfile.TarInfo("x.json"), tarfile.TarInfo("y")
    good.size, bad.size, bad.type = 2, size, kind
    header = good.tobuf(tarfile.GNU_FORMAT) + b"{}".ljust(BLOCK, b"\0") + bad.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(header + bytes(10 * BLOCK))
    reads = []
    with (tmp_path / "a.tar").open("rb") as file:
        read = file.read
        watched = SimpleNamespace(seek=file.seek, tell=file.tell, read=lambda size: reads.append(size) or read(size))
        members = members_of(watched, 13 * BLOCK)
        assert next(members).key == "x"
        with pytest.raises(BrokenTarError, match=f"the header at byte {2 * BLOCK} is damaged"):
            next(members)
    assert all(0 <= size <= MAX_NAME_BYTES for size in reads)


def test_a_member_that_claims_20_gib_is_where_the_tar_ends(tmp_path):
    info = tarfile.TarInfo("x.json")
    info.size = 20 << 30
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_000))
    with pytest.raises(UserError, match="ends inside member 'x.json', after 10000 of 21474836480 bytes"):
        index_shard(tmp_path / "a.tar")


@pytest.fixture
def descriptors():
    """Sets how many files this process may have open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda number: resource.setrlimit(resource.RLIMIT_NOFILE, (number, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def many_sources(folder, sources=3, shards=40):
    paths = [folder / f"{s}-{i}.tar" for s in range(sources) for i in range(shards)]
    for number, path in enumerate(paths):
        write_tar(path, [("k.txt", str(number).encode())])
    indexed = [index_shard(path) for path in paths]
    return [Source(str(s), indexed[s * shards : (s + 1) * shards]) for s in range(sources)]


def read_all(sources):
    return [int(source.read(number, "txt")) for source in sources for number in range(len(source))]


def test_all_sources_of_a_process_share_a_quarter_of_its_descriptors(tmp_path, descriptors):
    sources = many_sources(tmp_path)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    descriptors(max(64, before + 40))
    assert read_all(sources) == list(range(120))
    assert len(os.listdir("/proc/self/fd")) <= before + max(64, before + 40) // 4
    for limit, expected in ((2, 1), (256, 64), (1024, 256), (4096, 256)):
        descriptors(limit)
        assert shards.most_open_shards() == expected


def test_where_others_took_the_descriptors_shards_are_put_away_for_each_other(tmp_path, descriptors, monkeypatch):
    sources = many_sources(tmp_path)
    monkeypatch.setattr(shards, "most_open_shards", lambda: 1000)
    gc.collect()
    descriptors(max(map(int, os.listdir("/proc/self/fd"))) + 8)
    assert read_all(sources) == list(range(120))


def test_running_out_of_descriptors_is_named_as_that(tmp_path, descriptors):
    (source,) = many_sources(tmp_path, 1, 1)
    held = [os.open(os.devnull, os.O_RDONLY)]
    descriptors(held[0] + 20)
    try:
        with contextlib.suppress(OSError):  # when none is left; some below the limit may have been in use before
            held += (os.open(os.devnull, os.O_RDONLY) for _ in range(20))
        with pytest.raises(UserError, match=r"0-0\.tar: cannot be opened: this process may open no more files; raise"):
            source.read(0, "txt")
        with pytest.raises(UserError, match=r"\*\.tar: .* cannot be listed: this process may open no more files"):
            expand_paths(f"{tmp_path}/*.tar")
    finally:
        for descriptor in held:
            os.close(descriptor)
    assert Path(f"{tmp_path}/0-0.tar.index").exists()
    assert source.read(0, "txt") == b"0"


def test_a_descriptor_that_fails_is_opened_anew(tmp_path, shard):
    """As after a server's restart, when old handles are stale and the path is well."""
    source = Source("s", [index_shard(shard)])
    assert source.read(3, "json") == b"3 json"
    folder = os.open(tmp_path, os.O_RDONLY)
    os.dup2(folder, shards.AT_HAND.look(source, 0).file.fileno())  # reading it is an error from now on
    os.close(folder)
    assert source.read(4, "json") == b"4 json"


def test_a_shard_that_went_away_can_be_named(shard):
    source = Source("s", [index_shard(shard)])
    shard.unlink()
    assert source.where(7) == f"{shard}: 0007"
    with pytest.raises(FileNotFoundError):
        source.read(7, "json")
    source = Source("s", source.shards)
    Path(f"{shard}.index").unlink()
    assert source.where(7) == f"{shard}: sample 7"
    with pytest.raises(FileNotFoundError):
        source.sample(7)


def test_opening_many_shards_does_not_wait_for_the_disk_for_each(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: pytest.fail("an index is made again when it is damaged"))
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"a"), ("a.jpg", b"b")])
    index_shard(path)
    assert (tmp_path / "a.tar.index").exists()
