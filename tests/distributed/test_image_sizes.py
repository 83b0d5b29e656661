"""A run whose images grow goes on exactly before, at and after the change, bit for bit."""

from pathlib import Path
from typing import Any

import pytest

from lcl_ds.convert import main as convert
from lcl_ds.models.weights.transfer import resize_positions
from lcl_ds.training.checkpoint import EMA, MOMENTS, WEIGHTS, checkpoint_of, load_model, read_manifest, slices_of
from tests.support.legs import corpus_settings, leg, run_legs
from tests.support.small import VISION_TOWERS

pytestmark = pytest.mark.timeout(600)

CHANGE, STEPS = 3, 6
LARGE = VISION_TOWERS["clip_vision_model"].replace("image_size: 16", "image_size: 32")
POSITIONS = "model.vision.model.embeddings.position_embedding.weight"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, demo_folder) -> dict[str, Any]:
    """Results of a run on two ranks without a stop, and of others that stop around the change; by name."""
    folder = tmp_path_factory.mktemp("sizes")
    shared = [
        *(*corpus_settings(demo_folder), f"model.vision={LARGE}", f"train.steps={STEPS}", "checkpoint.keep=9"),
        *("checkpoint.every=1", f"train.image_sizes={{0: 16, {CHANGE}: 32}}", "train.ema_decay=0.5"),
        "train.optimizer=muon",
    ]
    legs = {"whole": leg("whole", "3", shared)}
    for stop in (CHANGE - 1, CHANGE, CHANGE + 1):
        legs[f"{stop} first"] = leg(f"stopped at {stop}", "3", shared, stop)
        legs[f"{stop}"] = leg(f"stopped at {stop}", "3", shared)
    return run_legs(folder, 2, legs) | {"folder": folder / "runs" / "whole"}


def figures(runs, name) -> list[tuple[float, ...]]:
    return [
        tuple(row[key] for key in ("step", "loss", "grad_norm", "tokens", "images")) for row in runs[name]["metrics"]
    ]


@pytest.mark.parametrize("stop", [CHANGE - 1, CHANGE, CHANGE + 1])
def test_a_run_that_was_stopped_around_the_change_takes_the_same_steps(runs, stop):
    assert figures(runs, f"{stop}") == figures(runs, "whole")
    assert [row[0] for row in figures(runs, "whole")] == [*range(1, STEPS + 1)]
    assert runs[f"{stop} first"]["seen"] | runs[f"{stop}"]["seen"] == runs["whole"]["seen"]


def test_rows_hold_fewer_images_once_these_have_more_tokens(runs):
    """16 after the change, 4 before, of the 96 of a row."""
    images = {row["step"]: row["images"] for row in runs["whole"]["metrics"]}
    assert min(images[step] for step in (1, 2, 3)) > max(images[step] for step in (4, 5, 6))


def reader_of(run: Path, step: int, folder: str):
    checkpoint = checkpoint_of(run, step)
    return slices_of(checkpoint, folder, read_manifest(checkpoint))


def test_positions_are_resized_and_everything_else_goes_on(runs):
    """One step of AdamW moves a weight by at most about the learning rate."""
    for folder in (WEIGHTS, EMA):
        before, after = (reader_of(runs["folder"], step, folder) for step in (CHANGE, CHANGE + 1))
        for name, shape in before.shapes.items():
            old = before.whole(name, shape)
            if name == POSITIONS:
                assert shape == (5, 32)
                old = resize_positions(old, 1, 4)
            new = after.whole(name, after.shapes[name])
            assert new.shape == old.shape
            assert float((new - old).abs().max()) < 4e-3, name
    squares = reader_of(runs["folder"], CHANGE + 1, MOMENTS).whole(f"exp_avg_sq.{POSITIONS}", (17, 32))
    assert float(squares.min()) >= 0


def test_a_checkpoint_of_either_size_is_a_model_of_its_size(runs, tmp_path):
    for step, patches in ((CHANGE, 4), (CHANGE + 1, 16)):
        assert load_model(checkpoint_of(runs["folder"], step), ema=True).vision.patch_tokens == patches
    assert convert([str(checkpoint_of(runs["folder"], CHANGE)), str(tmp_path / "out")]) == 0
    assert "16 px images" in (tmp_path / "out" / "README.md").read_text()
