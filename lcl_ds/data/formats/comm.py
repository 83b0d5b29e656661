"""CoMM: documents of steps, each a list of texts and images (github.com/HKUST-LongGroup/CoMM).

A record has ``data_id``, ``title``, ``summary_info`` (a list) and ``step_info`` (a list of lists) of
``{"type": "text", "content": ...}`` and ``{"type": "image", "image_path": ..., "url": ...}``. The corpus comes as
``.pth`` files of plain lists; they are opened without running anything that is in them. ``.json`` and ``.jsonl`` with
the same records are read too.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcl_ds.data.documents import BadSampleError
from lcl_ds.data.formats.record import (
    Draft,
    ReadOptions,
    SourceDocument,
    left_out,
    list_of,
    parse_object,
    string_or_none,
)
from lcl_ds.errors import UserError


def read_comm(path: Path, options: ReadOptions) -> Iterator[SourceDocument]:
    """Documents: title, summary, steps.

    Raises:
        UserError: the file cannot be read.
    """
    for number, record in enumerate(_records(path)):
        key = f"{path.name}:{number}"
        try:
            if isinstance(record, bytes):
                record = parse_object(record)
            if not isinstance(record, dict):
                raise BadSampleError("a record that is not an object")
            yield _read_record(string_or_none(record.get("data_id")) or key, record, options)
        except BadSampleError as problem:
            yield left_out(key, problem.reason)


def _records(path: Path) -> Iterator[Any]:
    try:
        if path.suffix == ".jsonl":
            with path.open("rb") as file:
                yield from (line for line in file if line.strip())
            return
        records = _load(path)
    except Exception as error:  # on damaged bytes torch's reader raises errors of any kind
        first_line = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: cannot be read: {first_line}") from error
    if not isinstance(records, list):
        raise UserError(f"{path}: a list of documents is expected, found {type(records).__name__}")
    yield from records


def _load(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_bytes())
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def _read_record(key: str, record: dict[str, Any], options: ReadOptions) -> SourceDocument:
    draft = Draft(key, options)
    draft.add_text(record.get("title"))
    contents = list(record.get("summary_info") or [])
    for step in list_of(record, "step_info"):
        contents += step if isinstance(step, list) else [step]
    for content in contents:
        kind = content.get("type") if isinstance(content, dict) else None
        if kind == "text":
            draft.add_text(content.get("content"))
        elif kind == "image":
            draft.add_image(_find(content, options))
        else:
            draft.skips.append("a content that is neither text nor image")
    return draft.finish()


def _find(content: dict[str, Any], options: ReadOptions) -> bytes | None:
    name, url = content.get("image_path"), content.get("url")
    data = options.images.by_name(name) if isinstance(name, str) else None
    return options.images.by_url(url) if data is None and isinstance(url, str) else data
