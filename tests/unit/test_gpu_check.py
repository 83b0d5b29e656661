"""The GPU check runs from end to end without a GPU, at tiny size, and writes down what happened."""

import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from lcl_kernels import reference_contrastive_loss, reference_linear_cross_entropy, reference_sigmoid_contrastive_loss
from lcl_kernels.tiles import POINTERS, TILES

from launch.gpu_check import data as gpu_check_data
from launch.gpu_check import suite, truth, wheels
from launch.gpu_check.candidate import FUNCTIONS
from launch.gpu_check.pool import Pool
from launch.gpu_check.report import read_lines, summarize_training
from launch.gpu_check.tune import GROUPS, Group, Sweep, settings
from lcl_ds.config import load_config, recipe_path
from lcl_ds.tokens import TextTokenizer
from tests.support.ranks import ROOT

BEFORE = ["wheels", "environment"]
extended = pytest.mark.skipif("EXTENDED_TESTS" not in os.environ, reason="takes a minute: set EXTENDED_TESTS=1")
"""What only a change to the GPU check itself can break."""
STEPS = {
    "first_light": [*BEFORE, "first_light", "sanitizer", "suite"],
    "tune": [*BEFORE, "ceilings", "profiles", "tune"],
    "figures": [*BEFORE, "losses", "data", "train", "contrastive", "sigmoid"],
}


