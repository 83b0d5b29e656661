"""Batches as a person reads them: ``python -m lcl_ds.data inspect``.

Everything shown comes from the :class:`lcl_ds.batch.Batch` that training would get: its tokens, the bounds between
documents, the pixels after cropping, where losses are and where the decoder's state is read about which image.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Console
from rich.text import Text

from lcl_ds.batch import Batch
from lcl_ds.report.examples import url_of
from lcl_ds.report.html import render
from lcl_ds.report.numbers import percent, plural
from lcl_ds.tokens import TextTokenizer

LEAST_SIDE, MOST_SIDE = 96, 224
"""Side of an image on the page in pixels: smaller ones are shown a whole number of times as large."""


@dataclass(frozen=True)
class Token:
    """One position of a row."""

    id: int
    text: str
    is_control: bool
    has_loss: bool
    """Whether the next token is predicted here."""
    readouts: tuple[tuple[str, int], ...]
    """``("context", 3)``: the decoder's state here is compared with image 3."""
    image: int | None
    """The image whose first token this is, by its number in the batch; None: it is no first token of one."""
    inside_image: bool
    """Whether this is an image's token but not its first."""
    is_hidden: bool
    """Whether the token itself is hidden and to be predicted; ``<image>`` stands in its place."""


@dataclass(frozen=True)
class Passage:
    """Tokens that see each other: a document, a piece of one, one pass over a caption pair, or padding."""

    row: int
    start: int
    """First token's position in the row."""
    tokens: tuple[Token, ...]
    is_padding: bool
    key: str = ""
    """``source/shard/key`` of its document."""
    piece: str = ""
    """Which piece of the document it is; empty for a whole one."""

    @property
    def end(self) -> int:
        """Last token's position in the row."""
        return self.start + len(self.tokens) - 1

    @property
    def source(self) -> str:
        return self.key.partition("/")[0]

    @property
    def document(self) -> str:
        """Name the document within its source."""
        return self.key.partition("/")[2]

    @property
    def distant_images(self) -> set[int]:
        """List images that are read about here but stand elsewhere, as those of a text that is compared with one."""
        own = {token.image for token in self.tokens}
        return {image for token in self.tokens for _, image in token.readouts} - own


