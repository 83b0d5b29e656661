"""Images that records name: each record gets the file that its name stands for, or a reason why it gets none."""

import os
import tarfile

import pytest

from lcl_ds.data.corpora.local_images import AMBIGUOUS, NOT_THERE, open_images, url_digest
from lcl_ds.data.documents import BadSampleError
from lcl_ds.errors import UserError
from tests.support.corpora import picture, url_of
from tests.support.tars import write_tar

A, B, C = picture(1), picture(2), picture(3)


@pytest.fixture
def pack(tmp_path):
    """Packs members for ``--images``: into a tar, or as loose files."""

    def make(kind, members, name="images"):
        if kind == "tar":
            return write_tar(tmp_path / f"{name}.tar", members)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for member, data in members:
            (folder / member).parent.mkdir(parents=True, exist_ok=True)
            (folder / member).write_bytes(data)
        return folder

    return make


def images_of(tmp_path, *paths, **options):
    return open_images(paths, tmp_path / "work", **options)[0]


def reason(images, name, url=None):
    with pytest.raises(BadSampleError) as caught:
        images.find(name, url)
    return caught.value.reason


BOTH = pytest.mark.parametrize("kind", ["tar", "folder"])


@BOTH
@pytest.mark.parametrize("odd", ["", "photo.of.", "50%", "a#b?", "[1] {2}", "čaj ", "line\nbreak", "UPPER."])
def test_names_are_compared_whole(kind, odd, pack, tmp_path):
    images = images_of(tmp_path, pack(kind, [(f"a/{odd}1.jpg", A), (f"b/{odd}1.jpg", B), ("c/x.y/2.PNG", C)]))
    assert images.find(f"a/{odd}1.jpg", None) == A
    assert images.find(f"./b//{odd}1.jpg", None) == B
    assert images.find("c/x.y/2.PNG", None) == C
    for other in (
        f"c/{odd}1.jpg",
        f"a/{odd}2.jpg",
        f"{odd}11.jpg",
        "2.png",
        "1",
        "",
        "/",
        ".",
        "..",
        "a",
        "a/",
        "c/x.y",
    ):
        assert reason(images, other) in (NOT_THERE, AMBIGUOUS)


@BOTH
@pytest.mark.parametrize("suffix", ["", ".jpg", ".webp"])
def test_files_may_be_named_by_the_hash_of_their_url(kind, suffix, pack, tmp_path):
    images = images_of(tmp_path, pack(kind, [(url_digest(url_of(1)) + suffix, A), (f"0123{suffix}", B)]))
    assert images.find(None, url_of(1)) == A
    assert images.find(None, url_of(2), "0123") == B
    assert reason(images, None, url_of(2)) == NOT_THERE
    assert reason(images, "none.jpg", url_of(2)) == NOT_THERE


def test_a_tar_may_have_been_packed_further_up_or_further_down(pack, tmp_path):
    members = [("data/a/1.jpg", A), ("data/b/1.jpg", B), ("data/b/2.jpg", C)]
    images = images_of(tmp_path, pack("tar", members))
    assert images.find("a/1.jpg", None) == images.find("corpus/data/a/1.jpg", None) == A
    assert images.find("2.jpg", None) == C
    assert reason(images, "1.jpg") == AMBIGUOUS
    assert reason(images, "c/2.jpg") == NOT_THERE  # another folder is another file
    assert reason(images, "c/1.jpg") == NOT_THERE


def test_a_tar_without_folders_is_matched_by_base_names_where_these_are_unique(pack, tmp_path):
    first = pack("tar", [("1.jpg", A), ("2.jpg", B)], "first")
    second = pack("tar", [("2.jpg", C)], "second")
    images = images_of(tmp_path, first, second)
    assert images.find("a/1.jpg", None) == A
    assert reason(images, "a/2.jpg") == AMBIGUOUS
    assert images.find("2.jpg", None) == B  # its whole name: the first place that has it


def test_an_ambiguous_name_may_be_decided_by_the_url(pack, tmp_path):
    about = b'{"url": "' + url_of(1).encode() + b'"}'
    images = images_of(tmp_path, pack("tar", [("a/1.jpg", A), ("a/1.json", about), ("b/1.jpg", B)]))
    assert images.find("1.jpg", url_of(1)) == A
    assert reason(images, "1.jpg", url_of(2)) == AMBIGUOUS
    assert reason(images, None, url_of(2)) == NOT_THERE
    assert reason(images, 7, float("nan")) == NOT_THERE


