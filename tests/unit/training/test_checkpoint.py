"""Checkpoints are complete or do not exist."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lcl_ds.errors import UserError
from lcl_ds.metrics import read_metrics
from lcl_ds.training.checkpoint import (
    complete_checkpoints,
    hash_of,
    load_config_of,
    load_model,
    newest_checkpoint,
    read_manifest,
    read_state,
    resolve_checkpoint,
)
from lcl_ds.training.monitor import kept_metrics
from lcl_ds.training.saver import best_checkpoint, check_room, publish, remove_old, remove_partial
from lcl_ds.training.slices import Slice, write_slices


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
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert all(entry["sha256"] == hashes[name] for name, entry in manifest.items())
    part = "part_00000_of_00001.safetensors"
    assert manifest.keys() == {
        *("config.yaml", "trainer_state.json", "metrics.jsonl", f"weights/{part}", f"moments/{part}"),
    }


def test_who_may_read_the_folder_may_read_every_file(saved_run):
    checkpoint = resolve_checkpoint(saved_run[0])
    for path in checkpoint.rglob("*.*"):
        assert path.stat().st_mode & 0o666 == path.parent.stat().st_mode & 0o666, path


def test_a_checkpoint_keeps_its_position_settings_and_the_metrics_since_the_one_before(saved_run):
    checkpoint = resolve_checkpoint(saved_run[0])
    state = read_state(checkpoint)
    recent = state["progress"].pop("recent")
    assert state["progress"] == {"step": 4, "applied_steps": 4, "skipped_in_a_row": 0}
    rows = read_metrics(saved_run[0])
    assert recent == {name: [row[name] for row in rows] for name in ("loss", "grad_norm")}
    assert (state["world_size"], state["zero_stage"], state["optimizer_steps"]) == (1, 0, 4)
    assert load_config_of(checkpoint).checkpoint.keep == 2
    assert [json.loads(line)["step"] for line in (checkpoint / "metrics.jsonl").read_text().splitlines()] == [4]


def test_its_weights_are_those_of_the_last_step(saved_run):
    model, after = load_model(resolve_checkpoint(saved_run[0])), saved_run[1]["after"]
    assert not model.training
    assert all(torch.equal(weight, after[f"model.{name}"]) for name, weight in model.named_parameters())


def test_a_file_that_the_manifest_does_not_name_is_not_read(run_dir):
    checkpoint = resolve_checkpoint(run_dir)
    expected = load_model(checkpoint).state_dict()
    other = run_dir / "checkpoints" / "step_00000003" / "weights" / PART
    shutil.copy(other, checkpoint / "weights" / "a_copy_of_an_earlier_part.safetensors")
    assert all(torch.equal(weight, expected[name]) for name, weight in load_model(checkpoint).state_dict().items())


def test_weights_that_the_model_would_leave_behind_are_refused(run_dir):
    checkpoint = resolve_checkpoint(run_dir)
    more = checkpoint / "weights" / "part_00001_of_00002.safetensors"
    write_slices(more, [Slice("model.more", 0, (2,), torch.zeros(2))])
    manifest = json.loads((checkpoint / "COMPLETE.json").read_text())
    manifest[f"weights/{more.name}"] = {"bytes": more.stat().st_size, "sha256": hash_of(more)}
    (checkpoint / "COMPLETE.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="holds model.more, which the model that its settings describe does not have"):
        load_model(checkpoint)


def flip_a_bit(path: Path, place: float) -> None:
    """Change one bit, so far into the file."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)


