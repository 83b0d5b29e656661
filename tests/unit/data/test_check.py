"""``python -m lcl_ds.data check``: every byte of shards is read, and what is bad is named."""

import json

import pytest

from lcl_ds.data.__main__ import main
from lcl_ds.data.shards.shard import index_shard
from tests.support.corpora import picture
from tests.support.tars import write_tar


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
