"""List the addresses of a corpus's images for img2dataset, and report which of them led to an image.

The readers of ``build`` say which images they ask for, so what is listed is what a build needs, by its own rules.
"""

import csv
import io
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import track

from lcl_ds.data.corpora import READERS
from lcl_ds.data.corpora.local_images import STATS, LocalImages, open_images
from lcl_ds.data.corpora.record import ReadOptions, is_unicode
from lcl_ds.data.corpora.table import is_url
from lcl_ds.errors import UserError
from lcl_ds.files import check_new_folder, whole_folder, write_whole

COLUMN = "url"
"""Heads the lists, for img2dataset's ``--url_col``."""
SHOWN_HOSTS = 10

Report = dict[str, Any]
"""JSON: ``records``, addresses (``urls``) that are ``there`` and ``listed``, ``no_addresses``, ``hosts`` of those that
are listed and, of what img2dataset tried, ``tried`` by result."""


@dataclass(frozen=True)
class Asked(LocalImages):
    """Images on disk that remembers by which URLs it was asked for others."""

    urls: dict[str, bool] = field(default_factory=dict)
    """Whether the image is there."""

    def find(self, name: Any, url: Any, digest: str | None = None) -> bytes:
        is_there = False
        try:
            data = super().find(name, url, digest)
            is_there = True
            return data
        finally:
            if isinstance(url, str):
                self.urls[url] = is_there


def list_urls(
    files: Sequence[Path],
    out: Path,
    format: str,
    options: ReadOptions,
    images: Sequence[Path] = (),
    workers: int = 1,
    console: Console | None = None,
) -> Report:
    """Write a list of addresses for each input file: those of images that are not there yet, each once.

    Args:
        out: new folder; ``000000.csv`` is the list of the first input file.
        images: folders and tars of images that are there, as for a build.
        workers: processes.

    Raises:
        UserError: an input file cannot be read, or names no address at all.
    """
    check_new_folder(out)
    with tempfile.TemporaryDirectory() as work:
        local, problems = open_images(images, Path(work))
        if problems:
            raise UserError(problems)
        list_one = partial(_list_one, format=format, options=options, images=local)
        with whole_folder(out) as partial_out:
            targets = [partial_out / f"{number:06d}.csv" for number in range(len(files))]
            reports = list(_mapped(list_one, files, targets, workers, console))
            if not any(report["urls"] for report in reports):
                raise UserError(f"{', '.join(map(str, files[:3]))}: as {format}, there is no address of an image in it")
    return _sum_of(reports, images)


def _mapped(
    action: Any, files: Sequence[Path], targets: Sequence[Path], workers: int, console: Console | None
) -> Iterator[Report]:
    if min(workers, len(files)) <= 1:
        yield from track(map(action, files, targets), "input files", total=len(files), console=console)
        return
    with ProcessPoolExecutor(min(workers, len(files)), get_context("spawn")) as pool:
        yield from track(pool.map(action, files, targets), "input files", total=len(files), console=console)


def _list_one(file: Path, target: Path, format: str, options: ReadOptions, images: LocalImages) -> Report:
    """List the addresses of one input file; a file without any gets no list."""
    asked = Asked(images.folders, images.index)
    records = sum(1 for _ in READERS[format](file, replace(options, images=asked)))
    there = [url for url, is_there in asked.urls.items() if is_there]
    missing = [url for url, is_there in asked.urls.items() if not is_there]
    listed = [url for url in missing if _can_be_fetched(url)]
    if listed:
        text = io.StringIO()
        lines = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")  # addresses hold commas
        lines.writerows([[COLUMN], *([url] for url in listed)])
        write_whole(target, text.getvalue())
    return {
        "records": records,
        "urls": len(asked.urls),
        "there": len(there),
        "listed": len(listed),
        "no_addresses": len(missing) - len(listed),
        "hosts": dict(Counter(_host_of(url) for url in listed)),
    }


def _can_be_fetched(url: str) -> bool:
    return is_url(url) and is_unicode(url) and url.isprintable()


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _sum_of(reports: list[Report], images: Sequence[Path]) -> Report:
    names = ("records", "urls", "there", "listed", "no_addresses")
    hosts: Counter[str] = Counter()
    for report in reports:
        hosts.update(report["hosts"])
    return {
        **{name: sum(report[name] for report in reports) for name in names},
        "hosts": dict(hosts.most_common(SHOWN_HOSTS)),
        "tried": dict(tried_links(images).most_common()),
    }


def tried_links(images: Sequence[Path]) -> Counter[str]:
    """Count what came of the addresses that img2dataset tried, by its reports in these folders; ``success`` is one."""
    results: Counter[str] = Counter()
    for folder in images:
        for path in sorted(folder.glob(f"*{STATS}")) if folder.is_dir() else ():
            try:
                statuses = json.loads(path.read_bytes())["status_dict"]
                results.update({str(status): int(count) for status, count in statuses.items()})
            except (ValueError, KeyError, TypeError, AttributeError):
                results["a report that cannot be read"] += 1
    return results