PART = "part_00000_of_00001.safetensors"
DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights cut short": (f"weights/{PART}", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "weights longer": (f"weights/{PART}", lambda path: path.write_bytes(path.read_bytes() + b"0")),
    "weights gone": (f"weights/{PART}", lambda path: path.unlink()),
    "weights empty": (f"weights/{PART}", lambda path: path.write_bytes(b"")),
    "a bit of the header of weights": (f"weights/{PART}", lambda path: flip_a_bit(path, 0.001)),
    "a bit of weights": (f"weights/{PART}", lambda path: flip_a_bit(path, 0.5)),
    "the last bits of weights": (f"weights/{PART}", lambda path: flip_a_bit(path, 1.0)),
    "a bit of moments": (f"moments/{PART}", lambda path: flip_a_bit(path, 0.7)),
    "moments of zeros": (f"moments/{PART}", lambda path: path.write_bytes(bytes(path.stat().st_size))),
    "a folder for a file": (f"moments/{PART}", lambda path: (path.unlink(), path.mkdir())),
    "a link to nothing": (f"moments/{PART}", lambda path: (path.unlink(), path.symlink_to("elsewhere"))),
    "a bit of the settings": ("config.yaml", lambda path: flip_a_bit(path, 0.4)),
    "settings cut short": ("config.yaml", lambda path: path.write_bytes(path.read_bytes()[:200])),
    "settings gone": ("config.yaml", lambda path: path.unlink()),
    "a bit of the position": ("trainer_state.json", lambda path: flip_a_bit(path, 0.3)),
    "a position of zeros": ("trainer_state.json", lambda path: path.write_bytes(bytes(path.stat().st_size))),
    "metrics gone": ("metrics.jsonl", lambda path: path.unlink()),
    "manifest gone": ("COMPLETE.json", lambda path: path.unlink()),
    "manifest empty": ("COMPLETE.json", lambda path: path.write_bytes(b"")),
    "a manifest without hashes": ("COMPLETE.json", lambda path: path.write_text(SIZES_ALONE)),
    "a hash in the manifest": ("COMPLETE.json", lambda path: path.write_text(path.read_text().replace("a", "b"))),
    "a name in the manifest": ("COMPLETE.json", lambda path: path.write_text(path.read_text().replace("part", LONG))),
    "an entry of the manifest": ("COMPLETE.json", lambda path: path.write_text(path.read_text().replace("bytes", "b"))),
}
LONG = "a" * 300
"""No system has files of such a name, so even the question whether there is one is an error."""
SIZES_ALONE = '{"trainer_state.json": 12, "config.yaml": {"bytes": 3}}'


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_with_its_file_and_the_one_before_is_taken(run_dir, damage, only_rank, caplog):
    name, change = DAMAGE[damage]
    change(run_dir / "checkpoints" / "step_00000004" / name)
    assert newest_checkpoint(run_dir, only_rank) == run_dir / "checkpoints" / "step_00000003"
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "step_00000004 cannot be used: " in warning
    assert name in warning or LONG in warning
    newest = run_dir / "checkpoints" / "step_00000004"
    if not name.startswith(("moments", "metrics")):  # of which a release needs nothing
        with pytest.raises(UserError):
            load_model(resolve_checkpoint(newest))


def test_a_folder_that_was_never_published_is_no_checkpoint(run_dir, only_rank):
    newest = resolve_checkpoint(run_dir)
    newest.rename(newest.with_name(".partial_step_00000004"))
    assert resolve_checkpoint(run_dir).name == "step_00000003"
    assert newest_checkpoint(run_dir, only_rank) == resolve_checkpoint(run_dir)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(run_dir, only_rank):
    for weights in run_dir.glob(f"checkpoints/*/weights/{PART}"):
        flip_a_bit(weights, 0.5)
    with pytest.raises(UserError, match="none of the 2 checkpoints can be used .*checkpoint.ignore_damaged=true"):
        newest_checkpoint(run_dir, only_rank)
    with pytest.raises(UserError, match="hash differs"):
        load_model(resolve_checkpoint(run_dir))


def test_a_run_of_an_earlier_version_says_what_can_go_on_with_it(run_dir, only_rank, caplog):
    for manifest in run_dir.glob("checkpoints/*/COMPLETE.json"):
        entries = json.loads(manifest.read_text()) | {"engine/engine/mp_rank_00_model_states.pt": {"bytes": 3}}
        manifest.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"none of the 2 checkpoints can be used \(see above\)"):
        newest_checkpoint(run_dir, only_rank)
    assert caplog.text.count("is of an earlier version of this program, which alone can continue it") == 2
    with pytest.raises(UserError, match=r"earlier version .* environment.json in the run's folder names its commit"):
        resolve_checkpoint(run_dir)


def test_nor_one_whose_checkpoints_are_gone(run_dir, only_rank):
    for checkpoint in run_dir.glob("checkpoints/step_*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match=r"checkpoints: its checkpoints are gone; restore one of them"):
        newest_checkpoint(run_dir, only_rank)


def test_nor_one_whose_folder_of_checkpoints_is_empty_like_a_disk_that_is_not_mounted(run_dir, only_rank):
    shutil.copy(run_dir / "checkpoints" / "step_00000004" / "config.yaml", run_dir)
    (run_dir / "checkpoints").rename(run_dir / "unmounted")
    (run_dir / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"checkpoints: its checkpoints are gone; restore one of them"):
        newest_checkpoint(run_dir, only_rank)
    first_lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)[:2]
    (run_dir / "metrics.jsonl").write_text("".join(first_lines))  # killed before its first checkpoint was whole
    assert newest_checkpoint(run_dir, only_rank) is None


def test_it_is_begun_again_where_the_user_says_so_and_nothing_of_it_is_thrown_away(run_dir, only_rank):
    for manifest in run_dir.glob("checkpoints/*/COMPLETE.json"):
        manifest.unlink()
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert newest_checkpoint(run_dir, only_rank, ignore_damaged=True) is None
    assert newest_checkpoint(run_dir, only_rank) is None
    assert (run_dir / "metrics.jsonl.damaged1").read_bytes() == before
    kept = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert kept == {"step_00000003.damaged1", "step_00000004.damaged1", "latest.damaged1"}
    assert kept_metrics(run_dir) == []


