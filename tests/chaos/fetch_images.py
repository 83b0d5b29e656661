"""img2dataset itself fetches what ``urls`` lists, from a server on this machine, and ``build`` joins it; counts agree.

``python -m tests.chaos.fetch_images IMG2DATASET`` with the path of that program, which has an environment of its own.
The command is that of docs/data.md. Of every ten images one is gone and one is a page instead.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lcl_ds.data.__main__ import main as data
from tests.support.corpora import mmc4_record, picture, write_parquet
from tests.support.pages import blocks_of
from tests.support.ranks import ROOT

GONE, PAGE = 3, 7
DOCUMENTS = 100
ALONE = ("--workers", "1")


class Pictures(BaseHTTPRequestHandler):
    """Serves picture N at any path that ends in ``/N.jpg``, with or without a query."""

    def do_GET(self) -> None:
        number = int(self.path.rsplit("/", 1)[1].split(".")[0])
        if number % 10 == GONE:
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>gone</html>" if number % 10 == PAGE else picture(number, side=64))

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def can_be_had(url: str) -> bool:
    return int(url.rsplit("/", 1)[1].split(".")[0]) % 10 not in (GONE, PAGE)


def write_corpus(format: str, folder: Path, server: str) -> list[str]:
    """Write two input files with three images a document; returns the addresses of all images."""

    def url_of(number: int) -> str:
        return f"{server}/a,b/{number}.jpg?w=1,2&name=%C3%A4"

    folder.mkdir(parents=True)
    named: list[str] = []
    for part in range(2):
        records = []
        for number in range(part * DOCUMENTS, (part + 1) * DOCUMENTS):
            urls = [url_of(3 * number + i) for i in range(3)]
            named += urls
            if format == "mmc4":
                record = mmc4_record(number)
                entries = [{"raw_url": url, "matched_text_index": i, "matched_sim": 0.5} for i, url in enumerate(urls)]
                records.append({**record, "image_info": entries})
            else:
                records.append({"images": [*urls, None], "texts": [None, None, None, f"text {number}"]})
        if format == "mmc4":
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        else:
            write_parquet(folder / f"{part}.parquet", records)
    return named


def fetch_command(program: str) -> list[str]:
    """The command of the page, for lists and images in the current folder."""
    (block,) = [block for block in blocks_of(ROOT / "docs" / "data.md") if "img2dataset --url_list" in block.text]
    line = next(line for line in block.text.splitlines() if line.startswith("img2dataset"))
    return [program, *shlex.split(line)[1:], "--processes_count", "1", "--thread_count", "16"]


def run(format: str, as_files: bool, program: str, server: str) -> dict[str, object]:
    """List, fetch and build in the current folder; returns the counts that must agree, and more."""
    named = write_corpus(format, Path("in"), server)
    wanted = sum(map(can_be_had, named))
    files = "in/*.jsonl" if format == "mmc4" else "in/*.parquet"
    assert data(["urls", files, "lists", "--format", format, *ALONE]) == 0
    command = fetch_command(program)
    if as_files:
        command[command.index("--output_format") + 1] = "files"
    environment = {"PATH": os.environ["PATH"], "HOME": os.getcwd(), "NO_ALBUMENTATIONS_UPDATE": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    tried: Counter[str] = Counter()
    for report in Path("fetched").glob("*_stats.json"):
        tried.update(json.loads(report.read_bytes())["status_dict"])
    assert data(["build", files, "shards", "--format", format, "--images", "fetched", *ALONE]) == 0
    manifest = json.loads(Path("shards/manifest.json").read_bytes())
    assert data(["urls", files, "again", "--format", format, "--images", "fetched", "--json", "dead.json", *ALONE]) == 0
    built = sum(unit["images"] for unit in manifest["sources"])
    dead = json.loads(Path("dead.json").read_bytes())
    assert built == tried["success"] == dead["there"] == wanted
    assert dead["listed"] == manifest["skips"]["an image that is not there"] == len(named) - wanted
    return {"named": len(named), "there": wanted, "fetched": tried["success"], "built": built, "dead": dead["listed"]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("img2dataset", help="its path")
    program = os.path.abspath(parser.parse_args(argv).img2dataset)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    counts = {}
    for format in ("obelics", "omnicorpus", "mmc4"):
        for as_files in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                counts[f"{format}, {'files' if as_files else 'tars'}"] = run(
                    format, as_files, program, f"http://127.0.0.1:{httpd.server_port}"
                )
                os.chdir(ROOT)
    print(json.dumps(counts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
