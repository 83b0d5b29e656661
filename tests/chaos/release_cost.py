"""Measure what releasing an encoder costs: ``python -m tests.chaos.release_cost [--json FILE]``.

Four gloo ranks write a checkpoint of a network of 1 B weights at ZeRO stage 3, by ours and by DeepSpeed, of the same
state. Then ``python -m lcl_ds.convert --part vision`` against DeepSpeed's ``zero_to_fp32``, which makes whole weights
of its own files: seconds and highest resident memory, each in a process of its own. Needs about 16 GiB of memory and
32 GB of disk, and an otherwise idle machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from lcl_ds.environment import machine, versions
from lcl_ds.files import write_whole
from lcl_ds.training.checkpoint import resolve_checkpoint
from lcl_ds.training.distributed import RankInfo, init_distributed
from lcl_ds.training.pulse import PULSE
from tests.support.rank_tasks.given import trainer_of
from tests.support.rank_tasks.steps import empty_objective
from tests.support.ranks import GIVES_MEMORY_BACK, ROOT, Ranks
from tests.support.small import small_config

DECODER = (
    "{model_type: llama, hidden_size: 2048, intermediate_size: 5504, num_hidden_layers: 14, num_attention_heads: 16}"
)
VISION = (
    "{model_type: clip_vision_model, hidden_size: 1024, intermediate_size: 4096, num_hidden_layers: 24, "
    "num_attention_heads: 16, image_size: 16, patch_size: 8}"
)
SETTINGS = (
    f"model.decoder={DECODER}",
    f"model.vision={VISION}",
    "train.global_batch_rows=4",
    "checkpoint.asynchronous=false",
)
RANKS = 4


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--rank", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.rank:
        write_checkpoints(init_distributed(), Path(arguments.rank))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        figures = {"machine": machine(), "packages": versions(), "ranks": RANKS, **compare(Path(temporary))}
    print(json.dumps(figures, indent=1))
    if arguments.json:
        write_whole(arguments.json, json.dumps(figures, indent=1) + "\n")
    return 0


def compare(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.chaos.release_cost", "--rank", str(folder)]
    with mock.patch.dict(os.environ, GIVES_MEMORY_BACK):  # four ranks hardly fit otherwise
        ranks = Ranks(RANKS, command, folder / "log")
    codes = ranks.wait(1800)
    assert codes == [0] * RANKS, ranks.output()
    figures: dict[str, Any] = json.loads((folder / "weights.json").read_text())
    convert = ["-m", "lcl_ds.convert", str(resolve_checkpoint(folder / "ours")), str(folder / "vision")]
    figures["lcl_ds.convert --part vision"] = measured([*convert, "--part", "vision"])
    figures["lcl_ds.convert --part full"] = measured([*convert[:-1], str(folder / "full"), "--part", "full"])
    whole = ["-m", "deepspeed.utils.zero_to_fp32", str(folder / "theirs"), str(folder / "fp32")]
    figures["DeepSpeed zero_to_fp32"] = measured([*whole, "--safe_serialization", "--tag", "x"])
    return figures


def measured(arguments: list[str]) -> dict[str, float]:
    """Run Python with these arguments: seconds, and the highest resident memory in GiB."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, arguments
    return {"seconds": time.perf_counter() - started, "peak_gib": usage.ru_maxrss / 2**20}


def write_checkpoints(rank_info: RankInfo, folder: Path) -> None:
    config = small_config(*SETTINGS)
    objective = empty_objective(config)
    trainer = trainer_of(config, 3, rank_info, [], folder / "ours", objective)
    PULSE.begin("saving", 1)
    trainer.progress.step = 1
    trainer.save()
    trainer.saver.finish()
    trainer.engine.save_checkpoint(str(folder / "theirs"), tag="x")
    if rank_info.is_first:
        weights = {name: sum(w.ds_numel for w in objective.parameters()) for name in ["weights"]}
        weights["vision_weights"] = sum(w.ds_numel for w in objective.model.vision.parameters())
        (folder / "weights.json").write_text(json.dumps(weights))


if __name__ == "__main__":
    sys.exit(main())
