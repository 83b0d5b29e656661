"""Batches as a person reads them: ``python -m lcl_ds.data inspect``.

Everything shown comes from the :class:`lcl_ds.batch.Batch` that training would get: its tokens, the bounds between
documents, the pixels after cropping, where losses are and where the decoder's state is read about which image.
"""

import base64
import io
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from string import Template

import numpy as np
from PIL import Image
from rich.console import Console
from rich.text import Text

from lcl_ds.batch import Batch
from lcl_ds.tokens import TextTokenizer

SHOWN_SIDE = 112
"""Least side of an image on the page in pixels."""


@dataclass(frozen=True)
class Token:
    """One position of a row."""

    id: int
    text: str
    is_control: bool
    has_loss: bool
    """Whether the next token is predicted here."""
    readouts: tuple[str, ...]
    """``context: image 3``: what the decoder's state here is compared with."""
    image: int | None
    """The image whose first token this is, by its number in the batch; None: it is no first token of one."""
    inside_image: bool
    """Whether this is an image's token but not its first."""


@dataclass(frozen=True)
class Passage:
    """Tokens that see each other: a document, a piece of one, one pass over a caption pair, or padding."""

    row: int
    start: int
    """First token's position in the row."""
    tokens: tuple[Token, ...]
    is_padding: bool


def passages_of(batch: Batch, tokenizer: TextTokenizer) -> list[Passage]:
    """List what stands in the rows of a batch, in order."""
    vocabulary = tokenizer.vocabulary
    ids, length = batch.input_ids.flatten().tolist(), batch.input_ids.shape[1]
    losses = set(batch.label_positions.tolist())
    slots = dict(zip(batch.slot_positions.tolist(), batch.slot_images.tolist(), strict=True))
    readouts: dict[int, list[str]] = {}
    for name, entries in batch.readouts.items():
        for position, image in zip(entries.positions.tolist(), entries.images.tolist(), strict=True):
            readouts.setdefault(position, []).append(f"{name}: image {image}")
    bounds = batch.cu_seqlens.tolist()
    passages = []
    for start, end in pairwise(bounds):
        tokens = tuple(
            Token(
                ids[at],
                tokenizer.decode([ids[at]]),
                ids[at] >= vocabulary.text_size,
                at in losses,
                tuple(readouts.get(at, ())),
                slots.get(at),
                ids[at] == vocabulary.image and at not in slots,
            )
            for at in range(start, end)
        )
        is_padding = all(token.id == vocabulary.eot for token in tokens)
        passages.append(Passage(start // length, start % length, tokens, is_padding))
    return passages


def show(batch: Batch, tokenizer: TextTokenizer, console: Console) -> None:
    """Print rows on the terminal: control tokens in brackets, images by size, readouts behind an arrow."""
    row = -1
    for passage in passages_of(batch, tokenizer):
        if passage.row != row:
            row = passage.row
            console.rule(f"row {row}")
        end = passage.start + len(passage.tokens)
        kind = "padding" if passage.is_padding else "document"
        console.print(f"{kind}, tokens {passage.start} to {end - 1}", style="dim", highlight=False)
        if not passage.is_padding:
            console.print(_line(passage, batch))


def _line(passage: Passage, batch: Batch) -> Text:
    line = Text()
    side = "x".join(map(str, batch.images.shape[2:]))
    for token in passage.tokens:
        if token.inside_image:
            continue
        if token.image is not None:
            line.append(f"[image {token.image}, {side}]", "bold magenta")
        else:
            quiet = "" if token.has_loss else "dim"
            line.append(token.text, "cyan" if token.is_control else quiet)
        for readout in token.readouts:
            line.append(f"<- {readout} ", "bold green")
    return line


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1f2933; --muted: #616e7c; --page: #f5f7fa; --card: #fff; --line: #d8dee4;
  --even: #e9eff5; --green: #00875a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ecf0; --muted: #9aa7b4; --page: #14181d; --card: #1d232a; --line: #38424d; --even: #29323b;
    --green: #3ddc97; }
}
body { margin: 0 auto; padding: 2rem 1rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: .95rem/1.9 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
.note, .where { color: var(--muted); font-size: .85rem; line-height: 1.4; }
.passage { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; margin: .5rem 0;
  padding: .4rem .8rem; overflow-wrap: anywhere; }
.t { white-space: pre-wrap; } .t:nth-of-type(even) { background: var(--even); }
.c { color: var(--muted); font-size: .75rem; border: 1px solid var(--line); border-radius: .3rem; padding: 0 .25rem; }
.quiet { opacity: .45; }
.r { color: var(--green); font-size: .75rem; font-weight: 600; white-space: nowrap; }
figure { display: inline-block; margin: .3rem; vertical-align: middle; text-align: center; }
figcaption { font-size: .75rem; line-height: 1.3; color: var(--muted); }
img { image-rendering: pixelated; border-radius: .3rem; display: block; min-width: ${side}px; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="note">$summary<br>Every box is what attends to itself alone. Hover over a token for its position and id; pale
ones carry no loss. Green: the decoder's state here is read about that image.</p>
$rows
</body>
</html>
""")


def page(batch: Batch, tokenizer: TextTokenizer, title: str) -> str:
    """Make an HTML page of the same, with the images in it."""
    row, blocks = -1, []
    for passage in passages_of(batch, tokenizer):
        if passage.row != row:
            row = passage.row
            blocks.append(f"<h2>Row {row}</h2>")
        end = passage.start + len(passage.tokens)
        kind = "padding" if passage.is_padding else "document"
        body = (
            ""
            if passage.is_padding
            else "".join(_html(token, passage.start + i, batch) for i, token in enumerate(passage.tokens))
        )
        blocks.append(
            f'<div class="passage"><div class="where">{kind}, tokens {passage.start} to {end - 1}</div>{body}</div>'
        )
    pairs = len(batch.readouts["context"]) if "context" in batch.readouts else 0
    summary = (
        f"{len(batch.input_ids)} rows of {batch.input_ids.shape[1]} tokens, {batch.document_count} documents, "
        f"{batch.image_count} images, {pairs} contrastive pairs, {len(batch.labels)} labels, "
        f"{1 - batch.token_count / batch.input_ids.numel():.1%} padding, {batch.skipped_samples} samples left out. "
        f"Documents: {', '.join(batch.keys)}"
    )
    return PAGE.substitute(title=escape(title), summary=escape(summary), rows="\n".join(blocks), side=SHOWN_SIDE)


def _html(token: Token, position: int, batch: Batch) -> str:
    if token.inside_image:
        return ""
    marks = "".join(f' <span class="r">&larr; {escape(readout)}</span>' for readout in token.readouts)
    if token.image is not None:
        picture = _picture(batch.images[token.image].numpy())
        return f'<figure><img src="{picture}" alt=""><figcaption>image {token.image}</figcaption></figure>{marks}'
    kind = "c" if token.is_control else "t"
    quiet = "" if token.has_loss or token.is_control else " quiet"
    title = f"position {position}, id {token.id}"
    return f'<span class="{kind}{quiet}" title="{title}">{escape(token.text)}</span>{marks}'


def _picture(pixels: np.ndarray) -> str:
    """Encode uint8 [3, H, W] as a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