def run_check(command: str, out: Path, **environment: str) -> subprocess.CompletedProcess:
    """``launch/gpu_check.sh COMMAND --dry`` with this interpreter and the packages that it has."""
    variables = {"OUT": str(out), "PYTHON": sys.executable, "WHEELS": str(out / "none"), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        ["bash", "launch/gpu_check.sh", command, "--dry"],
        cwd=ROOT,
        env={**os.environ, **variables, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


def check_result(command: str, out: Path, done: subprocess.CompletedProcess, failing: tuple[str, ...] = ()) -> dict:
    """The JSON document, after what holds for every command."""
    log = (out / f"gpu_{command}.log").read_text()
    result = json.loads((out / f"gpu_{command}.json").read_text())
    assert done.returncode == bool(failing), f"{done.stdout}{done.stderr}{log}"
    assert (result["ok"], result["complete"], result["dry"]) == (not failing, True, True)
    assert [step["name"] for step in result["steps"]] == STEPS[command]
    ran = [step for step in result["steps"] if "skipped" not in step]
    assert [step["name"] for step in ran if step["exit_code"]] == list(failing)
    assert all(step["seconds"] > 0 and step["limit_s"] for step in ran)
    assert result["environment"]["cuda_available"] is False
    assert result["environment"]["packages"]["deepspeed"]
    files = list(out.iterdir())
    assert len([file for file in files if file.is_file()]) <= 8
    assert all(file.stat().st_size < 2**20 for file in files)
    for text in (log, json.dumps(result)):
        assert str(out) not in text
        assert str(ROOT) not in text
    return result


@extended
@pytest.mark.timeout(900)
def test_first_light_goes_on_after_a_step_that_fails(tmp_path):
    broken = tmp_path / "wheels" / "part1" / "broken-1.0-py3-none-any.whl"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no wheel")
    done = run_check("first_light", tmp_path, WHEELS=str(tmp_path / "wheels"))
    result = check_result("first_light", tmp_path, done, failing=("wheels",))
    checks = result["results"]["first_light"]
    assert len(checks) > 30
    assert {"name", "ok", "errors", "seconds", "message"} <= set(checks[0])
    (first,) = [check for check in checks if check["name"] == "linear_half_of_the_labels_count"]
    assert set(first["errors"]) == {"loss", "d_hidden", "d_weight"}
    assert all(0 < error["error"] < error["bar"] for error in first["errors"].values())
    assert {check["name"] for check in checks if check["skipped"]} >= {
        "nothing_waits_for_the_device",
        "memory_stays_within_the_workspace",
    }
    assert result["results"]["suite"][-1]["passed"] > 0


@pytest.mark.timeout(900)
def test_tune_writes_every_candidate_and_the_winners(tmp_path):
    result = check_result("tune", tmp_path, run_check("tune", tmp_path))
    assert [line["what"] for line in result["results"]["ceilings"]][:3] == [
        "square matmul, bf16",
        "copy",
        "linear cross entropy",
    ]
    assert result["results"]["profiles"][0]["launches"] > 10
    (group,) = [line for line in result["results"]["tune"] if "default_ms" in line]
    assert group["group"]["kernel"] == "statistics"
    for record in json.loads((tmp_path / "gpu_tuned.json").read_text()):  # none where nothing beat the default
        assert record["time_ms"] < record["default_ms"]


@extended
@pytest.mark.timeout(900)
def test_figures_compares_and_trains(tmp_path):
    (tmp_path / "gpu_losses.json").write_text('{"rows": [{"an older": "run"}]}')
    result = check_result("figures", tmp_path, run_check("figures", tmp_path))
    training = result["training"]
    assert training["steps"] == len(read_lines(tmp_path / "gpu_train_metrics.jsonl")) == 2
    # Untrained, a vocabulary of 49,411 costs ln 49,411 = 10.8.
    assert training["first_generation_loss"] == pytest.approx(10.8, abs=0.2)
    assert training["median_step_s"] > 0
    assert training["median_mfu"] is None
    for job in ("losses", "contrastive", "sigmoid"):
        benchmark = json.loads((tmp_path / f"gpu_{job}.json").read_text())
        assert benchmark["complete"] is True
        assert benchmark["rows"][0]["status"] == "ok"


def test_a_step_that_hangs_is_ended_at_its_limit(tmp_path):
    """The interpreter of this check never comes back from the first measurement."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/usr/bin/env bash
case "$*" in
  *assemble* | *"report gpu"*) exec {sys.executable} "$@" ;;
  *ceilings*) sleep 4321 & echo $! > {tmp_path}/pid; wait ;;
esac
"""
    )
    python.chmod(0o755)
    began = time.monotonic()
    done = run_check("tune", tmp_path / "out", PYTHON=str(python), BUDGET_S="9")
    assert time.monotonic() - began < 60
    assert done.returncode == 1
    result = json.loads((tmp_path / "out" / "gpu_tune.json").read_text())
    assert (result["ok"], result["complete"], result["environment"]) == (False, True, None)
    steps = {step["name"]: step for step in result["steps"]}
    assert list(steps) == STEPS["tune"]
    assert [steps[name]["timed_out"] for name in ("ceilings", "profiles", "tune")] == [True] * 3
    assert steps["ceilings"]["seconds"] >= 5
    assert steps["tune"]["seconds"] < 1
    assert "not started" in (tmp_path / "out" / "gpu_tune.log").read_text()
    state = Path(f"/proc/{int((tmp_path / 'pid').read_text())}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"  # ended, and perhaps not yet buried


@pytest.mark.parametrize("arguments", [["--fast"], [], ["tune", "--fast"], ["all", "--dry"]])
def test_other_arguments_are_refused(arguments):
    done = subprocess.run(["bash", "launch/gpu_check.sh", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage" in done.stderr


WORKER = [
    sys.executable,
    "-c",
    """
import os, time
from launch.gpu_check.pool import serve
lost = []
def run(task):
    if task["do"] == "raise":
        raise ValueError("no such tile")
    if task["do"] == "hang":
        time.sleep(1000)
    if task["do"] == "crash":
        os.abort()
    if task["do"] == "lose":
        lost.append(True)
    return {"pid": os.getpid(), "ms": task.get("ms"), "ok": task.get("ok", True), "spills": task.get("spills", 0)}
serve(run, broken=lambda: bool(lost))
""",
]


def test_a_task_that_hangs_or_crashes_loses_nothing_but_itself():
    kinds = ["plain", "raise", "plain", "hang", "plain", "crash", "lose", "plain"]
    with Pool(WORKER, 1, {"PYTHONPATH": str(ROOT)}) as pool:
        tasks = [{"do": kind} for kind in kinds]
        answers = [answer for _, answer in pool.run(tasks, limit=2, until=time.monotonic() + 60)]
        assert answers[1]["message"] == "ValueError: no such tile"
        assert "no answer within 2 s" in answers[3]["ended"]
        assert "SIGABRT" in answers[5]["ended"]
        assert answers[6]["broken"] is True
        pids = [answers[i]["pid"] for i in (0, 2, 4, 6, 7)]
        assert pids[0] == pids[1]
        assert len(set(pids)) == 4
        (late,) = pool.run([{"do": "plain"}], limit=2, until=time.monotonic() - 1)
        assert "time is used up" in late[1]["ended"]


class Tiles:
    """A pool whose answers follow from the tile of a task."""

    def __init__(self, answer):
        self.answer = answer

    def run(self, tasks, *, limit, until):
        for task in tasks:
            yield task, self.answer(task["tile"])


def test_the_fastest_tile_wins_that_is_right_and_does_not_spill(tmp_path):
    def tried(tile):
        if tile is None or tile["stages"] == 3:
            return {"ok": True, "spills": 0}
        return {"ok": True, "spills": 8} if tile["stages"] == 4 else {"ok": False, "message": "wrong"}

    def timed(tile):
        if tile is None:
            return {"ms": 1.0, "ok": True}
        return {"ms": tile["columns"] / 256 + tile.get("group", 8) / 1000, "ok": True}

    group = Group("logits", 64, 768, 1000)
    with (tmp_path / "lines").open("w") as out:
        sweep = Sweep(Tiles(tried), Tiles(timed), time.monotonic() + 60, out)
        assert sweep.tune(group, "a GPU", settings(dry=False), (4, 16))
        slow = Sweep(
            Tiles(tried), Tiles(lambda tile: {"ms": 1.0 if tile is None else 0.995}), time.monotonic() + 60, out
        )
        assert slow.tune(group, "a GPU", settings(dry=False), ())
        lost = Sweep(Tiles(tried), Tiles(lambda tile: {"ended": "crash"}), time.monotonic() + 60, out)
        assert not lost.tune(group, "a GPU", settings(dry=False), ())
    (record,) = sweep.winners
    assert record["tile"] | {"columns": 64, "stages": 3, "group": 4} == record["tile"]
    assert (record["device"], record["kernel"], record["width"], record["columns"]) == ("a GPU", "logits", 768, 1000)
    assert record["time_ms"] < record["default_ms"] == 1.0
    assert slow.winners == []  # half a percent is noise
    passed_over = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert any(line.get("spills") for line in passed_over)
    assert any(line.get("message") == "wrong" for line in passed_over)


def test_tune_knows_the_kernels_by_their_names():
    for module in ("triton_linear_cross_entropy", "triton_contrastive", "triton_sigmoid_contrastive"):
        importlib.import_module(f"lcl_kernels.{module}")
    modules = [module for name, module in sys.modules.items() if name.startswith("lcl_kernels.")]
    kernels = [name for module in modules for name in vars(module) if name.endswith("_kernel")]
    assert {group.kernel for group in GROUPS} == set(FUNCTIONS) == set(TILES) - {POINTERS}
    assert all(any(part in name for name in kernels) for part in FUNCTIONS.values())


@extended
def test_candidates_are_compiled_for_a_gpu_that_is_not_there(tmp_path):
    """One tile of two kernels, in a process of its own: the stand-in for the GPU's driver cannot be taken back."""
    program = (
        "from launch.gpu_check.precompile import compile_tile\n"
        "for kernel in ('logits', 'statistics'):\n"
        "    for row in compile_tile(kernel, {'rows': 64, 'columns': 128, 'inner': 64, 'warps': 4, 'stages': 3}):\n"
        "        print(kernel, row['error'], '64x128x64' in row['setting'])\n"
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    # The loss also has variants of the kernel that take another tile.
    found = set(done.stdout.splitlines()) - {"statistics None False"}
    assert found == {"logits None True", "statistics None True"}


def test_chosen_steps_alone_are_run(tmp_path):
    done = run_check("tune", tmp_path, STEPS="ceilings")
    assert done.returncode == 0, done.stderr
    steps = {step["name"]: step for step in json.loads((tmp_path / "gpu_tune.json").read_text())["steps"]}
    assert {name: "skipped" in step for name, step in steps.items()} == {
        "wheels": True, "environment": False, "ceilings": False, "profiles": True, "tune": True,
    }  # fmt: skip


def wheel(folder: Path, name: str, size: int) -> None:
    """A wheel of one module with so many random bytes beside it."""
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        archive.writestr(f"{name}/library.so", os.urandom(size))
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")


def test_wheels_travel_in_parts_and_large_ones_in_pieces(tmp_path, capfd):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    wheel(whole, "small", 10_000)
    wheel(whole, "large", 5_000_000)
    made = wheels.pack(whole, parts, part_bytes=2_000_000)
    assert [part.name for part in made] == ["part1", "part2", "part3"]
    assert all(sum(file.stat().st_size for file in part.iterdir()) <= 2_000_000 for part in made)
    wheels.install(parts, tmp_path / "site")
    assert (tmp_path / "site" / "large" / "library.so").stat().st_size == 5_000_000
    next(made[1].iterdir()).unlink()
    wheels.install(parts, tmp_path / "partly")
    assert "left out: large-1.0-py3-none-any.whl, of which 2 of 3 pieces are here" in capfd.readouterr().out
    assert (tmp_path / "partly" / "small").is_dir()
    assert not (tmp_path / "partly" / "large").exists()


def test_compiled_kernels_are_unpacked_where_the_versions_agree(tmp_path, capfd):
    (tmp_path / "part1").mkdir()
    tag = f"{version('triton')}-cp{sys.version_info.major}{sys.version_info.minor}"
    with tarfile.open(tmp_path / "part1" / f"triton_cache-{tag}.tar.xz", "w:xz") as archive:
        archive.add(__file__, "KEY/kernel.cubin")
    (tmp_path / "part1" / "triton_cache-1.0-cp30.tar.xz").write_bytes(b"of another Triton")
    wheels.unpack_cache(tmp_path, tmp_path / "cache")
    assert (tmp_path / "cache" / "KEY" / "kernel.cubin").is_file()
    (tmp_path / "part1" / f"triton_cache-{tag}.tar.xz").unlink()
    wheels.unpack_cache(tmp_path, tmp_path / "cache")
    assert f"no triton_cache-{tag}; there are triton_cache-1.0-cp30.tar.xz" in capfd.readouterr().out


@pytest.mark.parametrize("chunk_bytes", [2**29, 8 * 40])
def test_the_truth_in_chunks_is_that_of_the_references(monkeypatch, chunk_bytes):
    monkeypatch.setattr(truth, "CHUNK_BYTES", chunk_bytes)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(9, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (3.0, -2.0))
    reference_contrastive_loss(x, y, scale).backward()
    found = truth.exact_contrastive(x, y, scale)
    for name, tensor in zip(("d_x", "d_y", "d_scale"), (x, y, scale), strict=True):
        torch.testing.assert_close(found[name], tensor.grad, rtol=1e-10, atol=1e-14)
        tensor.grad = None
    loss = reference_sigmoid_contrastive_loss(x, y, scale, bias)
    loss.backward()
    found = truth.exact_sigmoid(x, y, scale, bias)
    torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-8, atol=0)
    for name, tensor in zip(("d_x", "d_y", "d_scale", "d_bias"), (x, y, scale, bias), strict=True):
        torch.testing.assert_close(found[name], tensor.grad, rtol=1e-8, atol=1e-14)
    hidden, weight = (torch.randn(n, 4, dtype=torch.float64, generator=generator, requires_grad=True) for n in (9, 7))
    labels, upstream = torch.tensor([0, 6, -100, 3, 3, 2, -100, 1, 5]), torch.rand(9, dtype=torch.float64)
    offset = torch.randn(7, dtype=torch.float64, generator=generator, requires_grad=True)
    rows = reference_linear_cross_entropy(hidden, weight, labels, bias=offset, reduction="none", softcap=5.0)
    (rows * upstream).sum().backward()
    found = truth.exact_linear(hidden, weight, labels, offset, upstream, softcap=5.0)
    wanted = {"row_loss": rows.detach(), "d_hidden": hidden.grad, "d_weight": weight.grad, "d_bias": offset.grad}
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-14)


def test_the_suite_begins_with_what_only_a_gpu_shows():
    files = suite.ordered([*(ROOT / "tests" / "kernels").glob("test_*.py")])
    names = [Path(file).name for file in files]
    assert names[0] == "test_gpu.py"
    assert names[-1] in suite.LAST
    assert set(suite.FIRST) | set(suite.LAST) <= set(names)


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


def test_half_a_line_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}]
    assert read_lines(tmp_path / "none.jsonl") == []


def test_collected_wheels_are_pinned_once():
    script = (ROOT / "launch" / "collect_wheels.sh").read_text()
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    lists = dict(re.findall(r"^(ours|peers|cutlass)=\(([^)]*)\)$", script, re.MULTILINE))
    assert {*lists["ours"].split(), "deepspeed"} <= set(pinned)
    others = [*lists["peers"].split(), *lists["cutlass"].split()]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", peer) and peer.split("==")[0] not in pinned for peer in others)
