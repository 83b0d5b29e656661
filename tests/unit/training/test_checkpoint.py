"""Checkpoints are complete or do not exist."""

import json
import shutil

import pytest
import torch

from lcl_ds.errors import UserError
from lcl_ds.metrics import read_metrics
from lcl_ds.training.checkpoint import (
    complete_checkpoints,
    load_config_of,
    load_model,
    newest_checkpoint,
    problem_of,
    read_state,
    resolve_checkpoint,
)


@pytest.fixture
def run_dir(saved_run, tmp_path):
    """A copy of the run that a test may damage."""
    return shutil.copytree(saved_run[0], tmp_path / "run")


def test_only_the_newest_are_kept_and_the_latest_is_named(saved_run):
    folder = saved_run[0] / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000003", "step_00000004"]
    assert (folder / "latest").read_text() == "step_00000004\n"
    assert complete_checkpoints(saved_run[0]) == [folder / "step_00000003", folder / "step_00000004"]


def test_the_manifest_lists_every_file_with_its_size(saved_run):
    checkpoint = resolve_checkpoint(saved_run[0])
    manifest = json.loads((checkpoint / "COMPLETE.json").read_text())
    files = {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*") if path.is_file()}
    assert manifest.keys() == files.keys() - {"COMPLETE.json"}
    assert all(entry["bytes"] == files[name].stat().st_size for name, entry in manifest.items())
    assert {name for name, entry in manifest.items() if "sha256" in entry} == {
        *("config.yaml", "trainer_state.json", "metrics.jsonl"),
    }


def test_a_checkpoint_keeps_its_position_settings_and_the_metrics_since_the_one_before(saved_run):
    checkpoint = resolve_checkpoint(saved_run[0])
    state = read_state(checkpoint)
    recent = state["progress"].pop("recent")
    assert state["progress"] == {"step": 4, "applied_steps": 4, "skipped_in_a_row": 0}
    rows = read_metrics(saved_run[0])
    assert recent == {name: [row[name] for row in rows] for name in ("loss", "grad_norm")}
    assert (state["world_size"], state["zero_stage"], state["sub_group_size"]) == (1, 0, None)
    assert load_config_of(checkpoint).checkpoint.keep == 2
    assert [json.loads(line)["step"] for line in (checkpoint / "metrics.jsonl").read_text().splitlines()] == [4]


def test_its_weights_are_those_of_the_last_step(saved_run):
    model, after = load_model(resolve_checkpoint(saved_run[0])), saved_run[1]["after"]
    assert not model.training
    assert all(torch.equal(weight, after[f"model.{name}"]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("damage", ["cut", "gone", "longer"])
def test_a_checkpoint_with_a_damaged_file_is_named_and_the_one_before_is_taken(run_dir, damage, only_rank, caplog):
    newest = resolve_checkpoint(run_dir)
    weights = next((newest / "engine").glob("*model_states.pt"))
    if damage == "gone":
        weights.unlink()
    else:
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] if damage == "cut" else content + b"0")
    assert weights.name in str(problem_of(newest))
    assert newest_checkpoint(run_dir, only_rank) == run_dir / "checkpoints" / "step_00000003"
    assert "step_00000004 is incomplete and is not used" in caplog.text
    with pytest.raises(UserError, match="this checkpoint cannot be used"):
        resolve_checkpoint(newest)


def test_a_folder_that_was_never_published_is_no_checkpoint(run_dir, only_rank):
    newest = resolve_checkpoint(run_dir)
    newest.rename(newest.with_name(".partial_step_00000004"))
    assert resolve_checkpoint(run_dir).name == "step_00000003"
    assert newest_checkpoint(run_dir, only_rank) == resolve_checkpoint(run_dir)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(run_dir, only_rank):
    for manifest in run_dir.glob("checkpoints/*/COMPLETE.json"):
        manifest.unlink()
    with pytest.raises(UserError, match="none of the 2 checkpoints can be used"):
        newest_checkpoint(run_dir, only_rank)
    with pytest.raises(UserError, match="none of its 2 checkpoints can be used; step_00000004"):
        resolve_checkpoint(run_dir)


def test_a_new_run_has_no_checkpoint(tmp_path, only_rank):
    assert newest_checkpoint(tmp_path, only_rank) is None
    with pytest.raises(UserError, match="neither a complete checkpoint nor a run folder with one"):
        resolve_checkpoint(tmp_path)
