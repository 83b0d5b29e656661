"""Print what is in shards: ``python -m lcl_ds.data info``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lcl_ds.data.contents import BYTES_PER_TOKEN, Contents
from lcl_ds.data.documents import MAX_TEXT_BYTES
from lcl_ds.files import printable
from lcl_ds.tokens import TextTokenizer

SHOWN_VALUES = 5
"""Most frequent values of a label that are named."""


@dataclass(frozen=True)
class RowFacts:
    """How rows are made, as far as lengths depend on it."""

    tokenizer: TextTokenizer | None = None
    """None: tokens are estimated from bytes."""
    image_tokens: int = 196
    """Of a ViT-B/16 at 224 px."""
    row_tokens: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    max_text_bytes: int = MAX_TEXT_BYTES


def facts_of(contents: Contents, row: RowFacts) -> dict[str, Any]:
    """Put what was measured into JSON; counts are of the samples that were read but for shards, samples and bytes."""
    return {
        "shards": contents.shards,
        "samples": contents.samples,
        "bytes": contents.bytes,
        "samples_read": contents.measured,
        "documents": contents.documents,
        "pairs": contents.pairs,
        "images": sum(contents.images),
        "images_with_text_before": contents.announced,
        "images_per_document": _spread(contents.images),
        "text_bytes": contents.text_bytes,
        "text_tokens": sum(contents.text_tokens),
        "text_tokens_are_estimated": row.tokenizer is None,
        "image_tokens": row.image_tokens,
        "document_tokens": _spread(contents.lengths(row.image_tokens)),
        "held_whole_by_row_of": {tokens: contents.held_by(tokens, row.image_tokens) for tokens in row.row_tokens},
        "short_side": _spread(contents.short_sides),
        "formats": dict(contents.formats.most_common()),
        "labels": {
            name: {"images": values.total(), "values": len(values), "most": dict(values.most_common(SHOWN_VALUES))}
            for name, values in sorted(contents.labels.items())
        },
        "left_out": dict(contents.left_out.most_common()),
    }


def _spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    names, quantiles = ("least", "median", "p95", "most"), np.quantile(np.asarray(values, float), [0, 0.5, 0.95, 1])
    return {"mean": float(np.mean(values)), **dict(zip(names, map(float, quantiles), strict=True))}


def show_facts(facts: dict[str, Any], row: RowFacts, console: Console) -> None:
    """Print the figures as a table of two columns."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in _lines(facts, row):
        table.add_row(name, Text(printable(text)))
    console.print(table)
    if facts["samples_read"] < facts["samples"]:
        console.print(f"read: {facts['samples_read']:,} of the samples, spread over all shards; figures are of them")


def _lines(facts: dict[str, Any], row: RowFacts) -> list[tuple[str, str]]:
    about = "about " if row.tokenizer is None else ""
    basis = f" (at {BYTES_PER_TOKEN} bytes each; exact with --recipe)" if row.tokenizer is None else ""
    images = facts["images"]
    announced = f", {facts['images_with_text_before'] / images:.0%} with text before them" if images else ""
    held = ", ".join(f"{share:.0%} in {tokens}" for tokens, share in facts["held_whole_by_row_of"].items())
    sides = f" ({_range(facts['short_side'])} px on the short side)" if facts["short_side"] else ""
    lines = [
        ("shards", f"{facts['shards']:,}, {_size(facts['bytes'])}"),
        ("samples", f"{facts['samples']:,}: {facts['documents']:,} documents, {facts['pairs']:,} pairs"),
        ("images", f"{images:,}{announced}"),
        ("image files", ", ".join(f"{count:,} {name}" for name, count in facts["formats"].items()) + sides),
        ("images of a document", _range(facts["images_per_document"])),
        ("text", f"{_size(facts['text_bytes'])}, {about}{facts['text_tokens']:,} tokens{basis}"),
        ("tokens of a document", f"{about}{_range(facts['document_tokens'])}, an image being {row.image_tokens}"),
        ("held whole by a row", f"{held} tokens"),
    ]
    for name, label in facts["labels"].items():
        most = ", ".join(f"{value} ({count})" for value, count in label["most"].items())
        more = ", ..." if label["values"] > len(label["most"]) else ""
        lines.append((f"label {name}", f"{label['images']:,} images, {label['values']:,} values: {most}{more}"))
    lines += [("left out", f"{count} x {reason}") for reason, count in facts["left_out"].items()]
    return lines


def _range(spread: dict[str, float]) -> str:
    if not spread:
        return "none"
    return f"{spread['least']:,.0f} to {spread['most']:,.0f}, median {spread['median']:,.0f}, 95 % {spread['p95']:,.0f}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
