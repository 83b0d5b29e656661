"""Measure what saving and loading cost: ``python -m tests.chaos.checkpoint_cost [--json FILE]``.

A network of 0.3 B weights in fp32 at ZeRO stage 3 on gloo ranks of this machine. Ours, written while training goes on
and written while training waits, against DeepSpeed's own files, its universal checkpoint and torch's distributed
checkpoint, all made of the same state by the same processes on the same disk; then what loading takes on 1, 2 and 4
ranks. Needs about 16 GiB of memory and 15 GB of disk, and an otherwise idle machine.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from lcl_ds.environment import machine, versions
from lcl_ds.files import write_whole
from lcl_ds.training.checkpoint import checkpoint_of
from lcl_ds.training.distributed import RankInfo, init_distributed
from lcl_ds.training.engine import load_engine
from lcl_ds.training.engine_state import HeldPart, held_parts
from lcl_ds.training.loop import Trainer
from lcl_ds.training.pulse import PULSE
from tests.support.rank_tasks.given import trainer_of
from tests.support.ranks import Ranks
from tests.support.small import batch_with_images, small_config

DECODER = (
    "{model_type: llama, hidden_size: 1024, intermediate_size: 4096, num_hidden_layers: 12, num_attention_heads: 8}"
)
VISION = (
    "{model_type: clip_vision_model, hidden_size: 768, intermediate_size: 3072, num_hidden_layers: 12, "
    "num_attention_heads: 12, image_size: 16, patch_size: 8}"
)
SETTINGS = (
    *(f"model.decoder={DECODER}", f"model.vision={VISION}", "train.global_batch_rows=4", "train.warmup_steps=0"),
    *("train.steps=12", "checkpoint.every=4", "checkpoint.keep=9"),
)
STEPS, EVERY = 12, 4
"""The first save makes room in memory; the second is the one that counts."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--rank", nargs=2, metavar=("TASK", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.rank:
        run_as_rank(*arguments.rank)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        figures = {"machine": machine(), "packages": versions(), **measure(Path(temporary))}
    print_figures(figures)
    if arguments.json:
        write_whole(arguments.json, json.dumps(figures, indent=1) + "\n")
    return 0


def measure(folder: Path) -> dict[str, Any]:
    figures: dict[str, Any] = {"save": on_ranks(2, "save", folder)[0], "load": {}}
    for ranks in (1, 2, 4):
        results = on_ranks(ranks, "load", folder)
        figures["load"][ranks] = {name: max(result[name] for result in results) for name in results[0]}
    started = time.perf_counter()
    program = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    arguments = ["--input_folder", str(folder / "deepspeed/x"), "--output_folder", str(folder / "universal")]
    done = subprocess.run([*program, *arguments], check=False, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    result = {"seconds": seconds, "bytes": bytes_of(folder / "universal")}
    figures["save"]["universal, converting"] = {"failed": done.stderr[-500:]} if done.returncode else result
    return figures


def on_ranks(world_size: int, task: str, folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.chaos.checkpoint_cost", "--rank", task, str(folder)]
    ranks = Ranks(world_size, command, folder / "log")
    codes = ranks.wait(1200)
    assert codes == [0] * world_size, ranks.output()
    return [json.loads((folder / f"{task}.{rank}.json").read_text()) for rank in range(world_size)]


def run_as_rank(task: str, folder: str) -> None:
    rank_info = init_distributed()
    result = {"save": measure_saving, "load": measure_loading}[task](rank_info, Path(folder))
    (Path(folder) / f"{task}.{rank_info.rank}.json").write_text(json.dumps(result))


def measure_saving(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, asynchronous in (("ours, while training goes on", True), ("ours, while training waits", False)):
        config = small_config(*SETTINGS, f"checkpoint.asynchronous={asynchronous}")
        batches = [batch_with_images(10 * step + rank_info.rank) for step in range(STEPS)]
        trainer = trainer_of(config, 3, rank_info, batches, folder / name)
        results["weights"] = sum(w.ds_numel for w in trainer.engine.module.parameters())
        results[name] = save_while_training(trainer)
        results[name]["bytes"] = bytes_of(checkpoint_of(folder / name, STEPS))
        if asynchronous:
            trainer.release()
            gc.collect()
    results["DeepSpeed"] = timed(lambda: trainer.engine.save_checkpoint(str(folder / "deepspeed"), tag="x"))
    results["DeepSpeed"]["bytes"] = bytes_of(folder / "deepspeed")
    results["torch distributed"] = timed(lambda: dcp.save(tree_of(trainer.engine), checkpoint_id=folder / "dcp"))
    results["torch distributed"]["bytes"] = bytes_of(folder / "dcp")
    return results


def save_while_training(trainer: Trainer) -> dict[str, float]:
    """Train with three saves, and say what a step and a save took."""
    steps: list[float] = []
    saves: list[float] = []
    take, begin = trainer._step, trainer.saver.begin

    def timed_step() -> Any:
        started = time.perf_counter()
        metrics = take()
        steps.append(time.perf_counter() - started)
        return metrics

    def timed_begin(*arguments: Any) -> Path:
        started = time.perf_counter()
        final = begin(*arguments)
        saves.append(time.perf_counter() - started)
        return final

    trainer._step, trainer.saver.begin = timed_step, timed_begin  # type: ignore[method-assign]
    trainer.train()
    usual = median(steps[1:EVERY])
    return {
        "stall of the first, s": saves[0],
        "stall of the second, s": saves[1],
        "usual step, s": usual,
        "steps while it was written, beyond usual, s": sum(steps[2 * EVERY :]) - EVERY * usual,
        "until published, s": PULSE.save_s or 0.0,
    }


def measure_loading(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    config = small_config(*SETTINGS)
    trainer = trainer_of(config, 3, rank_info, [batch_with_images(rank_info.rank)], folder / "none")
    name = "ours, while training goes on"
    before = peak_gib()
    checkpoint = checkpoint_of(folder / name, STEPS)
    results = {"weights per rank": sum(w.ds_tensor.numel() for w in trainer.engine.module.parameters())}
    results["peak GiB before"] = before
    results["ours, s"] = seconds_of(lambda: load_engine(trainer.engine, checkpoint, rank_info))
    results["ours, peak GiB"] = peak_gib()
    if rank_info.world_size == 2:
        load = lambda: trainer.engine.load_checkpoint(str(folder / "deepspeed"), tag="x")  # noqa: E731
        results["DeepSpeed, s"] = seconds_of(load)
        results["DeepSpeed, peak GiB"] = peak_gib()
    tree = tree_of(trainer.engine)
    results["torch distributed, s"] = seconds_of(lambda: dcp.load(tree, checkpoint_id=folder / "dcp"))
    return results


def tree_of(engine: Any) -> dict[str, DTensor]:
    """See the same state as torch's distributed checkpoint does."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def tensor(part: HeldPart, values: torch.Tensor) -> DTensor:
        size = torch.Size(part.shape).numel()
        return DTensor.from_local(values, mesh, [Shard(0)], run_check=False, shape=torch.Size([size]), stride=(1,))

    parts = held_parts(engine)
    return {f"{kind}/{part.name}": tensor(part, values) for part in parts for kind, values in part.values.items()}


def timed(action: Callable[[], Any]) -> dict[str, float]:
    return {"seconds": seconds_of(action)}


def seconds_of(action: Callable[[], Any]) -> float:
    dist.barrier()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def bytes_of(folder: Path) -> int:
    if dist.is_initialized():
        dist.barrier()
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def print_figures(figures: dict[str, Any]) -> None:
    for part in ("save", "load"):
        print(part)
        for name, values in figures[part].items():
            print(f"  {name}: {json.dumps(values)}")


if __name__ == "__main__":
    sys.exit(main())
