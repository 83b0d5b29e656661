"""Fixtures that several folders of tests share."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when the kernels are imported
    os.environ["TRITON_INTERPRET"] = "1"

from lcl_ds.data.demo.corpus import build_demo


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory) -> Path:
    """A small demo corpus: 160 documents, 120 pairs, 40 held-out documents."""
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    build_demo(folder, documents=160, pairs=120, heldout_documents=40, shard_size=64)
    return folder
