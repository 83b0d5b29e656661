"""Compare planned exchanges with gloo on this machine: ``python -m tests.chaos.plan_exchange``.

Latency and bandwidth of each collective come from two ranks, of the smallest and of the largest size; sizes between and
four ranks are the model's. Four ranks share the cores of the machine, so what all of them send together is what stays
the same. Times are the shortest of several: whatever else runs here lengthens them.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed as dist

from lcl_ds.plan.communication import Network
from lcl_ds.training.distributed import init_distributed
from tests.support.ranks import run_ranks

SIZES = (4_096, 262_144, 4_194_304, 33_554_432)
REPEATS = 15
RANKS = (2, 4)


def measure(out: Path) -> None:
    """One rank: the shortest time of each collective and size."""
    rank_info = init_distributed()
    ranks, times = rank_info.world_size, {}
    for size in SIZES:
        whole, share = torch.ones(size // 4), torch.ones(size // 4 // ranks)
        calls = {
            "sum": lambda whole=whole: dist.all_reduce(whole),
            "gather": lambda whole=whole, share=share: dist.all_gather_into_tensor(whole, share),
            "scatter": lambda whole=whole, share=share: dist.reduce_scatter_tensor(share, whole),
        }
        for name, call in calls.items():
            seconds = []
            for _ in range(REPEATS):
                dist.barrier()
                started = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - started)
            times[f"{name} {size}"] = min(seconds)
    if rank_info.is_first:
        out.write_text(json.dumps(times))
    dist.destroy_process_group()


def measured(ranks: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        run_ranks(ranks, [sys.executable, "-m", "tests.chaos.plan_exchange", "--out", str(out)], Path(folder) / "log")
        return json.loads(out.read_text())


def network_of(times: dict[str, float], name: str, ranks: int) -> Network:
    """Fit two numbers to a collective of two ranks: a pass takes one hop and half of the bytes; a sum, two passes."""
    small, large = SIZES[0], SIZES[-1]
    passes = 2 if name == "sum" else 1
    per_byte = (times[f"{name} {large}"] - times[f"{name} {small}"]) / (large - small) / passes * 2
    latency = max(1e-6, times[f"{name} {small}"] / passes - small * per_byte / 2)
    return Network(ranks, ranks, 2 / ranks / per_byte, 1.0, link_latency_s=latency)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.out:
        measure(arguments.out)
        return 0
    times = {ranks: measured(ranks) for ranks in RANKS}
    print(f"{'ranks':>5} {'collective':10} {'bytes':>12} {'planned ms':>11} {'measured ms':>12} {'ratio':>7}")
    for ranks in RANKS:
        for name in ("sum", "gather", "scatter"):
            network = network_of(times[2], name, ranks)
            for size in SIZES:
                ours, theirs = getattr(network, f"{name}_s")(size), times[ranks][f"{name} {size}"]
                print(f"{ranks:5} {name:10} {size:12,} {1e3 * ours:11.3f} {1e3 * theirs:12.3f} {ours / theirs:7.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
