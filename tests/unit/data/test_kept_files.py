"""Indices and copies that were kept: checked before they are believed, made again when they fail."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from lcl_ds.data.shards import scan
from lcl_ds.data.shards import shard as shard_module
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.storage import cached_name
from lcl_ds.data.shards.tar_members import Member
from lcl_ds.errors import UserError
from tests.support.disks import no_file_larger_than
from tests.support.ranks import ROOT
from tests.support.tars import write_tar

MEMBERS = [(f"{i:03d}.{suffix}", f"{i:03d} {suffix}".encode()) for i in range(12) for suffix in ("txt", "jpg")]


@pytest.fixture
def shard(tmp_path):
    return write_tar(tmp_path / "a.tar", MEMBERS)


def contents(*shards):
    """Every member as it is read through the indices."""
    source = Source("s", list(shards))
    samples = [source.sample(number) for number in range(len(source))]
    return [(f"{s.key}.{suffix}", source.read(n, suffix)) for n, s in enumerate(samples) for suffix in s.members]


@pytest.mark.parametrize("when", ["at the start", "while running"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-40] + bytes(40),
        lambda data: data[:-120] + bytes(120),
        lambda data: data[:-5],
        lambda data: data + b"x",
        lambda data: bytes(len(data)),
        lambda data: b"",
        lambda data: data[:8] + data[8:].replace(b"samples", b"sampler"),
        lambda data: data.replace(b": 12,", b": 13,"),
        lambda data: data.replace(b'"U32"', b'"I32"'),
        lambda data: data.replace(b'"version', b'"versiom'),
        lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    ],
)
def test_a_damaged_index_is_made_again_on_the_spot(shard, damage, when):
    path = Path(f"{shard}.index")
    indexed = index_shard(shard)
    good = path.read_bytes()
    assert damage(good) != good
    path.write_bytes(damage(good))
    if when == "at the start":
        indexed = index_shard(shard)
    assert contents(indexed) == MEMBERS
    assert path.read_bytes() == good


def test_bits_all_over_an_index_are_covered(shard, tmp_path):
    path = Path(f"{shard}.index")
    index_shard(shard)
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1 << position % 8]) + good[position + 1 :])
        assert contents(index_shard(shard, tmp_path / str(position))) == MEMBERS, position


def test_an_index_that_goes_away_is_made_again(shard, caplog):
    indexed = index_shard(shard)
    Path(f"{shard}.index").unlink()
    assert contents(indexed) == MEMBERS
    assert "its index was gone or damaged and was made again" in caplog.text


def test_somebody_elses_file_of_that_name_stays(shard, tmp_path, monkeypatch):
    other = Path(f"{shard}.index")
    other.write_text("0 512 jpg 000.jpg 0\n")  # as DALI's index files are
    assert contents(index_shard(shard, tmp_path / "cache")) == MEMBERS
    assert other.read_text() == "0 512 jpg 000.jpg 0\n"
    monkeypatch.setattr(shard_module, "scan_shard", lambda path: pytest.fail("the headers were read again"))
    assert contents(index_shard(shard, tmp_path / "cache")) == MEMBERS


@pytest.mark.parametrize("change", ["appended into the padding", "one of equal length in the middle"])
def test_an_index_of_the_tar_as_it_was_is_not_used(shard, change):
    indexed = index_shard(shard)
    size, source = shard.stat().st_size, Source("s", [indexed])
    if change == "appended into the padding":
        more = [*MEMBERS, ("012.txt", b"new"), ("012.jpg", b"new")]
        small = write_tar(shard, MEMBERS[:2])
        assert contents(index_shard(small)) == MEMBERS[:2]
        size = small.stat().st_size
        write_tar(small, more[:4])
        assert small.stat().st_size == size
        assert contents(index_shard(small)) == more[:4]
        return
    position = shard.read_bytes().index(b"003.jpg")
    with tarfile.open(shard) as tar:
        member = tar.getmember("003.jpg")
    member.name = "003.png"
    with shard.open("r+b") as file:
        file.seek(position)
        file.write(member.tobuf())
    with pytest.raises(UserError, match="changed while it was in use or since it was indexed"):
        source.read(3, "jpg")
    assert shard.stat().st_size == size
    now = [(name.replace("003.jpg", "003.png"), data) for name, data in MEMBERS]
    assert contents(index_shard(shard)) == now  # at the next start


def test_a_long_name_is_known_again(tmp_path):
    names = ["n" * 150, "ü" * 60, "d/" * 80 + "x", "x" * 300]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form) as tar:
            for name in names:
                tar.addfile(tarfile.TarInfo(f"{name}.txt"))
        assert [name for name, _ in contents(index_shard(path))] == [f"{name}.txt" for name in names]


def test_more_kinds_of_suffix_than_fit_into_two_bytes():
    """As where every file is named img.NUMBER.jpg, so that all are members of one sample."""
    builder = scan._Builder("a.tar")
    for number in range(66_000):
        builder.add(Member("img", f"{number}.jpg", number * 512, 1, 0))
    assert builder.index().member(0, "65999.jpg") == (65_999 * 512, 1, 0)


FULL = """
import sys, resource, signal
from lcl_ds.data.shards.shard import index_shard
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
shard = index_shard(sys.argv[1], Path(sys.argv[2]))
print(len(shard.load_index().key_end), shard.index is not None)
"""


def test_on_a_full_disk_the_index_stays_in_memory_and_nothing_is_left(shard, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", FULL, str(shard), str(tmp_path / "cache")]
    done = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True, check=True)
    assert done.stdout == "12 True\n"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "cache"]


def test_without_a_home_folder_the_index_lies_beside_the_shard(shard, monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    assert contents(index_shard(shard)) == MEMBERS
    with pytest.raises(UserError, match=r"no home folder .* data\.cache"):
        index_shard(f"pipe:cat {shard}")


class Command:
    """``pipe:`` of a file that changes."""

    def __init__(self, folder):
        self.output, self.cache = folder / "output", folder / "cache"
        self.text = f"pipe:cat {self.output}; echo ran >> {folder}/log"
        self.copy = self.cache / cached_name(self.text, ".tar")
        self.log = folder / "log"

    def gives(self, *members):
        write_tar(self.output, members)


@pytest.fixture
def command(tmp_path):
    return Command(tmp_path)


def test_output_that_is_no_whole_tar_is_not_kept(command):
    command.output.write_text("<html>503 try later")
    with pytest.raises(UserError, match="what the command wrote is not kept: it is an HTML or XML page"):
        index_shard(command.text, command.cache)
    command.gives(*MEMBERS)
    command.output.write_bytes(command.output.read_bytes()[:3000])
    with pytest.raises(UserError, match="not kept: it is cut"):
        index_shard(command.text, command.cache)
    assert [path.suffix for path in command.cache.iterdir()] == [".lock"]
    command.gives(*MEMBERS)
    assert contents(index_shard(command.text, command.cache)) == MEMBERS


def test_a_kept_copy_that_was_damaged_is_made_again(command):
    command.gives(*MEMBERS)
    index_shard(command.text, command.cache)
    command.copy.write_bytes(command.copy.read_bytes()[:3000])
    assert contents(index_shard(command.text, command.cache)) == MEMBERS


def test_a_copy_says_of_when_it_is_and_is_refreshed_by_check_or_by_removing_it(command):
    command.gives(*MEMBERS[:4])
    assert index_shard(command.text, command.cache).copied is None
    os.utime(command.copy, (1_700_000_000, 1_700_000_000))
    command.gives(*MEMBERS[:6])
    kept = index_shard(command.text, command.cache)
    assert (kept.copied or "").startswith("2023-11-1")
    assert contents(kept) == MEMBERS[:4]
    assert contents(index_shard(command.text, command.cache, rescan=True)) == MEMBERS[:6]
    command.gives(*MEMBERS[:8])
    command.copy.unlink()
    assert contents(index_shard(command.text, command.cache)) == MEMBERS[:8]
    assert command.log.read_text() == "ran\n" * 3


def test_what_killed_processes_left_of_a_copy_is_removed(command):
    command.gives(*MEMBERS)
    command.cache.mkdir()
    left = command.cache / f".{command.copy.name}.12345.partial"
    left.write_text("half")
    index_shard(command.text, command.cache)
    assert not left.exists()


def test_a_full_disk_ends_a_command_with_a_sentence_and_nothing_is_left(command, monkeypatch):
    command.gives(("a.jpg", bytes(1 << 20)))
    full = r"its output cannot be kept in .*larger than the system allows"
    with no_file_larger_than(1 << 16), pytest.raises(UserError, match=full):
        index_shard(command.text, command.cache)
    assert [path.suffix for path in command.cache.iterdir()] == [".lock"]


def test_the_index_is_plain_data(shard):
    """Only JSON and arrays: nothing of it is run."""
    index_shard(shard)
    data = Path(f"{shard}.index").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert set(header) == {
        "__metadata__", "first", "suffix", "offset", "size", "header", "keys", "key_end", "problem", "suffixes",
    }  # fmt: skip
