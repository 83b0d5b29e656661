"""Files are whole or not there, and the machine's errors are sentences with a path."""

import errno
import glob
import os
import signal
import stat
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from lcl_ds.cli import INTERRUPTED, USER_ERROR, run_command
from lcl_ds.errors import UserError
from lcl_ds.files import (
    check_writable,
    plain_name,
    read_json,
    read_yaml,
    sentence_of,
    whole_folder,
    write_whole,
    writing,
)
from tests.support.disks import no_file_larger_than


def test_a_file_replaces_another_whole_and_has_the_mode_of_the_umask(tmp_path):
    path = tmp_path / "a b[0].json"
    path.write_text("old")
    before = os.umask(0o027)
    try:
        write_whole(path, "new \u00fc")
    finally:
        os.umask(before)
    assert path.read_text(encoding="utf-8") == "new \u00fc"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_text_with_names_that_are_not_unicode_can_be_written(tmp_path):
    write_whole(tmp_path / "page", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "page").read_bytes() == b"caf\\udce9"


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "index"
    path.write_text("old")
    with no_file_larger_than(1 << 16), pytest.raises(OSError, match="File too large") as failure:
        write_whole(path, bytes(1 << 20))
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["index"]
    assert str(path) in (sentence_of(failure.value) or "")


def test_a_folder_appears_when_all_of_it_is_written(tmp_path):
    out = tmp_path / "release"
    out.mkdir()  # an empty folder is as good as none
    with whole_folder(out) as partial:
        (partial / "model").write_text("weights")
        assert not any(out.iterdir())
    assert [path.name for path in out.iterdir()] == ["model"]
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_a_folder_whose_writing_fails_is_not_there(tmp_path):
    def release() -> None:
        with whole_folder(tmp_path / "new" / "release") as partial:
            (partial / "config").write_text("settings")
            (partial / "model").write_bytes(bytes(1 << 20))

    with no_file_larger_than(1 << 16), pytest.raises(OSError, match="File too large"):
        release()
    assert list(tmp_path.iterdir()) == []  # nor are the parents that were made for it


def test_a_folder_is_not_written_over_what_is_there(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, what in (("file", "is a file"), ("full", "is not empty"), ("dangling", "is a file")):
        with pytest.raises(UserError, match=what), whole_folder(tmp_path / name):
            raise AssertionError("the block must not run")


def test_a_folder_that_cannot_be_made_is_said_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "folder")
    with pytest.raises(UserError, match=r"file/folder: cannot be written to: .*: a part of the path is a file"):
        check_writable(tmp_path / "file" / "folder")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe{", b"[" * 100_000, b"\0" * 40])
def test_damaged_json_and_yaml_are_named(tmp_path, data):
    path = tmp_path / "settings"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path}: is not valid JSON"):
        read_json(path)
    if data:  # an empty YAML file is valid and holds nothing
        with pytest.raises(UserError, match=f"{path}: is not valid YAML"):
            read_yaml(path)


def test_a_command_ends_with_a_sentence_where_the_machine_is_at_fault(tmp_path, capsys):
    missing = tmp_path / "no folder [x]" / "report.json"
    assert run_command(lambda: missing.write_text("")) == USER_ERROR
    sentence = f"{missing}: there is no such file or folder; make it or correct the path"
    assert capsys.readouterr().err == f"error: {sentence}\n"

    def full() -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/out")

    assert run_command(full) == USER_ERROR
    assert capsys.readouterr().err.startswith("error: /data/out: no space is left on the disk; ")

    def interrupted() -> int:
        raise KeyboardInterrupt

    assert run_command(interrupted) == INTERRUPTED
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_command_does_not_hide_our_own_mistakes():
    for mistake in (KeyError("x"), OSError("without a number"), ValueError("y")):

        def fail(mistake: Exception = mistake) -> int:
            raise mistake

        with pytest.raises(type(mistake)):
            run_command(fail)


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_a_sentence(capsys):
    def work() -> int:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(_killed).result()
        return 0

    assert run_command(work) == USER_ERROR
    assert "a worker process was killed" in capsys.readouterr().err


def test_names_that_are_not_unicode_can_be_printed(capfd):
    def show() -> int:
        print(os.fsdecode(b"caf\xe9.tar"))
        raise UserError(os.fsdecode(b"caf\xe9.tar: not there"))

    assert run_command(show) == USER_ERROR
    printed = capfd.readouterr()
    assert printed.out == "caf\\udce9.tar\n"
    assert printed.err == "error: caf\\udce9.tar: not there\n"


def test_a_file_written_piece_by_piece_is_put_in_place_at_the_end(tmp_path: Path):
    path = tmp_path / "shard.tar"
    with writing(path) as file:
        file.write(b"12")
        assert not path.exists()
        file.write(b"3")
    assert path.read_bytes() == b"123"


def test_a_folder_has_a_name_without_wildcards_and_foreign_bytes(tmp_path):
    for name in (b"plain", b"[1]", b"caf\xe9", b"a\nb"):
        folder = tmp_path / os.fsdecode(name)
        folder.mkdir()
        (folder / "file").write_text("text")
        with plain_name(folder) as plain:
            assert [Path(path).name for path in glob.glob(f"{plain}/*")] == ["file"]
            str(plain).encode()
            assert (plain == folder) == (name == b"plain")
        assert (folder / "file").read_text() == "text"
