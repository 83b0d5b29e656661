"""CoMM: documents of steps, each a list of texts and images (github.com/HKUST-LongGroup/CoMM).

A record has ``data_id``, ``title``, ``summary_info`` (a list) and ``step_info`` (a list of lists) of
``{"type": "text", "content": ...}`` and ``{"type": "image", "image_path": ..., "url": ...}``. The corpus comes as
``.pth`` files of plain lists; they are opened without running anything that is in them. ``.json`` and ``.jsonl`` with
the same records are read too.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lcl_ds.data.corpora.record import (
    Draft,
    RawDocument,
    ReadOptions,
    list_of,
    numbered_lines,
    parse_json,
    parse_object,
    read_each,
    reading,
    string_or_none,
)
from lcl_ds.data.documents import BadSampleError
from lcl_ds.errors import UserError


def read_comm(path: Path, options: ReadOptions) -> Iterator[RawDocument]:
    """Read documents: title, summary, steps.

    Raises:
        UserError: the file cannot be read.
    """
    return read_each(_records(path), partial(_read_record, options=options))


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    with reading(path, "CoMM's documents"):
        if path.suffix == ".jsonl":
            with path.open("rb") as file:
                yield from numbered_lines(path, file)
            return
        records = parse_json(path.read_bytes()) if path.suffix == ".json" else _load_pth(path)
        if not isinstance(records, list):
            raise UserError(f"{path}: a list of documents is expected, found {type(records).__name__}")
        for number, record in enumerate(records):
            yield f"{path.name}:{number}", record


def _load_pth(path: Path) -> Any:
    import torch

    with path.open("rb") as file:  # torch itself takes no path that is not UTF-8
        return torch.load(file, map_location="cpu", weights_only=True)


def _read_record(key: str, record: Any, options: ReadOptions) -> RawDocument:
    if isinstance(record, bytes):
        record = parse_object(record)
    if not isinstance(record, dict):
        raise BadSampleError("a record that is not an object")
    draft = Draft(string_or_none(record.get("data_id")) or key, options)
    draft.add_text(record.get("title"))
    summary = record.get("summary_info")
    if summary is not None and not isinstance(summary, list):
        draft.skips.append("a summary that is not a list")
    contents = list(summary) if isinstance(summary, list) else []
    for step in list_of(record, "step_info"):
        contents += step if isinstance(step, list) else [step]
    for content in contents:
        kind = content.get("type") if isinstance(content, dict) else None
        if kind == "text":
            draft.add_text(content.get("content"))
        elif kind == "image":
            draft.add_image(partial(options.images.find, content.get("image_path"), content.get("url")))
        else:
            draft.skips.append("a content that is neither text nor image")
    return draft.finish()
