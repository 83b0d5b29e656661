"""A study as a program: killed in the middle of a run, started again, and once more when all is there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lcl_ds.study.__main__ import main
from tests.support.ranks import ROOT

TIMEOUT = 240
PYTHONPATH = f"{ROOT}:{ROOT / 'kernels'}"


def start(folder: Path, study: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "launch" / "study.py"), str(study), "--results", "figures"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.timeout(2 * TIMEOUT)
def test_a_killed_study_goes_on_and_what_has_figures_is_not_run_again(recipe, tmp_path, monkeypatch):
    study = tmp_path / "two.yaml"
    tree = {
        "title": "Two names of one run",
        "question": "Does it go on?",
        "recipe": str(recipe),
        "seeds": [0],
        "overrides": {"train.steps": 14, "checkpoint.every": 4},
        "variants": {"lcl": {}, "the_same": {"objective.contrastive_weight": 0.1}},
        "measurements": [{"tasks": ["knn"], "labels": ["colour"], "features": ["mean"]}],
        "columns": ["knn/*"],
    }
    study.write_text(yaml.safe_dump(tree, sort_keys=False))
    runs = tmp_path / "runs" / "study" / "two"

    killed = start(tmp_path, study)
    ends = time.monotonic() + TIMEOUT
    while not list(runs.glob("lcl-recipe-0-*/checkpoints/latest")):
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < ends
        time.sleep(0.02)
    killed.send_signal(signal.SIGTERM)
    output = killed.communicate(timeout=TIMEOUT)[0]
    assert killed.returncode == 128 + signal.SIGTERM, output
    assert "the same command goes on" in output
    assert not list(tmp_path.glob("figures/*/*.json"))
    (run,) = runs.glob("lcl-recipe-0-????????")
    done = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert 4 <= len(done) < 14

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    assert main([str(study), "--results", "figures", "--keep", "--page", "page.html"]) == 0
    assert "continuing " in run.with_suffix(".log").read_text()
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("figures/two/*.json")}
    assert records.keys() == {"lcl-recipe-0", "the_same-recipe-0"}
    for record in records.values():
        assert record["steps"] == 14
        assert record["images"] > 0
        assert record["curves"]["step"] == list(range(1, 15))
        (figure,) = record["figures"]["trained"]
        assert (figure["task"], figure["label"]) == ("knn", "colour")
    assert records["the_same-recipe-0"]["copy_of"] == "two/lcl-recipe-0"
    assert "copy_of" not in records["lcl-recipe-0"]
    assert records["lcl-recipe-0"]["curves"].keys() == {"step", "images", "contrastive_loss", "generation_loss"}
    page = (tmp_path / "page.html").read_text()
    assert "2 of 2" in page

    assert main([str(study), "--results", "figures", "--runs", "elsewhere"]) == 0
    assert not (tmp_path / "elsewhere").exists()