def passages_of(batch: Batch, tokenizer: TextTokenizer) -> list[Passage]:
    """List what stands in the rows of a batch, in order."""
    vocabulary = tokenizer.vocabulary
    ids, length = batch.input_ids.flatten().tolist(), batch.input_ids.shape[1]
    losses = set(batch.label_positions.tolist())
    slots = dict(zip(batch.slot_positions.tolist(), batch.slot_images.tolist(), strict=True))
    readouts: dict[int, list[tuple[str, int]]] = {}
    for name, entries in batch.readouts.items():
        for position, image in zip(entries.positions.tolist(), entries.images.tolist(), strict=True):
            readouts.setdefault(position, []).append((name, image))
    bounds = list(pairwise(batch.cu_seqlens.tolist()))
    is_padding = [all(token == vocabulary.eot for token in ids[start:end]) for start, end in bounds]
    # Every sequence of a batch has as many passages as the others: one, or one for each pass over a pair.
    passes = max(1, is_padding.count(False) // max(1, len(batch.keys)))
    passages, documents = [], 0
    for (start, end), padded in zip(bounds, is_padding, strict=True):
        tokens = tuple(
            Token(
                id=ids[at],
                text=tokenizer.decode([ids[at]]),
                is_control=ids[at] >= vocabulary.text_size,
                has_loss=at in losses,
                readouts=tuple(readouts.get(at, ())),
                image=slots.get(at),
                # An image's tokens carry no loss, because what follows them is given.
                inside_image=ids[at] == vocabulary.image and at not in slots and at not in losses,
                is_hidden=ids[at] == vocabulary.image and at in losses,
            )
            for at in range(start, end)
        )
        key, piece = "", ""
        if not padded:
            number = documents // passes
            documents += 1
            key, piece = batch.keys[number], _piece_text(*batch.pieces[number], "matched" in batch.readouts)
        passages.append(Passage(start // length, start % length, tokens, padded, key, piece))
    return passages


def _piece_text(number: int, count: int, is_pair: bool) -> str:
    """Say which of a document's pieces, or of its pairs, a passage is; empty where it has but one."""
    if count == 1:
        return ""
    if is_pair:
        return f"pair {number + 1} of {count}"
    return f"piece {number + 1} of {count}{', continued' if number else ''}"


def show(batch: Batch, tokenizer: TextTokenizer, console: Console) -> None:
    """Print rows on the terminal: control tokens in brackets, images by size, readouts behind an arrow."""
    row = -1
    for passage in passages_of(batch, tokenizer):
        if passage.row != row:
            row = passage.row
            console.rule(f"row {row}")
        where = f"tokens {passage.start} to {passage.end}"
        about = ["padding" if passage.is_padding else passage.key, passage.piece, where]
        console.print(Text(", ".join(filter(None, about)), "dim"), soft_wrap=True)
        if not passage.is_padding:
            console.print(_line(passage, batch))


def _line(passage: Passage, batch: Batch) -> Text:
    line = Text()
    for token in passage.tokens:
        if token.image is not None:
            side = "x".join(map(str, batch.picture(token.image).shape[1:]))
            line.append(f"[image {token.image}, {side}]", "bold magenta")
        elif token.is_hidden:
            line.append("[hidden]", "bold")
        elif not token.inside_image:
            quiet = "" if token.has_loss else "dim"
            line.append(token.text, "cyan" if token.is_control else quiet)
        for name, image in token.readouts:
            line.append(f"<- {name}: image {image} ", "bold green")
    return line


def page(batch: Batch, tokenizer: TextTokenizer, title: str) -> str:
    """Make an HTML page of the same, with the images in it."""
    rows: dict[int, list[Passage]] = {}
    for passage in passages_of(batch, tokenizer):
        rows.setdefault(passage.row, []).append(passage)
    pairs = len(batch.readouts["context"]) if "context" in batch.readouts else 0
    summary = {
        "Rows": f"{len(batch.input_ids)} of {batch.input_ids.shape[1]:,} tokens",
        "Documents": f"{batch.document_count:,}",
        "Images": f"{batch.image_count:,}",
        "Contrastive pairs": f"{pairs:,}",
        "Tokens with loss": f"{len(batch.labels):,}",
        "Padding": percent(1 - batch.token_count / batch.input_ids.numel()),
        "Left out": plural(batch.skipped_samples, "sample"),
    }
    images = [batch.picture(number).numpy() for number in range(max(1, batch.image_count))]
    longest = max(max(image.shape[1:]) for image in images)
    side = _shown_side(longest)
    return render(
        "batch.html",
        title=title,
        summary=summary,
        sources={
            name: f"{plural(counts.documents, 'document')}, {plural(counts.images, 'image')}"
            for name, counts in batch.sources.items()
        },
        rows=list(rows.values()),
        pictures=[url_of(pixels.transpose(1, 2, 0)) for pixels in images[: batch.image_count]],
        sizes=[(image.shape[2] * side // longest, image.shape[1] * side // longest) for image in images],
        size=_size_text(longest, side) if batch.packed is None else "whole, in their own aspect ratio",
        has_hidden=any(token.is_hidden for passages in rows.values() for p in passages for token in p.tokens),
    )


def _shown_side(side: int) -> int:
    if side > MOST_SIDE:
        return MOST_SIDE
    return side * math.ceil(LEAST_SIDE / side)


def _size_text(side: int, shown: int) -> str:
    """Say how large images are and how they are shown."""
    size = f"{side} x {side} pixels"
    if shown > side:
        return f"{size}, shown {shown // side} times as large"
    return f"{size}, shown smaller" if shown < side else size
