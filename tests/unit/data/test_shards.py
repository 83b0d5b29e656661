"""Tars as random-access collections."""

import io
import tarfile

import pytest

from lcl_ds.data.shards import Source, expand_paths, index_shard
from lcl_ds.errors import UserError


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shard(tmp_path):
    members = [(f"{i:04d}.{suffix}", f"{i} {suffix}".encode()) for i in range(40) for suffix in ("json", "000.jpg")]
    return write_tar(tmp_path / "a.tar", members)


def test_samples_are_read_by_number_and_suffix(shard):
    source = Source("s", [index_shard(shard)], block_samples=16)
    assert len(source) == 40
    assert source.read(17, "000.jpg") == b"17 000.jpg"
    assert source.blocks == [(0, 16), (16, 32), (32, 40)]
    assert source.where(3) == f"{shard}: 0003"


def test_blocks_do_not_cross_shards(tmp_path, shard):
    other = write_tar(tmp_path / "b.tar", [("x.txt", b"1"), ("y.txt", b"2")])
    source = Source("s", [index_shard(shard), index_shard(other)], block_samples=32)
    assert source.blocks == [(0, 32), (32, 40), (40, 42)]
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


def test_a_sample_with_two_members_of_one_suffix_is_refused(tmp_path):
    with pytest.raises(UserError, match="two members"):
        index_shard(write_tar(tmp_path / "a.tar", [("x.txt", b"1"), ("x.txt", b"2")]))


def test_paths_expand_globs_and_braces_in_order(tmp_path):
    for i in range(12):
        (tmp_path / f"{i:02d}.tar").touch()
    assert [p.name for p in expand_paths(f"{tmp_path}/{{03..05}}.tar")] == ["03.tar", "04.tar", "05.tar"]
    assert len(expand_paths([f"{tmp_path}/0*.tar", f"{tmp_path}/01.tar"])) == 10


@pytest.mark.parametrize("pattern", ["none.tar", "none-*.tar", "{00..12}.tar"])
def test_a_path_that_matches_nothing_is_named(tmp_path, pattern):
    for i in range(12):
        (tmp_path / f"{i:02d}.tar").touch()
    with pytest.raises(UserError, match="no such file"):
        expand_paths(f"{tmp_path}/{pattern}")


def test_the_fingerprint_changes_with_the_layout(tmp_path, shard):
    before = index_shard(shard).fingerprint()
    assert index_shard(shard).fingerprint() == before
    write_tar(shard, [("x.txt", b"1")])
    assert index_shard(shard).fingerprint() != before
