"""Fixtures that several folders of tests share."""

from pathlib import Path

import pytest

from lcl_ds.data.demo import build_demo


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory) -> Path:
    """A small demo corpus: 160 documents, 120 pairs, 40 held-out documents."""
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    build_demo(folder, documents=160, pairs=120, heldout_documents=40, shard_size=64)
    return folder
