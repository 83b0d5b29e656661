"""The GPU check runs from end to end without a GPU, at tiny size, and writes down what happened."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import gpu_check_data
from launch.gpu_check_report import read_metrics, summarize_training
from lcl_ds.config import load_config, recipe_path
from lcl_ds.tokens import TextTokenizer
from tests.support.ranks import ROOT

STEPS = ["wheels", "environment", "tests", "ceilings", "bench_losses", "bench_contrastive", "data", "train"]


def run_check(out: Path, **environment: str) -> subprocess.CompletedProcess:
    """``launch/gpu_check.sh --dry`` with this interpreter and the packages that it has."""
    variables = {"OUT": str(out), "PYTHON": sys.executable, "WHEELS": str(out / "none"), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        ["bash", "launch/gpu_check.sh", "--dry"],
        cwd=ROOT,
        env={**os.environ, **variables, **environment},
        capture_output=True,
        text=True,
        timeout=170,
    )


def test_a_dry_check_runs_every_step(tmp_path):
    done = run_check(tmp_path)
    log = (tmp_path / "gpu_check.log").read_text()
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{log}"
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    assert (result["ok"], result["complete"], result["dry"]) == (True, True, True)
    assert [step["name"] for step in result["steps"]] == STEPS
    assert [step["name"] for step in result["steps"] if "skipped" in step] == ["wheels"]
    assert all(step["exit_code"] == 0 and step["seconds"] > 0 and step["limit_s"] for step in result["steps"][1:])
    assert result["environment"]["cuda_available"] is False
    assert result["environment"]["packages"]["deepspeed"]
    assert result["ceilings"]["tiny_shapes"] is True
    assert {(head["vocabulary"], head["leading_dimension"]) for head in result["ceilings"]["head"]} == {
        (131, 131),
        (131, 192),
    }
    training = result["training"]
    assert training["steps"] == len(read_metrics(tmp_path / "gpu_train_metrics.jsonl")) == 2
    # Untrained, a vocabulary of 49,411 costs ln 49,411 = 10.8.
    assert training["first_generation_loss"] == pytest.approx(10.8, abs=0.2)
    assert training["median_step_s"] > 0
    assert training["median_mfu"] is None
    for job in ("losses", "contrastive"):
        benchmark = json.loads((tmp_path / f"gpu_{job}.json").read_text())
        assert benchmark["complete"] is True
        assert [row["status"] for row in benchmark["rows"]] == ["ok", "ok"]
        assert (tmp_path / f"gpu_{job}.png").stat().st_size > 1000
    files = list(tmp_path.iterdir())
    assert len(files) == 7
    assert all(file.is_file() and file.stat().st_size < 2**20 for file in files)
    for text in (log, json.dumps(result)):
        assert str(tmp_path) not in text
        assert str(ROOT) not in text


def test_a_failing_step_stops_no_other(tmp_path):
    (tmp_path / "gpu_losses.json").write_text("{}")
    done = run_check(tmp_path, BUDGET_S="0")
    assert done.returncode == 1
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    assert (result["ok"], result["complete"]) == (False, True)
    assert [step["name"] for step in result["steps"]] == STEPS
    assert [step["exit_code"] for step in result["steps"][1:]] == [124] * (len(STEPS) - 1)
    assert (result["environment"], result["ceilings"], result["training"]) == (None, None, None)
    assert not (tmp_path / "gpu_losses.json").exists()  # an older run's figures are not this one's
    assert "not started" in (tmp_path / "gpu_check.log").read_text()


def test_other_arguments_are_refused():
    done = subprocess.run(["bash", "launch/gpu_check.sh", "--fast"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_the_recipe_and_its_data_fit_together(tmp_path):
    gpu_check_data.build(tmp_path / "data", documents=2, image_size=16)
    tokenizer = TextTokenizer(tmp_path / "data" / "tokenizer")
    assert tokenizer.vocabulary.size == gpu_check_data.VOCABULARY
    sentence = "a large red circle . unused 20000"
    ids = tokenizer.encode(sentence)
    assert tokenizer.decode(ids) == sentence
    assert max(ids) < 1000  # the unused entries stay unused
    config = load_config(recipe_path("gpu_check"))
    assert "vocab_size" not in config.model.decoder.hf_keys
    assert [source.paths for source in config.data.shards] == ["data/gpu_check/documents.tar"]


def test_medians_leave_the_first_steps_out():
    rates = {"data_s": 0.0, "tokens_per_s": 10.0, "images_per_s": 2.0, "padding_fraction": 0.0}
    losses = {"generation_loss": 2.0, "contrastive_loss": 1.0}
    lines = [
        {"step_s": 9.0 if i < 10 else 1.0, "loss": 30 - i, "images": 4, "text_tokens": 8, "applied": i != 3}
        | rates
        | losses
        for i in range(30)
    ]
    summary = summarize_training(lines)
    assert (summary["steps"], summary["steps_in_medians"], summary["skipped_steps"]) == (30, 20, 1)
    assert summary["median_step_s"] == 1.0
    assert (summary["first_loss"], summary["last_loss"]) == (30, 1)
    assert summarize_training(lines[:1])["median_step_s"] == 9.0


def test_half_a_line_of_metrics_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_collected_wheels_are_pinned_once():
    script = (ROOT / "launch" / "collect_wheels.sh").read_text()
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    (ours,) = re.findall(r"^ours=\((.*)\)$", script, re.MULTILINE)
    (peers,) = re.findall(r"^peers=\((.*)\)$", script, re.MULTILINE)
    assert {*ours.split(), "deepspeed"} <= set(pinned)
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", peer) and peer.split("==")[0] not in pinned for peer in peers.split())
