"""Keep the output folder of a build: whose it is, whether it is finished, and what a failed attempt leaves in it.

A finished build is a folder of shards with ``manifest.json``, which names settings, input files and shards, and
``shards.txt``, which lists the shards; those of held-out documents lie in ``heldout`` below it. An unfinished one has
``.build`` beside them, with the settings that it was begun with; only the same build goes on in it.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lcl_ds.data.corpora.inputs import Input
from lcl_ds.data.documents import MAX_TEXT_BYTES
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.storage import is_remote
from lcl_ds.errors import UserError
from lcl_ds.files import PARTIAL, only_one, write_whole

VERSION = 3
"""Of what a build writes; a folder of another version is not continued."""
WORK, SETTINGS = ".build", "settings.json"
WORKERS = "workers"
"""Whose lock in the work folder every worker process holds while it lives."""
MANIFEST, SHARD_LIST = "manifest.json", "shards.txt"
HELD_OUT = "heldout"
"""Folder of the held-out shards, beside those to train on."""


def finished_manifest(out: Path, settings: dict[str, Any], inputs: list[Input]) -> dict[str, Any] | None:
    """Read the manifest of a finished build; None where there is none.

    Raises:
        UserError: it is of other input files or settings, or its input files or shards are no longer what they were.
    """
    manifest = read_object(out / MANIFEST)
    if manifest is None or "settings" not in manifest:
        return None
    difference = _difference(manifest["settings"], settings)
    if difference:
        raise UserError(f"{out}: it holds a finished build of other {difference}; name a new folder")
    units = list(zip_longest(manifest["sources"], inputs))  # a folder may have more or fewer parts by now
    newer = [part or inputs[-1] for unit, part in units if not (unit and part and unit["identity"] == part.identity())]
    if newer:
        raise UserError(
            f"{out}: it holds a finished build, but {len(newer)} of its {len(units)} input files changed since, the "
            f"first {newer[0].path}; name a new folder to build again"
        )
    shards = {**manifest["shards"], **manifest["heldout"]}
    changed = [name for name, facts in shards.items() if not _is_unchanged(out / name, facts)]
    if changed:
        raise UserError(
            f"{out}: it holds a finished build, but {len(changed)} of its {len(shards)} shards are gone "
            f"or changed, the first {changed[0]}; name a new folder, or remove this one to build again"
        )
    return manifest


def _is_unchanged(shard: Path, facts: dict[str, Any]) -> bool:
    try:
        return shard.stat().st_size == facts["bytes"] and index_shard(shard).fingerprint() == facts["layout"]
    except (FileNotFoundError, UserError):
        return False


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder that of the build with these settings.

    Raises:
        UserError: it is a file, or holds something else.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a new folder")
    saved = read_object(out / WORK / SETTINGS)
    if saved is None:
        if out.exists() and any(path.name != WORK for path in out.iterdir()):
            raise UserError(f"{out}: it is not empty and holds no build that could go on; name a new folder")
        try:
            (out / WORK).mkdir(parents=True, exist_ok=True)
            write_whole(out / WORK / SETTINGS, json.dumps(settings))
        except BaseException:
            give_up(out)
            raise
        return
    difference = _difference(saved, settings)
    if difference:
        raise UserError(f"{out}: it holds an unfinished build of other {difference}; name a new folder")


def _difference(saved: dict[str, Any], settings: dict[str, Any]) -> str:
    """Say what differs between the saved settings of a build and others; empty where nothing does."""
    old, new = ({**values, **values.get("options", {})} for values in (saved, as_json(settings)))
    names = [name for name in new if name != "options" and old.get(name) != new[name]]
    return f"input files or settings ({', '.join(names)})" if names else ""


@contextmanager
def attempt(out: Path) -> Iterator[None]:
    """Build in a folder: remove what an earlier attempt left half done, and what this one leaves where it fails.

    Only for the process that holds the lock. Finished input files stay for the next attempt. Workers of a build that
    was killed live about a second longer: what they write while it is removed would pass for finished.
    """
    with only_one(out / WORK / WORKERS):
        remove_leftovers(out)
    try:
        yield
    except BaseException:
        remove_leftovers(out)
        if not any(path.name[:1].isdigit() or path.suffix == ".sqlite" for path in (out / WORK).glob("*")):
            give_up(out)  # nothing was finished, so the next attempt may be of something else
        raise


def remove_leftovers(out: Path) -> None:
    """Remove what an attempt left half done."""
    for folder in (out, out / WORK):
        with suppress(OSError):  # what cannot be removed now is removed at the next start
            for path in folder.iterdir():
                if folder != out and path.is_dir() and path.suffix:
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name.startswith(".") and path.suffix == PARTIAL:
                    path.unlink(missing_ok=True)


def give_up(out: Path) -> None:
    """Leave nothing of a build that finished nothing."""
    shutil.rmtree(out / WORK, ignore_errors=True)
    with suppress(OSError):  # it is not there or not empty; the first error is the one to report
        out.rmdir()


def text_limit_of(shard: str) -> int:
    """Say how many bytes of text a document of a shard may have; a build records a limit other than the usual one."""
    folder, name = Path(shard).parent, Path(shard).name
    if folder.name == HELD_OUT:
        folder, name = folder.parent, f"{HELD_OUT}/{name}"
    manifest = (None if is_remote(shard) else read_object(folder / MANIFEST)) or {}
    shards = manifest.get("heldout" if name.startswith(HELD_OUT) else "shards")
    longest = manifest.get("longest_text_bytes")
    if isinstance(shards, dict) and name in shards and isinstance(longest, int):
        return max(MAX_TEXT_BYTES, longest)
    return MAX_TEXT_BYTES


def as_json(value: dict[str, Any]) -> Any:
    """Convert a value to what it is after it was saved as JSON: tuples become lists."""
    return json.loads(json.dumps(value))


def read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None where there is none, whatever the reason."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
