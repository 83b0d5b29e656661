"""Read every byte of shards and say what is in them and what is wrong: ``python -m lcl_ds.data check``."""

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from lcl_ds.data.corpora.build_folder import text_limit_of
from lcl_ds.data.documents import BadSampleError, read_document
from lcl_ds.data.images import check_image
from lcl_ds.data.shards.index import Sample
from lcl_ds.data.shards.shard import BrokenShardError, index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.tar_members import CUT
from lcl_ds.errors import UserError
from lcl_ds.files import printable

SHOWN = 20
"""Problems of a shard that are named; all are counted."""
COUNTED = ("samples", "documents", "pairs", "images", "text_characters", "problem_count")

Report = dict[str, Any]
"""JSON: ``shard``, the counts, ``formats``, ``short_side`` of the images, ``problems`` and ``reasons``."""


def check_shards(
    paths: list[str], workers: int = 1, console: Console | None = None, max_text_bytes: int | None = None
) -> list[Report]:
    """Report on every shard, in order.

    Args:
        workers: processes.
        max_text_bytes: see :func:`check_shard`.
    """
    check_one = partial(check_shard, max_text_bytes=max_text_bytes)
    if workers <= 1:
        return [check_one(path) for path in track(paths, "shards", console=console)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        results = pool.map(check_one, paths)
        return list(track(results, "shards", total=len(paths), console=console))


def check_shard(path: str, max_text_bytes: int | None = None) -> Report:
    """Read all samples of a shard as training would, and decode all their images.

    Args:
        max_text_bytes: a document with more text is a problem; None: 1 MiB, or what the shard was built with.
    """
    report = _Tally(path, text_limit_of(path) if max_text_bytes is None else max_text_bytes)
    shard, unread = None, 0
    try:
        shard = index_shard(path, rescan=True)
    except UserError as error:
        report.problem("", error.problems[0].removeprefix(f"shard {path}: "))
        if isinstance(error, BrokenShardError):
            shard, unread = error.shard, error.broken.unread
    if shard is not None:
        _check_samples(Source("check", [shard]), unread, report)
    return report.as_dict()


def _check_samples(source: Source, unread: int, report: "_Tally") -> None:
    """Read all samples.

    Args:
        unread: bytes behind the position where the tar breaks off.
    """
    keys: set[str] = set()
    for number in range(len(source)):
        sample = source.sample(number)
        if sample.problem == CUT and not unread:
            continue  # it is what the tar's end costs, which was counted
        if sample.key in keys:
            report.problem(sample.key, "a key that occurred before")
        keys.add(sample.key)
        try:
            _check_sample(source, number, sample, report)
        except BadSampleError as problem:
            report.problem(sample.key, problem.reason)
        except (OSError, UserError) as error:
            report.problem(sample.key, f"it cannot be read: {error}")


class _Tally:
    """What is counted in one shard."""

    def __init__(self, path: str, max_text_bytes: int):
        self.path = path
        self.max_text_bytes = max_text_bytes
        self.counts: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.sides: list[int] = []
        self.problems: list[dict[str, str]] = []

    def problem(self, key: str, reason: str) -> None:
        self.reasons[reason] += 1
        if len(self.problems) < SHOWN:
            self.problems.append({"key": key, "reason": reason})

    def as_dict(self) -> Report:
        quartiles = np.percentile(self.sides, [0, 50, 100]).tolist() if self.sides else []
        self.counts["problem_count"] = self.reasons.total()
        return {
            "shard": self.path,
            **{name: self.counts[name] for name in COUNTED},
            "formats": dict(self.formats.most_common()),
            "short_side": dict(zip(("min", "median", "max"), quartiles, strict=False)),
            "reasons": dict(self.reasons.most_common()),
            "problems": self.problems,
        }


def _check_sample(source: Source, number: int, sample: Sample, report: _Tally) -> None:
    report.counts["samples"] += 1
    document = read_document(source, number, report.max_text_bytes)
    report.counts["pairs" if document.is_pair else "documents"] += 1
    report.counts["text_characters"] += sum(len(text) for text in document.segments if isinstance(text, str))
    for suffix in document.images:
        try:
            facts = check_image(source.read(number, suffix))
        except BadSampleError as problem:
            report.problem(f"{sample.key}.{suffix}", problem.reason)
        else:
            report.counts["images"] += 1
            report.formats[facts.format] += 1
            report.sides.append(min(facts.width, facts.height))
    for _ in range(document.missing_images):
        report.problem(sample.key, "an image that is not there")


def total_of(reports: list[Report]) -> Report:
    """Add the reports of all shards up."""
    formats: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for report in reports:
        formats.update(report["formats"])
        reasons.update(report["reasons"])
    return {
        "shards": len(reports),
        **{name: sum(report[name] for report in reports) for name in COUNTED},
        "formats": dict(formats.most_common()),
        "reasons": dict(reasons.most_common()),
    }


def show(reports: list[Report], console: Console, most: int = 30) -> None:
    """Print tables: bad shards first, then some good ones, the sum, and the problems by reason."""
    table = Table()
    table.add_column("shard", overflow="fold")
    for heading in ("samples", "documents", "pairs", "images", "short side", "problems"):
        table.add_column(heading, justify="right")
    ordered = sorted(reports, key=lambda report: -report["problem_count"])
    for report in ordered[:most]:
        side = report["short_side"]
        sides = f"{side['min']:.0f} to {side['max']:.0f}" if side else ""
        table.add_row(Text(printable(report["shard"])), *_figures(report), sides, str(report["problem_count"]))
    if len(ordered) > most:
        table.add_row(f"... {len(ordered) - most} more")
    total = total_of(reports)
    table.add_section()
    table.add_row(f"{total['shards']} shards", *_figures(total), "", str(total["problem_count"]))
    console.print(table)
    for reason, count in total["reasons"].items():
        console.print(f"{count} x {printable(reason)}", highlight=False, markup=False, soft_wrap=True)
    for report in ordered[:most]:
        for problem in report["problems"][:3]:
            line = printable(": ".join([report["shard"], problem["key"], problem["reason"]]))
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _figures(report: Report) -> list[str]:
    return [str(report[name]) for name in ("samples", "documents", "pairs", "images")]
