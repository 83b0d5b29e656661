"""One uninterrupted run on two ranks that several tests look at."""

from pathlib import Path

import pytest
import yaml

from tests.support.ranks import run_ranks, train_command
from tests.support.small import small_config


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, demo_folder) -> Path:
    """A small model on the demo corpus, 30 steps."""
    config = small_config(
        "name=small",
        f"data.shards=[{{name: documents, paths: {demo_folder}/train-documents-*.tar, weight: 2}}, "
        f"{{name: pairs, paths: {demo_folder}/train-pairs-*.tar}}]",
        f"data.tokenizer={demo_folder}/tokenizer",
        "data.row_tokens=192",
        "data.lanes=8",
        "model.vision.image_size=32",
        "train.steps=30",
        "train.global_batch_rows=8",
        "train.accumulation_steps=2",
        "checkpoint.every=5",
        f"evaluation.shards={demo_folder}/heldout-documents-*.tar",
        "evaluation.probe_labels=[colour, shape]",
    )
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


@pytest.fixture(scope="session")
def whole_run(recipe, tmp_path_factory) -> Path:
    """The uninterrupted run on two ranks at stage 3."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    output = run_ranks(2, train_command(recipe, run_dir), run_dir.parent / "log")
    assert "world size 2, ZeRO stage 3, fp32 on cpu" in output
    return run_dir


def pytest_collection_modifyitems(items):
    """Every test of this folder starts ranks or looks at what they did."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
