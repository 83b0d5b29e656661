"""One uninterrupted run on two ranks that several tests look at."""

from pathlib import Path

import pytest
import yaml

from lcl_ds.data.demo.corpus import build_demo
from tests.support.once import made_once
from tests.support.ranks import run_ranks, train_command
from tests.support.small import small_config


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    """A small model on a demo corpus, 30 steps; the same file for all workers of pytest-xdist."""
    return made_once(tmp_path_factory, "recipe", make_recipe) / "small.yaml"


def make_recipe(folder: Path) -> None:
    demo = folder / "corpus"
    build_demo(demo, documents=160, pairs=120, heldout_documents=40, shard_size=64)
    config = small_config(
        "name=small",
        f"data.shards=[{{name: documents, paths: {demo}/train-documents-*.tar, weight: 2}}, "
        f"{{name: pairs, paths: {demo}/train-pairs-*.tar}}]",
        f"data.tokenizer={demo}/tokenizer",
        "data.row_tokens=192",
        "data.lanes=8",
        "model.vision.image_size=32",
        "train.steps=30",
        "train.global_batch_rows=8",
        "train.accumulation_steps=2",
        "checkpoint.every=5",
        f"evaluation.shards={demo}/heldout-documents-*.tar",
        "evaluation.probe_labels=[colour, shape]",
    )
    (folder / "small.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))


@pytest.fixture(scope="session")
def whole_run(recipe, tmp_path_factory) -> Path:
    """The uninterrupted run on two ranks at stage 3."""

    def make(folder: Path) -> None:
        output = run_ranks(2, train_command(recipe, folder / "run"), folder / "log")
        assert "world size 2, ZeRO stage 3, fp32 on cpu" in output

    return made_once(tmp_path_factory, "whole", make) / "run"
