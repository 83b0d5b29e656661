"""Folders of images: with a caption beside each (``cat.jpg`` and ``cat.txt``), or in folders named by their class.

A ``cat.json`` beside an image of the first kind holds its labels. In the second kind, which torchvision calls
ImageFolder, the first folder below the root is an image's class: ``root/cat/1.jpg`` has the label ``{"label": "cat"}``.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lcl_ds.data.corpora.inputs import CAPTION_SUFFIX, grouped, is_picture, suffix_of
from lcl_ds.data.corpora.local_images import NOT_THERE, read_plain_file
from lcl_ds.data.corpora.record import (
    Draft,
    RawDocument,
    ReadOptions,
    caption_of,
    labels_among,
    parse_object,
    read_each,
    string_or_none,
)
from lcl_ds.data.documents import BadSampleError

LABEL = "label"
"""What the class of an image is called among its labels."""


def read_folder(path: Path, options: ReadOptions) -> Iterator[RawDocument]:
    """Read caption pairs, each an image and what lies beside it; ``options.names`` says which files."""
    return read_each(_entries(options.names), partial(_read_pair, folder=path, options=options))


def read_image_folder(path: Path, options: ReadOptions) -> Iterator[RawDocument]:
    """Read images whose first folder is their class: labelled ones, or pairs where ``options.caption`` is set."""
    pictures = (((name, [name])) for name in options.names if is_picture(name))
    return read_each(pictures, partial(_read_labelled, folder=path, options=options))


def _entries(names: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Yield every picture with the captions and labels beside it, and captions beside which there is none."""
    for group in grouped(names).values():
        pictures = [name for name in group if is_picture(name)]
        beside = [name for name in group if not is_picture(name)]
        for name in pictures:
            yield name, [name, *beside]
        for name in beside:
            if not pictures and suffix_of(name) == CAPTION_SUFFIX:
                yield name, [name]


def _read_pair(key: str, names: list[str], folder: Path, options: ReadOptions) -> RawDocument:
    by_suffix = {suffix_of(name): name for name in names if not is_picture(name)}
    draft, about = Draft(key, options), {}
    if "json" in by_suffix:
        try:
            about = parse_object(_read(folder / by_suffix["json"]))
        except BadSampleError as problem:  # text and image do not depend on it
            draft.skips.append(problem.reason)
    draft.url = string_or_none(about.get("url"))
    if CAPTION_SUFFIX in by_suffix:
        draft.add_text(_read(folder / by_suffix[CAPTION_SUFFIX]).decode("utf-8-sig").strip())
    elif options.caption:
        draft.add_text(caption_of(options.caption, labels_among(about)))
    if is_picture(names[0]):
        draft.add_image(partial(_read, folder / names[0]), labels=labels_among(about), decode=True)
    return draft.finish_pair()


def _read_labelled(key: str, names: list[str], folder: Path, options: ReadOptions) -> RawDocument:
    label, slash, _ = names[0].partition("/")
    if not slash:
        raise BadSampleError("an image outside of the folders of classes")
    draft, labels = Draft(key, options), labels_among({LABEL: label})
    if options.caption:
        draft.add_text(caption_of(options.caption, labels))
    draft.add_image(partial(_read, folder / names[0]), labels=labels, decode=True)
    return draft.finish_pair() if options.caption else draft.finish()


def _read(path: Path) -> bytes:
    data = read_plain_file(path)
    if data is None:
        raise BadSampleError(NOT_THERE)
    if not data:
        raise BadSampleError("an empty file")
    return data
