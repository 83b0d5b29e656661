"""Kill real runs with SIGKILL again and again: ``python -m tests.chaos.kills [--kills 100] [--seed 0]``.

Each start takes another number of ranks and another ZeRO stage. It is killed at a random moment: the whole job or one
rank, while it trains, while it saves, or while it starts and reads a checkpoint. At the end every step of the run must
be there once and have the losses of a run that was never killed, so that nothing was repeated or left out. Prints a
table; exits 1 when a start did not go on or a figure differs.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml

from lcl_ds.data.demo.corpus import build_demo
from lcl_ds.training.checkpoint import checkpoints_folder, complete_checkpoints, step_of
from tests.support.legs import corpus_settings
from tests.support.ranks import Ranks, train_command
from tests.support.runs import metrics_of
from tests.support.small import small_config

WAYS = ((1, "zero3"), (2, "zero3"), (2, "zero2"), (3, "zero1"), (1, "zero3_offload"), (2, "zero3"), (1, "zero1"))
"""Ranks and engine settings of a start."""
MOMENTS = ("training", "saving", "starting")
TOLERANCE = 1e-5
"""Relative, of losses: fp32 on other numbers of ranks."""
STEPS_PER_KILL = 8
LIMIT_S = 300


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = make_recipe(folder, STEPS_PER_KILL * arguments.kills)
        run_dir = folder / "run"
        killed: Counter[str] = Counter()
        for number in range(arguments.kills):
            killed[kill_once(rng, recipe, run_dir, folder / f"log{number}")] += 1
            print(f"{number + 1:4} killed, {len(metrics_of(run_dir))} steps", flush=True)
        steps = finish(recipe, run_dir, folder / "last", WAYS[1])
        finish(recipe, folder / "whole", folder / "whole-log", WAYS[1], steps)
        for name, count in sorted(killed.items()):
            print(f"{count:4} killed {name}, all went on")
        return compare(metrics_of(run_dir), metrics_of(folder / "whole"))


def make_recipe(folder: Path, steps: int) -> Path:
    demo = folder / "demo"
    build_demo(demo, documents=160, pairs=120, heldout_documents=8, shard_size=64)
    saving = ("checkpoint.every=3", "checkpoint.keep=2", "train.hang_seconds=200", "train.start_hang_seconds=200")
    config = small_config("name=killed", *corpus_settings(demo), f"train.steps={steps}", *saving)
    path = folder / "killed.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def kill_once(rng: random.Random, recipe: Path, run_dir: Path, log: Path) -> str:
    """Start the run in some way, kill it at some moment and say how."""
    world_size, ds_config = rng.choice(WAYS)
    moment, whom = rng.choice(MOMENTS), rng.choice(("the job", "one rank"))
    saved = max((step_of(path) for path in complete_checkpoints(run_dir)), default=0)
    steps = rng.randint(1, 7)
    python, script, *rest = train_command(recipe, run_dir, ds_config=ds_config)
    program = ["-m", "tests.chaos.slow_disk"] if moment == "saving" else [script]
    ranks = Ranks(world_size, [python, *program, *rest], log)
    try:
        if moment == "starting":
            time.sleep(rng.uniform(0.5, 9))
        else:
            wait_until(lambda: has_started(ranks, saved), ranks)
            time.sleep(0.5)  # figures of lost steps are cut off
            wait_until(lambda: len(metrics_of(run_dir)) >= saved + steps, ranks)
            if moment == "saving":
                wait_until(lambda: any(checkpoints_folder(run_dir).glob(".partial_*")), ranks)
            time.sleep(rng.uniform(0, 0.5))
        if whom == "one rank":
            os.kill(rng.choice(ranks.processes).pid, signal.SIGKILL)
            if moment != "starting":  # then they wait for each other, and it is the launcher that ends them
                codes = ranks.wait(LIMIT_S)
                assert all(codes), f"a rank ended well without the others: {codes}"
    finally:
        ranks.kill()
    return f"{whom} while {moment}"


def has_started(ranks: Ranks, saved: int) -> bool:
    """Say whether a start has made its engine and read its checkpoint; that must be the newest one."""
    log = ranks.logs[0].read_text()
    assert "continuing" not in log or f"at step {saved}\n" in log, log
    return "ZeRO stage" in log and (not saved or "continuing" in log)


def wait_until(holds, ranks: Ranks) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline, ranks.output()
        assert all(process.poll() is None for process in ranks.processes), ranks.output()
        time.sleep(0.005)


def finish(recipe: Path, run_dir: Path, log: Path, way: tuple[int, str], steps: int | None = None) -> int:
    """Train a few more steps, or up to ``steps``, and return where the run stands."""
    steps = steps or len(metrics_of(run_dir)) + 5
    world_size, ds_config = way
    # The schedule of the rate stays that of the recipe: a run that is asked to stop is not a shorter one.
    ranks = Ranks(world_size, train_command(recipe, run_dir, ds_config=ds_config), log)
    try:
        wait_until(lambda: len(metrics_of(run_dir)) >= steps, ranks)
    finally:
        ranks.kill()
    return steps


def compare(run: list[dict], whole: list[dict]) -> int:
    """Compare every step of two runs, as far as the shorter goes; returns an exit code."""
    steps = min(len(run), len(whole))
    assert [row["step"] for row in run[:steps]] == list(range(1, steps + 1)), "a step is missing or there twice"
    worst = 0.0
    for one, other in zip(run, whole, strict=False):
        for key in ("loss", "contrastive_loss", "generation_loss"):
            worst = max(worst, abs(one[key] - other[key]) / abs(other[key]))
        counts = ("images", "documents", "tokens")
        assert [one[key] for key in counts] == [other[key] for key in counts], one["step"]
    print(f"{steps} steps, each once, losses within {worst:.1e} of the run that was never killed")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
