"""Read which documents ``data.exclude`` leaves out, and find those of them that are not there."""

import codecs
import json
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from lcl_ds.data.shards.index import ShardIndex
from lcl_ds.data.shards.source import Source
from lcl_ds.errors import UserError
from lcl_ds.files import sentence_of

LOOKED_THROUGH = 100
"""Most shards whose keys are compared with the excluded ones."""


def read_excluded(paths: Iterable[str]) -> frozenset[str]:
    """Read keys of documents, ``source/shard/key``: one on each line, or the ``documents`` of JSON records.

    ``skipped_steps.jsonl`` has such records; its last line may be cut off.

    Raises:
        UserError: names the files that cannot be read, and the lines that hold something else.
    """
    keys: set[str] = set()
    problems: list[str] = []
    for path in paths:
        try:
            content = Path(path).expanduser().read_bytes().removeprefix(codecs.BOM_UTF8)
        except OSError as error:
            problems.append(f"data.exclude: {path}: cannot be read: {sentence_of(error) or error.strerror}")
            continue
        *lines, last = content.decode("utf-8", "surrogateescape").split("\n")
        for number, line in enumerate(lines, start=1):
            documents = _keys_of(line)
            if documents is None:
                problems.append(
                    f"data.exclude: {path}: line {number} is neither a key nor a record with a list 'documents'; "
                    "repair or remove it"
                )
            else:
                keys.update(documents)
        keys.update(_keys_of(last) or [])
    if problems:
        raise UserError(problems)
    return frozenset(keys)


def _keys_of(line: str) -> list[str] | None:
    """Return the keys that a line names; None where it should name some and does not."""
    line = line.strip()
    if not line.startswith("{"):
        return [line] if line else []
    try:
        documents = json.loads(line).get("documents")
    except (ValueError, RecursionError):
        return None
    if not isinstance(documents, list) or not all(isinstance(key, str) for key in documents):
        return None
    return documents


def unknown_keys(excluded: Iterable[str], sources: list[Source]) -> list[str]:
    """List the excluded keys that no source holds, as far as the shards they name are few enough to look through."""
    shards = {f"{source.name}/{name}": shard for source in sources for name, shard in source.named_shards()}
    unknown: list[str] = []
    by_shard: dict[str, list[str]] = defaultdict(list)
    for key in sorted(excluded):
        ends = (end for end, sign in enumerate(key) if sign == "/")
        named = next((key[:end] for end in ends if key[:end] in shards), None)
        if named is None:
            unknown.append(key)
        else:
            by_shard[named].append(key)
    for name in sorted(by_shard)[:LOOKED_THROUGH]:
        try:
            there = _all_keys(shards[name].load_index())
        except (OSError, UserError):  # reading its samples will say why
            continue
        unknown += [key for key in by_shard[name] if key[len(name) + 1 :] not in there]
    return unknown


def _all_keys(index: ShardIndex) -> set[str]:
    keys, ends = index.keys.tobytes(), [0, *index.key_end.tolist()]
    return {keys[start:end].decode("utf-8", "surrogateescape") for start, end in pairwise(ends)}
