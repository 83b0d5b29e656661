"""The installed package trains from an empty folder: ``pip install .``, then ``lcl train``."""

import json
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser

import pytest

from tests.support.ranks import ROOT
from tests.support.runs import metrics_of

INSTALLED = """
import sys
from importlib import import_module

sys.path.insert(0, sys.argv.pop(1))
import lcl_ds, lcl_kernels
assert all(package.__file__.startswith(sys.path[0]) for package in (lcl_ds, lcl_kernels))
module, function = sys.argv.pop(1).split(":")
sys.argv[0] = "lcl"
sys.exit(getattr(import_module(module), function)())
"""
"""What pip's script ``lcl`` does, with the wheel's content in front of the environment's packages."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, as `pip install .` does; setuptools leaves a build folder beside its source."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    for name in ("lcl_ds", "kernels", "launch", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*command, str(folder), str(source)], check=True, timeout=300)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def lcl(wheel, tmp_path_factory):
    """Run the installed ``lcl`` with these words in a folder that holds nothing; returns its output."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        scripts = ConfigParser()
        scripts.read_string(archive.read(name).decode())
    folder = tmp_path_factory.mktemp("empty")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(*words: str) -> str:
        command = [sys.executable, "-c", INSTALLED, str(site), scripts["console_scripts"]["lcl"], *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.folder = folder
    return run


def test_the_wheel_holds_code_recipes_and_engine_settings_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}

    def files(folder, folder_inside, *patterns):
        return {
            f"{folder_inside}/{path.relative_to(ROOT / folder)}" for p in patterns for path in (ROOT / folder).rglob(p)
        }

    assert names == {
        *files("lcl_ds", "lcl_ds", "*.py", "py.typed", "templates/*"),
        *files("launch/recipes", "lcl_ds/recipes", "*.yaml"),
        *files("launch/studies", "lcl_ds/studies", "*.yaml"),
        *files("ds_configs", "lcl_ds/ds_configs", "*.json"),
        *files("kernels/lcl_kernels", "lcl_kernels", "*.py", "py.typed", "tuned.json"),
    }


def test_it_finds_its_recipes_and_engine_settings_and_trains(lcl, demo_folder):
    shards, tokenizer = f"data.shards={demo_folder}/train-documents-*.tar", f"data.tokenizer={demo_folder}/tokenizer"
    lcl(
        "train",
        "data.demo=null",
        shards,
        tokenizer,
        "evaluation.shards=null",
        "train.steps=1",
        "train.global_batch_rows=2",
    )
    run = lcl.folder / "runs" / "demo"
    assert [row["step"] for row in metrics_of(run)] == [1]
    ds_config = json.loads((run / "ds_config.json").read_text())
    assert ds_config["zero_optimization"]["stage"] == 3
    assert json.loads((run / "environment.json").read_text())["git_commit"] is None
    assert [path.name for path in lcl.folder.iterdir() if not path.name.startswith(".")] == ["runs"]
