"""Folders that settings name: a checkpoint keeps a hash of what stands in them, to know them again elsewhere."""

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from lcl_ds.config import Config
from lcl_ds.errors import UserError
from lcl_ds.files import read_json

TOKENIZER_FILE = "tokenizer.json"
FOLDERS = {
    "data.tokenizer": (TOKENIZER_FILE,),
    "model.vision.pretrained": ("config.json", "*.safetensors"),
    "model.decoder.pretrained": ("config.json", "*.safetensors"),
    "model.init_from": ("config.yaml", "*.safetensors"),
}
"""Settings that name a folder, and which of its files count."""
HASHED_WHOLE = 64 << 20
"""A file that counts is hashed whole up to this size in bytes; of a larger one, its size and both ends are."""


def value_of(config: Config, key: str) -> Any:
    """Return a setting by its dotted name."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def folder_contents(config: Config) -> dict[str, str]:
    """Hash what stands in the folders that settings name, by setting; folders that are not there are left out."""
    contents = {}
    for key, patterns in FOLDERS.items():
        value = value_of(config, key)
        files = [path for pattern in patterns for path in sorted(Path(value).glob(pattern))] if value else []
        if files:
            hashes = (_file_contents(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
            contents[key] = hashlib.sha256(b"".join(hashes)).hexdigest()
    return contents


@lru_cache
def _file_contents(path: Path, size: int, _mtime_ns: int) -> bytes:
    """Hash name, size and bytes, once for all checkpoints as long as the file is not touched.

    Large files are weights, whose header and last values tell them apart. A tokenizer counts by its values, however
    they are set out, and without its rules for truncation and padding, which we never use.
    """
    if path.name == TOKENIZER_FILE and (value := _tokenizer_of(path)) is not None:
        return hashlib.sha256(value).digest()
    hashed = hashlib.sha256(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        if size <= HASHED_WHOLE:
            hashed.update(file.read())
        else:
            hashed.update(file.read(HASHED_WHOLE // 2))
            file.seek(-HASHED_WHOLE // 2, os.SEEK_END)
            hashed.update(file.read())
    return hashed.digest()


def _tokenizer_of(path: Path) -> bytes | None:
    """Read what a ``tokenizer.json`` says about tokens; None where it is none."""
    try:
        tree = read_json(path)
    except UserError:
        return None
    if not isinstance(tree, dict):
        return None
    return json.dumps(tree | {"truncation": None, "padding": None}, sort_keys=True).encode()
