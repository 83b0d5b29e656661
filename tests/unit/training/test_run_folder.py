"""Whose a folder is, and what every start of a run leaves in it."""

import json

import pytest
import yaml

from lcl_ds.errors import UserError
from lcl_ds.training.run_folder import check_own_folder, check_run_writable, write_run_files
from tests.support.small import small_config


def start(folder, *overrides, step=0):
    write_run_files(folder, small_config(*overrides), {"zero_optimization": {"stage": 3}}, 1, step)


def test_a_new_or_empty_folder_is_free(tmp_path):
    check_own_folder(tmp_path / "new")
    check_own_folder(tmp_path)
    for name in (".hidden", "slurm-12.out", "train.log"):
        (tmp_path / name).touch()
    check_own_folder(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"photo.jpg": ""},
        {"config.yaml": "learning_rate: 1\n"},
        {"config.yaml": "[a"},
        {"config.yaml": "{name: other, data: mnist, model: resnet, train: {epochs: 3}}"},
        {"config.yaml": "{name: other, data: {root: /d}, model: {}, train: {}}"},
        {"config.yaml": "{name: a, data: {shards: a.tar, tokenizer: t}, model: {}, train: {}, trainer: lightning}"},
        {"history/notes.txt": ""},
        {"history/2024/run.csv": ""},
        {"metrics.jsonl": "{}\n"},
        {"checkpoints/model.ckpt": ""},
        {"checkpoints/step_100/model.pt": ""},
    ],
    ids=lambda files: " ".join(next(iter(files.items()))),
)
def test_a_folder_of_something_else_is_refused(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="is no run's folder; name a new or an empty folder"):
        check_own_folder(tmp_path)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; name a folder"):
        check_own_folder(tmp_path / "file")


def test_checkpoints_that_cannot_be_written_are_said_before_the_work(tmp_path):
    check_run_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    checkpoints = tmp_path / "checkpoints"
    checkpoints.symlink_to(tmp_path / "another_disk")
    with pytest.raises(UserError, match="checkpoints: is a link to .*/another_disk, which is not there; mount or make"):
        check_run_writable(tmp_path)
    (tmp_path / "another_disk").mkdir()
    check_run_writable(tmp_path)
    checkpoints.unlink()
    checkpoints.touch()
    with pytest.raises(UserError, match="checkpoints: cannot be written to"):
        check_run_writable(tmp_path)


@pytest.mark.parametrize("lost", ["config.yaml", "ds_config.json", "environment.json", "history"])
def test_a_run_is_known_by_what_is_left_of_it(tmp_path, lost):
    start(tmp_path)
    (tmp_path / lost).rename(tmp_path.with_name(f"{tmp_path.name}.lost"))
    check_own_folder(tmp_path)


def test_every_start_is_kept(tmp_path):
    start(tmp_path, "train.weight_decay=0.1")
    start(tmp_path, "train.weight_decay=0.3", step=7)
    decay = {
        name: yaml.safe_load((tmp_path / name / "config.yaml").read_text())["train"]["weight_decay"]
        for name in (".", "history/0001", "history/0002")
    }
    assert decay == {".": 0.3, "history/0001": 0.1, "history/0002": 0.3}
    second = json.loads((tmp_path / "history" / "0002" / "environment.json").read_text())
    assert second["continued_at_step"] == 7
    assert second["started"].endswith("+00:00")


def test_what_a_run_had_before_there_was_a_history_becomes_its_first_entry(tmp_path):
    (tmp_path / "config.yaml").write_text("old: 1\n")
    start(tmp_path)
    assert (tmp_path / "history" / "0001" / "config.yaml").read_text() == "old: 1\n"
    assert (tmp_path / "history" / "0002" / "ds_config.json").exists()