def test_what_is_kept_for_good_is_not_removed_with_the_old_ones(run_dir):
    folder = run_dir / "checkpoints"
    for step in (1, 2, 5):
        shutil.copytree(folder / "step_00000004", folder / f"step_{step:08d}")
    (folder / "step_00000002" / "config.yaml").unlink()
    remove_old(run_dir, keep=2, keep_every=3)
    assert sorted(path.name for path in folder.glob("step_*")) == [
        *(
            "step_00000002",
            "step_00000003",
            "step_00000004",
            "step_00000005",
        ),  # the second is damaged: not ours to judge
    ]


@pytest.mark.parametrize(
    ("name", "kept"),
    [("generation_loss", 2), ("linear/colour", 1), ("knn/colour", None), (None, None)],
    ids=["lowest loss", "first of the highest", "never measured", "none asked for"],
)
def test_the_best_checkpoint_is_kept_beside_the_newest_and_named(run_dir, name, kept):
    folder = run_dir / "checkpoints"
    figures = {1: (3.0, 0.9), 2: (1.0, 0.8), 3: (2.0, 0.9), 4: (None, None)}
    for step, (loss, accuracy) in figures.items():
        checkpoint = folder / f"step_{step:08d}"
        if not checkpoint.exists():
            shutil.copytree(folder / "step_00000004", checkpoint)
        evaluation = {"generation_loss": loss, "linear/colour": accuracy} if step != 4 else None
        state = json.loads((checkpoint / "trainer_state.json").read_text()) | {"evaluation": evaluation}
        data = json.dumps(state).encode()
        (checkpoint / "trainer_state.json").write_bytes(data)
        manifest = json.loads((checkpoint / "COMPLETE.json").read_text())
        manifest["trainer_state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (checkpoint / "COMPLETE.json").write_text(json.dumps(manifest))
    remove_old(run_dir, keep=1, keep_every=None, best=best_checkpoint(run_dir, name))
    steps = [int(path.name[-1]) for path in sorted(folder.glob("step_*"))]
    assert steps == ([kept, 4] if kept else [4])
    assert (folder / "best").exists() == bool(kept)
    if kept:
        assert (folder / "best").read_text() == f"step_{kept:08d}\n"


def test_an_old_checkpoint_that_cannot_be_removed_is_named_and_none_that_goes_is_seen_in_part(run_dir, caplog):
    folder = run_dir / "checkpoints"
    elsewhere = shutil.move(folder / "step_00000003", run_dir / "elsewhere")
    (folder / "step_00000003").symlink_to(elsewhere)
    shutil.copytree(elsewhere, folder / "step_00000002")
    (folder / ".partial_step_00000002.old").mkdir()
    (folder / ".partial_step_00000002.old" / "file").touch()  # in the way
    remove_old(run_dir, keep=1, keep_every=None)
    assert "step_00000002: cannot be removed: " in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000002", "step_00000004"]
    assert (elsewhere / "COMPLETE.json").exists()
    remove_old(run_dir, keep=1, keep_every=None)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000004"]


def test_a_damaged_checkpoint_makes_way_for_the_one_of_its_step_that_is_whole(run_dir):
    newest = run_dir / "checkpoints" / "step_00000004"
    partial = Path(shutil.copytree(newest, newest.with_name(".partial_step_00000004")))
    flip_a_bit(newest / "weights" / PART, 0.5)
    publish(partial, newest, read_manifest(partial))
    assert load_model(newest)
    remove_old(run_dir, keep=2, keep_every=None)
    assert sorted(path.name for path in newest.parent.iterdir()) == ["latest", "step_00000003", "step_00000004"]


def test_what_an_earlier_start_did_not_finish_is_removed(run_dir, caplog):
    caplog.set_level("INFO")
    (run_dir / "checkpoints" / ".partial_step_00000007" / "weights").mkdir(parents=True)
    stays = run_dir / "checkpoints" / ".partial_of_somebody_else"
    stays.touch()
    remove_partial(run_dir)
    assert list((run_dir / "checkpoints").glob(".partial*")) == [stays]
    assert f"{stays}: cannot be removed: " in caplog.text
    assert ".partial_step_00000007: was not finished" in caplog.text


def test_a_disk_without_room_for_a_checkpoint_is_refused_with_the_numbers(run_dir):
    check_room(run_dir, 1)
    with pytest.raises(UserError, match=r"a checkpoint needs 1e\+09 GB and the disk has .* GB left"):
        check_room(run_dir, 10**18)


def test_a_file_that_a_rank_wrote_elsewhere_keeps_a_checkpoint_from_being_one(run_dir):
    newest = run_dir / "checkpoints" / "step_00000004"
    manifest = read_manifest(newest)
    partial = newest.rename(newest.with_name(".partial_step_00000004"))
    manifest["weights/part_00001_of_00002.safetensors"] = manifest[f"weights/{PART}"]
    with pytest.raises(UserError, match=r"part_00001_of_00002.safetensors: is missing"):
        publish(partial, newest, manifest)
    assert not newest.exists()


def test_a_new_run_has_no_checkpoint(tmp_path, only_rank):
    assert newest_checkpoint(tmp_path, only_rank) is None
    with pytest.raises(UserError, match="neither a complete checkpoint nor a run folder with one"):
        resolve_checkpoint(tmp_path)