def test_loose_files_and_the_tar_that_lies_beside_them_are_both_used(pack, tmp_path):
    folder = pack("folder", [("a/1.jpg", A), ("not a tar.tar/x", b"")])
    pack("tar", [("a/1.jpg", B), ("a/2.jpg", C)], "images/z")
    other = pack("tar", [("a/1.jpg", C), ("a/2.jpg", A)], "other")
    images = images_of(tmp_path, other, folder)
    assert images.find("a/1.jpg", None) == A  # loose ones first,
    assert images.find("a/2.jpg", None) == A  # then tars in the order in which they were named
    assert images_of(tmp_path, folder, other).find("a/2.jpg", None) == C


def test_within_a_tar_the_last_of_one_name_counts_as_after_unpacking(pack, tmp_path):
    images = images_of(tmp_path, pack("tar", [("1.jpg", A), ("2.jpg", C), ("1.jpg", B)]))
    assert images.find("1.jpg", None) == B


def test_names_that_lead_elsewhere_or_that_no_file_can_have_find_nothing(pack, tmp_path):
    (tmp_path / "secret.jpg").write_bytes(A)
    folder = pack("folder", [("1.jpg", A)])
    (folder / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "round.jpg").symlink_to(folder / "round.jpg")
    os.mkfifo(folder / "pipe.jpg")
    tar = pack("tar", [("../secret.jpg", B), ("/etc/x.jpg", C)])
    images = images_of(tmp_path, folder, tar)
    odd = [
        "../secret.jpg",
        "/etc/passwd",
        "out.jpg",
        "round.jpg",
        "pipe.jpg",
        "nul\0.jpg",
        "\ud83d.jpg",
        "x" * 5000,
        "1.jpg/x",
    ]
    assert {reason(images, name) for name in odd} == {NOT_THERE}
    assert images.find("etc/x.jpg", None) == C


def test_names_that_are_not_utf8_are_found(tmp_path):
    with tarfile.open(tmp_path / "latin.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        tar.add(_file(tmp_path / "x", A), "café/1.jpg")
    folder = os.fsencode(tmp_path) + b"/caf\xe9 images"
    os.makedirs(folder + b"/caf\xe9")
    _file(folder + b"/caf\xe9/2.jpg", B)
    os.rename(tmp_path / "latin.tar", folder + b"/\xff.tar")
    images = images_of(tmp_path, type(tmp_path)(os.fsdecode(folder)))
    assert images.find("caf\udce9/1.jpg", None) == A
    assert images.find("caf\udce9/2.jpg", None) == B


def _file(path, data):
    with open(path, "wb") as file:
        file.write(data)
    return path


@pytest.mark.parametrize(
    "name", ["50%25 off", "a?mode=rw", "a#b", "[/x] {a,b}", "line\nbreak", "'; DROP TABLE names; --"]
)
def test_the_index_may_lie_under_any_path(name, pack, tmp_path):
    work = tmp_path / name
    images, _ = open_images([pack("tar", [("1.jpg", A)])], work)
    assert images.find("1.jpg", None) == A


def test_a_tar_that_is_repaired_in_place_is_indexed_again(pack, tmp_path):
    tar = pack("tar", [("1.jpg", A), ("2.jpg", B)])
    assert images_of(tmp_path, tar).find("1.jpg", None) == A
    size = tar.stat().st_size
    pack("tar", [("2.jpg", A), ("1.jpg", B)])
    assert tar.stat().st_size == size
    os.utime(tar, ns=(0, 12345))
    assert images_of(tmp_path, tar).find("1.jpg", None) == B


def test_tars_that_lie_one_behind_the_other_are_all_read(pack, tmp_path):
    first, second = pack("tar", [("1.jpg", A)], "first"), pack("tar", [("2.jpg", B)], "second")
    (tmp_path / "both.tar").write_bytes(first.read_bytes() + second.read_bytes())
    images = images_of(tmp_path, tmp_path / "both.tar")
    assert (images.find("1.jpg", None), images.find("2.jpg", None)) == (A, B)


def test_of_a_damaged_tar_what_is_whole_is_used_when_that_is_asked_for(pack, tmp_path):
    tar = pack("tar", [("1.jpg", A), ("2.jpg", B)])
    tar.write_bytes(tar.read_bytes()[: 3 * 512 + 700])
    with pytest.raises(UserError, match=r"images\.tar: cannot be read to its end(.|\n)*--skip-unreadable"):
        open_images([tar], tmp_path / "work")
    images, problems = open_images([tar], tmp_path / "work", skip_unreadable=True)
    assert images.find("1.jpg", None) == A
    assert reason(images, "2.jpg") == NOT_THERE
    assert len(problems) == 1


def test_a_place_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="--images .*none: no such file or folder"):
        open_images([tmp_path / "none"], tmp_path / "work")
