"""What a run or a measurement says about where it was made."""

import json
import subprocess

import torch

from lcl_ds import environment
from lcl_ds.environment import PACKAGES, cpu_name, git_commit, git_modified, machine, output_of, version_of, versions
from lcl_ds.training.run_folder import write_run_files
from tests.support.small import small_config


def test_versions_are_those_of_what_is_imported():
    assert versions(["torch", "no-such-package"]) == {"torch": torch.__version__, "no-such-package": None}
    assert version_of("pyyaml") is not None


def test_a_command_that_is_missing_fails_or_is_silent_says_nothing():
    assert output_of("no-such-command") is None
    assert output_of("false") is None
    assert output_of("true") is None
    assert output_of("printf", "one\ntwo\n") == "one\ntwo"


def test_the_commit_is_that_of_the_code_and_changes_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "CODE", tmp_path)
    assert git_commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    assert len(git_commit() or "") == 40
    assert not git_modified()
    (tmp_path / "file").write_text("2")
    assert git_modified()
    assert git_modified("file")
    assert not git_modified("other")


def test_every_start_of_a_run_writes_down_its_machine(tmp_path):
    write_run_files(tmp_path, small_config(), {"steps_per_print": 1}, world_size=2, step=7)
    written = json.loads((tmp_path / "environment.json").read_text())
    assert [*written] == [
        *("argv", "started", "continued_at_step", "world_size", "host", "python", "platform", "gpu", "cpu_count"),
        *("git_commit", "packages"),
    ]
    assert (written["continued_at_step"], written["world_size"]) == (7, 2)
    assert {key: written[key] for key in machine()} == machine()
    assert written["packages"].keys() == set(PACKAGES)
    assert written["git_commit"] == git_commit()
    assert cpu_name()
