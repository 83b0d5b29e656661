"""Odd and broken tars cost the same in check, build and training, and what they cost is said."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import tarfile
from collections import Counter

import pytest

from lcl_ds.data.corpora.check import check_shard
from lcl_ds.data.corpora.tars import read_tar
from lcl_ds.data.corpus import open_data
from lcl_ds.data.documents import BadSampleError, read_document
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.errors import UserError
from tests.support.corpora import picture
from tests.support.tars import write_tar


def pairs(*numbers):
    return [(f"{n:04d}.{suffix}", data) for n in numbers for suffix, data in (("jpg", picture(n)), ("txt", b"a cat"))]


def lost_in_training(path):
    """Keys that training reads, and reasons of the samples that it leaves out."""
    source = Source("s", [index_shard(path)])
    keys, reasons = [], Counter()
    for number in range(len(source)):
        try:
            read_document(source, number)
            assert all(source.read(number, suffix) for suffix in source.sample(number).members)
            keys.append(source.sample(number).key)
        except BadSampleError as problem:
            reasons[problem.reason] += 1
    return keys, dict(reasons)


def lost_in_build(path):
    """The same of what build reads."""
    samples = list(read_tar(path))
    reasons = Counter(str(content) for _, content in samples if isinstance(content, BadSampleError))
    return [key for key, content in samples if not isinstance(content, BadSampleError)], dict(reasons)


def lost_everywhere(path):
    """What is lost, which must be the same in training, build and check."""
    keys, reasons = lost_in_training(path)
    report = check_shard(str(path))
    assert lost_in_build(path) == (keys, reasons)
    assert report["reasons"] == reasons
    assert report["images"] == len(keys)
    return keys, reasons


@pytest.mark.parametrize("form", [["--format=gnu"], *(["--sparse-version", v] for v in ("0.0", "0.1", "1.0"))])
def test_a_file_with_a_hole_costs_its_own_sample(tmp_path, form):
    for name, data in pairs(0, 1, 2, 3):
        (tmp_path / name).write_bytes(data)
    for name in ("0001.png", "0002_note.bin"):  # a member of a sample, and one that is a sample of its own
        with (tmp_path / name).open("wb") as file:
            file.seek(1 << 29)  # far more than a member may have, when unpacked
            file.write(b"x")
    names = sorted(path.name for path in tmp_path.iterdir())
    subprocess.run(["tar", "-S", *form, "-cf", "a.tar", *names], cwd=tmp_path, check=True)
    keys, reasons = lost_everywhere(tmp_path / "a.tar")
    assert keys == ["0000", "0002", "0003"]
    assert reasons == {"a member stored as a sparse file": 2}


def test_a_huge_member_costs_its_own_sample(tmp_path):
    path = tmp_path / "a.tar"
    huge = tarfile.TarInfo("0001.tif")
    huge.size = (1 << 28) + 1
    write_tar(path, pairs(0))
    with path.open("r+b") as file:
        file.seek(len(archive_without_end(path)))
        file.write(huge.tobuf())
        file.seek(huge.size + -huge.size % 512, io.SEEK_CUR)
        file.write(write_tar(tmp_path / "b.tar", pairs(1, 2)).read_bytes())
    assert lost_everywhere(path) == (["0000", "0002"], {"a member larger than 256 MiB": 1})


def archive_without_end(path):
    with tarfile.open(path) as tar:
        tar.getmembers()
        return path.read_bytes()[: tar.offset]


def test_a_member_that_is_there_twice_costs_its_own_sample(tmp_path):
    twice = [*pairs(0, 1), ("0001.jpg", picture(7)), *pairs(2)]
    keys, reasons = lost_everywhere(write_tar(tmp_path / "a.tar", twice))
    assert (keys, reasons) == (["0000", "0002"], {"a sample with two members of one suffix": 1})
    subprocess.run(["touch", "0000.jpg"], cwd=tmp_path, check=True)
    write_tar(tmp_path / "b.tar", pairs(0, 1, 2))
    subprocess.run(["tar", "-rf", "b.tar", "0000.jpg"], cwd=tmp_path, check=True)  # a newer one, far behind
    assert lost_everywhere(tmp_path / "b.tar")[0] == ["0001", "0002"]


def test_a_tar_sorted_by_suffix_is_named_as_that_once_per_sample(tmp_path):
    members = sorted(pairs(*range(4)), key=lambda member: member[0][::-1])
    keys, reasons = lost_everywhere(write_tar(tmp_path / "a.tar", [*members, *pairs(9)]))
    assert keys == ["0009"]
    assert reasons == {"a sample whose members are not neighbours in the tar (sort the tar's members by name)": 4}


def test_tars_one_behind_the_other_are_all_read(tmp_path, caplog):
    one, two, three = (write_tar(tmp_path / f"{n}.tar", pairs(n, n + 1)).read_bytes() for n in (0, 2, 4))
    path = tmp_path / "all.tar"
    path.write_bytes(one + two + bytes(700) + three)
    assert lost_everywhere(path) == (["0000", "0001", "0002", "0003", "0004", "0005"], {})
    assert "3 tars joined end to end" in caplog.text
    path.write_bytes(one + one)  # keys of one tar have nothing to do with those of another
    assert lost_in_training(path) == lost_in_build(path) == (["0000", "0001"] * 2, {})
    path.write_bytes(one + write_tar(tmp_path / "png.tar", [("0000.png", picture(3)), *pairs(0)[1:]]).read_bytes())
    assert lost_in_training(path) == lost_in_build(path) == (["0000", "0001", "0000"], {})


def refusal(path):
    with pytest.raises(UserError) as error:
        index_shard(path)
    (sentence,) = error.value.problems
    assert str(path) in sentence
    return sentence


@pytest.mark.parametrize("junk", [b"\n", b"<html>", bytes(5000) + b"x" * 5000])
def test_bytes_behind_the_end_that_are_no_tar_are_told_with_their_number(tmp_path, junk):
    path = write_tar(tmp_path / "a.tar", pairs(0, 1))
    path.write_bytes(path.read_bytes() + junk)
    sentence = f"{len(junk.lstrip(bytes(1)))} bytes after its end mark are not a tar and were not read"
    assert sentence in refusal(path)
    assert lost_in_build(path) == (["0000", "0001"], {sentence: 1})
    report = check_shard(str(path))
    assert (report["samples"], report["images"], report["problem_count"]) == (2, 2, 1)
    assert sentence in report["problems"][0]["reason"]


def test_zeros_where_the_tail_should_be_are_told_from_padding(tmp_path):
    """As a download leaves that was given its full length at once and never finished."""
    path = write_tar(tmp_path / "a.tar", pairs(*range(40)))
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmember("0005.jpg").offset
    path.write_bytes(data[:end] + bytes(len(data) - end))
    sentence = f"{len(data) - end} zero bytes follow its end mark, so that its tail seems to be lost"
    assert sentence in refusal(path)
    assert lost_in_build(path) == ([f"{n:04d}" for n in range(5)], {sentence: 1})
    path.write_bytes(bytes(1_000_000))
    assert "1000000 zero bytes follow its end mark" in refusal(path)
    for name, blocks in (("b.tar", 64), ("c.tar", 2048)):
        for member, content in pairs(0, 1):
            (tmp_path / member).write_bytes(content)
        names = sorted(file.name for file in tmp_path.glob("000*"))
        subprocess.run(["tar", "-b", str(blocks), "-cf", name, *names], cwd=tmp_path, check=True)
        assert lost_everywhere(tmp_path / name) == (["0000", "0001"], {})


def test_a_broken_header_costs_the_sample_before_it_and_the_bytes_behind_it(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(0, 1, 2, 3))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        position = tar.getmember("0002.jpg").offset
    data[position + 3] ^= 1
    path.write_bytes(data)
    sentence = f"the header at byte {position} is damaged; {len(data) - position} bytes from there on were not read"
    assert sentence in refusal(path)
    # Whether the sample before it had a further member is not known.
    lost = {"a tar that is cut short or damaged": 1, sentence: 1}
    assert lost_in_build(path) == (["0000"], lost)
    report = check_shard(str(path))
    assert (report["samples"], report["images"], report["problem_count"]) == (2, 1, 2)


def test_a_cut_costs_the_sample_that_is_cut_and_no_other(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(0, 1, 2, 3))
    with tarfile.open(path) as tar:
        member = tar.getmember("0002.jpg")
    path.write_bytes(path.read_bytes()[: member.offset_data + 100])
    sentence = f"it is cut: the file ends inside member '0002.jpg', after 100 of {member.size} bytes"
    assert sentence in refusal(path)
    assert lost_in_build(path) == (["0000", "0001"], {"a tar that is cut short or damaged": 1})
    report = check_shard(str(path))
    assert (report["images"], report["problem_count"]) == (2, 1)
    assert sentence in report["problems"][0]["reason"]


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (gzip.compress, "compressed with gzip; unpack it"),
        (bz2.compress, "compressed with bzip2; unpack it"),
        (lzma.compress, "compressed with xz; unpack it"),
        (lambda data: b"\n<html><body>503", "an HTML or XML page"),
        (lambda data: b"PAR1" + bytes(600), "a Parquet file"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (lambda data: b"", "it is empty"),
        (lambda data: b"\x01" * 600, "does not begin with a tar header"),
    ],
)
def test_what_is_no_tar_is_called_what_it_is(tmp_path, make, what):
    path = write_tar(tmp_path / "a.tar.gz", pairs(0, 1))
    path.write_bytes(make(path.read_bytes()))
    assert what in refusal(path)
    assert what in check_shard(str(path))["problems"][0]["reason"]
    with pytest.raises(UserError, match=what):
        list(read_tar(path))


def hostile_header(**pax):
    info = tarfile.TarInfo("x.json")
    info.pax_headers = pax
    return info.tobuf(tarfile.PAX_FORMAT)


def base_256(size):
    block = bytearray(tarfile.TarInfo("x.json").tobuf())
    block[124:136] = size.to_bytes(12, "big", signed=True)
    block[124] |= 0x80
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return bytes(block)


@pytest.mark.parametrize(
    "header",
    [
        base_256(-1024),
        hostile_header(size="-1024"),
        b"".join(hostile_header(path="y")[:1024] for _ in range(3000)),
        hostile_header(**{"GNU.sparse.map": "x"}),
        tarfile.TarInfo._create_header(  # a name of 1 TiB
            {"name": "././@LongLink", "type": b"L", "size": 1 << 40, "magic": tarfile.GNU_MAGIC},
            tarfile.GNU_FORMAT,
            "utf-8",
            "strict",
        ),
    ],
    ids=["negative size", "negative size in PAX", "nested headers", "sparse map", "huge name"],
)
def test_headers_that_lead_astray_end_the_tar(tmp_path, header):
    path = tmp_path / "a.tar"
    rest = write_tar(tmp_path / "rest.tar", pairs(1, 2)).read_bytes()
    path.write_bytes(archive_without_end(write_tar(tmp_path / "b.tar", pairs(0))) + header + rest)
    assert "is damaged;" in refusal(path)
    assert lost_in_build(path)[0] == []
    path.write_bytes(header)
    refusal(path)


def test_an_empty_shard_is_passed_over_in_training_with_a_warning(tmp_path, demo_folder, caplog):
    from lcl_ds.config import load_config, recipe_path

    write_tar(tmp_path / "0.tar", [])
    write_tar(tmp_path / "1.tar", pairs(0, 1))

    def opened(*names):
        shards = json.dumps([{"name": "mine", "paths": [f"{tmp_path}/{name}" for name in names]}])
        overrides = [f"data.tokenizer={demo_folder}/tokenizer", "data.demo=null", f"data.shards={shards}"]
        return open_data(load_config(recipe_path("demo"), overrides).data).sources[0]

    assert len(opened("0.tar", "1.tar")) == 2
    assert f"mine: shard {tmp_path}/0.tar: it holds no samples and is passed over" in caplog.text
    with pytest.raises(UserError, match="0.tar: it holds no samples"):
        opened("0.tar")
