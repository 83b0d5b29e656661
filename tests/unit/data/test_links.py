"""Addresses of images: listed for img2dataset, fetched, joined by a build, and what is dead said."""

import csv
import json

import pytest

from lcl_ds.data.__main__ import main
from lcl_ds.data.corpora.local_images import open_images
from tests.support.corpora import PARQUET, mmc4_record, parallel_record, picture, url_of
from tests.support.tars import write_tar


def listed(out):
    rows = [row for path in sorted(out.glob("*.csv")) for row in csv.DictReader(path.open(encoding="utf-8"))]
    return [row["url"] for row in rows]


def urls(*arguments):
    assert main(["urls", *map(str, arguments), "--workers", "1"]) == 0


def documents(folder, records, name="documents.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / name


@pytest.mark.parametrize("format", ["obelics", "omnicorpus", "mint-html"])
def test_every_address_of_a_corpus_is_listed_once(format, tmp_path):
    pytest.importorskip("pyarrow")
    corpus = PARQUET[format](tmp_path / "in")
    urls(*corpus.sources, tmp_path / "lists", "--format", format)
    assert listed(tmp_path / "lists") == [url_of(f"{n}_{i}") for n in range(5) for i in range(2)]


def test_of_mmc4_the_images_are_listed_that_its_rule_may_choose(tmp_path):
    path = documents(tmp_path / "in", [mmc4_record(n) for n in range(3)])
    urls(path, tmp_path / "lists", "--format", "mmc4")
    assert sorted(listed(tmp_path / "lists")) == sorted(url_of(f"{n}_{i}") for n in range(3) for i in range(3))
    urls(path, tmp_path / "all", "--format", "mmc4", "--min-similarity", "0")
    assert len(listed(tmp_path / "all")) == 12


def test_an_address_arrives_whole_whatever_is_in_it_and_what_is_none_is_counted(tmp_path, capsys):
    good = ['https://a.org/1,2.jpg?x="y"', "http://b.org/ä b.jpg", "HTTPS://C.ORG/3"]
    bad = ["data:image/png;base64,AAAA", "//d.org/4.jpg", "https://e.org/5\n6.jpg", "/local/7.jpg"]
    records = [{"texts": ["a", None], "images": [None, url]} for url in [*good, *bad, good[0]]]
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    urls(tmp_path / "a.parquet", tmp_path / "lists", "--format", "obelics")
    assert listed(tmp_path / "lists") == good
    from pyarrow import csv as arrow_csv  # what img2dataset reads lists with

    assert arrow_csv.read_csv(tmp_path / "lists" / "000000.csv").column("url").to_pylist() == good
    assert "4 of them cannot be fetched" in capsys.readouterr().out


def fetched(folder, urls, dead, as_files):
    """What img2dataset 1.47 leaves: images that arrived, as files or in tars, and a report of each of its shards."""
    folder.mkdir(parents=True)
    members = []
    for number, url in enumerate(urls):
        if url not in dead:
            about = {"key": f"{number:09d}", "status": "success", "error_message": None, "url": url, "exif": "{}"}
            members.append((f"{number:09d}.jpg", picture(number)))
            members.append((f"{number:09d}.json", json.dumps(about, indent=4).encode()))
    if as_files:
        (folder / "00000").mkdir()
        for name, data in members:
            (folder / "00000" / name).write_bytes(data)
    else:
        write_tar(folder / "00000.tar", members)
    counts = {"HTTP Error 404: Not Found": len(dead), "success": len(urls) - len(dead)}
    (folder / "00000_stats.json").write_text(json.dumps({"count": len(urls), "status_dict": counts}))
    return folder


@pytest.mark.parametrize("as_files", [False, True], ids=["tars", "files"])
def test_a_build_joins_what_was_fetched_and_the_rest_is_reported_and_listed_again(as_files, tmp_path, capsys):
    path = documents(tmp_path / "in", [parallel_record(n) for n in range(6)])
    urls(path, tmp_path / "lists", "--format", "jsonl")
    all_urls = listed(tmp_path / "lists")
    dead = {all_urls[1], all_urls[4], all_urls[5]}
    images = fetched(tmp_path / "images", all_urls, dead, as_files)
    command = ["build", str(path), str(tmp_path / "out"), "--format", "jsonl", "--images", str(images)]
    assert main([*command, "--workers", "1"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert sum(unit["images"] for unit in manifest["sources"]) == len(all_urls) - len(dead)
    assert manifest["skips"]["an image that is not there"] == len(dead)
    assert "HTTP Error 404: Not Found" in capsys.readouterr().out

    report = tmp_path / "report.json"
    urls(path, tmp_path / "again", "--format", "jsonl", "--images", images, "--json", report)
    assert set(listed(tmp_path / "again")) == dead
    assert json.loads(report.read_text()) == {
        "records": 6,
        "urls": 12,
        "there": 9,
        "listed": 3,
        "no_addresses": 0,
        "hosts": {"example.org": 3},
        "tried": {"HTTP Error 404: Not Found": 3, "success": 9},
    }


def test_each_image_is_that_of_its_address(tmp_path):
    all_urls = [url_of(n) for n in range(4)]
    for as_files in (False, True):
        images, _ = open_images([fetched(tmp_path / str(as_files), all_urls, set(), as_files)], tmp_path / "work")
        assert [images.find(None, url) for url in all_urls] == [picture(n) for n in range(4)]


def test_a_corpus_without_addresses_is_refused_and_leaves_no_folder(tmp_path, capsys):
    path = documents(tmp_path / "in", [{"texts": ["a"], "images": [None]}])
    assert main(["urls", str(path), str(tmp_path / "lists"), "--format", "jsonl", "--workers", "1"]) == 2
    assert "as jsonl, there is no address of an image in it" in capsys.readouterr().err
    assert not (tmp_path / "lists").exists()
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "mine").touch()
    assert main(["urls", str(path), str(tmp_path / "lists"), "--format", "jsonl", "--workers", "1"]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
