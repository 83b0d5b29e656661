"""The worked examples of docs/extending.md, run in a copy of the project to which their files were added."""

import os
import shutil
import subprocess
import sys

import pytest

from lcl_ds.errors import UserError
from tests.support.pages import blocks_of
from tests.support.ranks import ROOT
from tests.support.small import small_config, small_model

BLOCKS = [block for block in blocks_of(ROOT / "docs" / "extending.md") if block.language == "python"]
EXAMPLES = sorted({block.heading for block in BLOCKS})


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the package with the files of all examples."""
    copy = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "lcl_ds", copy / "lcl_ds", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    for name in ("kernels", "launch", "tests"):
        (copy / name).symlink_to(ROOT / name)
    for block in BLOCKS:
        if block.file:
            with (copy / block.file).open("a") as file:
                file.write(f"\n\n{block.text}" if file.tell() else block.text)
    return copy


def test_the_four_examples_are_there():
    assert EXAMPLES == ["A corpus format", "A decoder family", "An encoder family", "An objective"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_changes_at_most_one_file_of_the_project(example):
    files = {block.file for block in BLOCKS if block.heading == example and block.file}
    assert len([file for file in files if (ROOT / file).exists()]) <= 1
    assert len(files) <= 2


@pytest.mark.timeout(600)
def test_the_examples_run(extended):
    program = "\n".join(
        f"print({block.heading!r}, flush=True)\nexec({block.text!r}, {{}})" for block in BLOCKS if not block.file
    )
    (extended / "examples.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": f"{extended}:{extended / 'kernels'}"}
    ran = subprocess.run(
        [sys.executable, "examples.py"], cwd=extended, env=environment, capture_output=True, text=True, timeout=500
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert [line for line in ran.stdout.splitlines() if line in EXAMPLES]
    assert "parity with the training model: max abs difference 0.0e+00" in ran.stdout


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("objective={name: alignment}", "there is no 'alignment'"),
        ("model.vision={model_type: chinese_clip_vision_model}", "chinese_clip_vision_model: not supported"),
        ("model.decoder={model_type: gpt_neox, hidden_size: 32, num_attention_heads: 2}", "gpt_neox: no final norm"),
    ],
)
def test_without_its_file_an_example_is_refused(setting, reason):
    with pytest.raises(UserError, match=reason):
        small_model(small_config(setting))
