"""Open labelled or captioned pictures, wherever they are: a folder with a subfolder for each class, a table, a caption
file of COCO or Flickr30k, or shards.

A picture is read when its features are made. Labels and captions are read at once, so that what is missing is told
before any work.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lcl_ds.data.corpora.folder import LABEL
from lcl_ds.data.corpora.record import ReadOptions
from lcl_ds.data.corpora.table import IMAGE_COLUMNS, columns_among, csv_rows, spellings
from lcl_ds.data.documents import IMAGE_SUFFIXES, BadSampleError, read_document, read_labels
from lcl_ds.data.images import decode_image
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.storage import expand_paths
from lcl_ds.data.stream.skips import reason_of
from lcl_ds.errors import UserError
from lcl_ds.evaluation.probe import class_of
from lcl_ds.files import read_json

SPLITS = {"train": ("train",), "test": ("val", "valid", "validation", "test")}
"""Names of subfolders that are not classes but sides of a split."""
LABEL_COLUMNS = (LABEL, "class")
"""Names of labels that are predicted of captioned pictures where nobody says which: they carry columns of any kind."""


@dataclass(frozen=True)
class Picture:
    """One image that is not read yet."""

    name: str
    read: Callable[[], bytes]
    """Raises OSError or BadSampleError."""
    mark: str
    """Changes when the image does: part of the key of cached features."""
    group: int
    """Pictures of one group, as those of one document, never stand on both sides of a split."""
    labels: Mapping[str, str] = field(default_factory=dict)
    captions: tuple[str, ...] = ()


@dataclass
class PictureSet:
    """Pictures in order, and what was left out of them by reason."""

    name: str
    pictures: list[Picture]
    left_out: Counter[str] = field(default_factory=Counter)

    def identity(self) -> str:
        """Hash which images these are."""
        digest = hashlib.sha256()
        for picture in self.pictures:
            digest.update(f"{picture.name}\0{picture.mark}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def label_names(self) -> list[str]:
        """List the labels that some picture has, the most frequent first."""
        counts = Counter(name for picture in self.pictures for name in picture.labels)
        return [name for name, _ in counts.most_common()]

    def captioned(self) -> "PictureSet":
        """Keep the pictures that have captions. Raises: UserError when none has."""
        some = [picture for picture in self.pictures if picture.captions]
        if not some:
            raise UserError(f"--data {self.name}: no picture has a caption; name captioned pictures")
        return PictureSet(self.name, some, self.left_out)


def open_pictures(
    where: Sequence[str], images: Path | None, cache: Path, limit: int | None = None, side: str | None = None
) -> PictureSet:
    """Open what ``--data`` names.

    Args:
        where: one folder, table or caption file, or shards as in ``data.shards``.
        images: folder of the pictures that a table or caption file names; None: its own folder.
        cache: folder for the indices of shards.
        limit: take so many pictures at most, of shards so many samples, spread over all.
        side: ``train`` or ``test``: which part of a folder or caption file that says so.

    Raises:
        UserError: it is not there, cannot be read, or holds no picture.
    """
    first = Path(where[0])
    name = ", ".join(where)
    if len(where) == 1 and first.is_dir():
        found = _open_folder(first, side)
    elif len(where) == 1 and first.suffix.lower() in (".csv", ".tsv"):
        found = _open_table(first, images or first.parent)
    elif len(where) == 1 and first.suffix.lower() == ".json":
        found = _open_captions(first, images or first.parent, side)
    else:
        found = _open_shards(where, cache, limit)
    if not found.pictures:
        left_out = ", ".join(f"{reason} ({count})" for reason, count in found.left_out.most_common(3))
        raise UserError(f"--data {name}: holds no picture{f'; left out: {left_out}' if left_out else ''}")
    elif limit is not None and limit < len(found.pictures) and not is_shards(where):
        numbers = np.linspace(0, len(found.pictures) - 1, limit).round().astype(int)
        found.pictures = [found.pictures[number] for number in numbers]
    return found


def has_train_side(where: Sequence[str]) -> bool:
    """Say whether data have a side of their own for training: a subfolder ``train``, or such pictures in a caption
    file."""
    path = Path(where[0])
    if len(where) != 1:
        return False
    if path.is_dir():
        below = {entry.name.lower() for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
        return "train" in below and below <= {name for names in SPLITS.values() for name in names}
    if path.suffix.lower() == ".json" and path.is_file():
        tree = read_json(path)
        records = tree.get("images") if isinstance(tree, dict) else None
        sides = {record.get("split") for record in records or [] if isinstance(record, dict)}
        return {"train", "test"} <= sides
    return False


def _file(path: Path, group: int, **values: Any) -> Picture:
    status = path.stat()
    return Picture(str(path), path.read_bytes, f"{status.st_size} {status.st_mtime_ns}", group, **values)


def _open_folder(folder: Path, side: str | None) -> PictureSet:
    """Open ``FOLDER/CLASS/*.jpg``, also below ``train`` and ``val`` or ``test``."""
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    sides = {kind: [path for path in below if path.name.lower() in names] for kind, names in SPLITS.items()}
    if below and all(any(path in of_side for of_side in sides.values()) for path in below):
        chosen = sides[side or "test"]
        if not chosen:
            raise UserError(f"--data {folder}: has no subfolder for the {side or 'test'} pictures; it has {below[0]}")
        found = _open_folder(chosen[0], None)
        return PictureSet(str(folder), found.pictures, found.left_out)
    pictures: list[Picture] = []
    left_out: Counter[str] = Counter()
    for class_folder in below:
        for path in sorted(class_folder.rglob("*")):
            if path.suffix[1:].lower() in IMAGE_SUFFIXES and path.is_file():
                pictures.append(_file(path, len(pictures), labels={LABEL: class_folder.name}))
            elif path.is_file():
                left_out["a file that is no image"] += 1
    if not below:
        raise UserError(
            f"--data {folder}: a subfolder for each class is expected, and there is none; name a table (.csv), a "
            "caption file (.json) or shards otherwise"
        )
    return PictureSet(str(folder), pictures, left_out)


def _open_table(path: Path, images: Path) -> PictureSet:
    """Open a table with a column of paths, and one of captions or further ones, which are labels by their names."""
    header: list[str] = []
    lines = [line for _, line in csv_rows(path, header.extend)]
    columns = columns_among(header, ReadOptions())
    if not columns.images:
        raise UserError(
            f"--data {path}: no column is named {', '.join(IMAGE_COLUMNS)}; it has {', '.join(header) or 'none'}"
        )
    (place,), captions_in = columns.images, columns.texts
    entries: dict[str, tuple[dict[str, str], list[str]]] = {}
    left_out: Counter[str] = Counter()
    for line in lines:
        if isinstance(line, BadSampleError):
            left_out[line.reason] += 1
            continue
        labels, captions = entries.setdefault(line.get(place, "").strip(), ({}, []))
        labels.update({name: cell for name, cell in line.items() if cell and name not in (place, *captions_in)})
        captions += [cell.strip() for name in captions_in if (cell := line.get(name, "")).strip()]
    found = _named_pictures(str(path), images, entries)
    found.left_out.update(left_out)
    return found


def _named_pictures(
    name: str, images: Path, entries: Mapping[str, tuple[Mapping[str, str], Sequence[str]]]
) -> PictureSet:
    """Make pictures of what a file says about each path; paths without a file are counted."""
    found = PictureSet(name, [])
    for place, (labels, captions) in entries.items():
        path = next((images / name for name in spellings(place) if place and (images / name).is_file()), None)
        if path is None:
            found.left_out["a picture that is not there"] += 1
            continue
        found.pictures.append(_file(path, len(found.pictures), labels=labels, captions=tuple(captions)))
    if entries and not found.pictures:
        raise UserError(
            f"--data {name}: none of the {len(entries)} pictures it names is in {images}, as {next(iter(entries))}; "
            "name their folder with --images"
        )
    return found


def _open_captions(path: Path, images: Path, side: str | None) -> PictureSet:
    """Open captions as COCO publishes them (``images`` and ``annotations``), or as Karpathy split them (``images`` with
    ``sentences`` and ``split``), which is how Flickr30k is used."""
    tree = read_json(path)
    records = tree.get("images") if isinstance(tree, dict) else None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"--data {path}: no captions of COCO or Flickr30k: an object with a list 'images' is expected")
    try:
        if "annotations" in tree:
            entries = _coco_entries(records, tree["annotations"])
        else:
            entries = _karpathy_entries(records, side or "test")
    except (KeyError, TypeError) as error:
        raise UserError(
            f"--data {path}: no captions of COCO or Flickr30k: {error} is missing or not as there"
        ) from None
    if not entries:
        raise UserError(f"--data {path}: no picture of the side {side or 'test'!r} has a caption")
    return _named_pictures(str(path), images, entries)


def _coco_entries(records: list[Any], annotations: list[Any]) -> dict[str, tuple[dict[str, str], list[str]]]:
    captions: dict[Any, list[str]] = {}
    for annotation in annotations:
        captions.setdefault(annotation["image_id"], []).append(str(annotation["caption"]).strip())
    return {record["file_name"]: ({}, captions[record["id"]]) for record in records if record["id"] in captions}


def _karpathy_entries(records: list[Any], side: str) -> dict[str, tuple[dict[str, str], list[str]]]:
    wanted = {"train": ("train", "restval"), "test": ("test",)}[side]
    return {
        str(Path(record.get("filepath", ""), record["filename"])): (
            {},
            [str(sentence["raw"]).strip() for sentence in record["sentences"]],
        )
        for record in records
        if record.get("split", "test") in wanted
    }


def is_shards(where: Sequence[str]) -> bool:
    """Say whether data are shards and not a folder or file of another kind."""
    first = Path(where[0])
    return len(where) > 1 or not (first.is_dir() or first.suffix.lower() in (".csv", ".tsv", ".json"))


def _open_shards(where: Sequence[str], cache: Path, limit: int | None) -> PictureSet:
    """Open our own shards or img2dataset's: labels as documents carry them, captions of caption pairs."""
    try:
        shards = [index_shard(path, cache) for path in expand_paths(list(where))]
    except UserError as error:
        raise UserError([f"--data: {problem}" for problem in error.problems]) from None
    source = Source("data", shards)
    found = PictureSet(", ".join(where), [])
    marks = {shard.path: shard.fingerprint() for shard in shards}
    count = min(limit or len(source), len(source))
    for number in np.linspace(0, len(source) - 1, count).round().astype(int).tolist():
        try:
            document = read_document(source, number)
            labels = read_labels(source, number, document)
        except (BadSampleError, OSError) as problem:
            found.left_out[reason_of(problem)] += 1
            continue
        captions = tuple(s for s in document.segments if isinstance(s, str)) if document.is_pair else ()
        for image, suffix in enumerate(document.images):
            values = labels[image].items() if labels else ()
            classes = {name: value for name, raw in values if (value := class_of({name: raw}, name)) is not None}
            found.pictures.append(
                Picture(
                    f"{document.key}.{suffix}",
                    partial(source.read, number, suffix),
                    marks[source.shard_of(number).path],
                    number,
                    classes,
                    captions,
                )
            )
    return found


def decoded(
    pictures: Sequence[Picture],
    size: int,
    batch_size: int,
    left_out: Counter[str],
    crop: Callable[[int], np.random.Generator] | None = None,
    crop_scale: tuple[float, float] = (1.0, 1.0),
    workers: int = 4,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Decode pictures in order, in threads and ahead of their use; those that cannot be read are counted.

    Args:
        crop: gives what draws the random crop of a picture, by its number; None: the central square.

    Yields:
        Numbers int64 [B] within ``pictures`` and their pixels uint8 [B, 3, size, size].
    """

    def decode(number: int, data: bytes) -> np.ndarray | str:
        try:
            return decode_image(data, size, crop_scale, crop(number) if crop else None)
        except BadSampleError as problem:
            return problem.reason

    def begin(numbers: list[int]) -> "list[Future[np.ndarray | str]]":
        return [_started(pool, pictures[number], partial(decode, number)) for number in numbers]

    def collect(numbers: list[int], results: list[np.ndarray | str]) -> tuple[np.ndarray, np.ndarray]:
        left_out.update(result for result in results if isinstance(result, str))
        sound = [(n, result) for n, result in zip(numbers, results, strict=True) if not isinstance(result, str)]
        empty = np.zeros((0, 3, size, size), np.uint8)
        return np.array([n for n, _ in sound], np.int64), np.stack([pixels for _, pixels in sound]) if sound else empty

    chunks = (
        list(range(start, min(start + batch_size, len(pictures)))) for start in range(0, len(pictures), batch_size)
    )
    with ThreadPoolExecutor(workers) as pool:
        ahead = [(chunk, begin(chunk)) for chunk in islice(chunks, 2)]
        while ahead:
            numbers, futures = ahead.pop(0)
            ahead += [(chunk, begin(chunk)) for chunk in islice(chunks, 1)]
            yield collect(numbers, [future.result() for future in futures])


def _started(
    pool: ThreadPoolExecutor, picture: Picture, decode: Callable[[bytes], np.ndarray | str]
) -> "Future[np.ndarray | str]":
    """Read a picture and let a thread decode it; shards are read by this thread alone, which keeps them open."""
    try:
        return pool.submit(decode, picture.read())
    except (BadSampleError, OSError) as problem:
        failed: Future[np.ndarray | str] = Future()
        failed.set_result(reason_of(problem))
        return failed
