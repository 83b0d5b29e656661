"""Measure what memory a rank needs at ZeRO stage 3: ``python -m tests.chaos.model_memory [--json FILE]``.

A network of 0.29 B weights in fp32 on 1, 2 and 4 gloo ranks of this machine, each in fresh processes. Resident memory
at its highest while the network is built, while the engine starts and in three steps, against what must be there: the
interpreter with its packages, this rank's share of weights, masters, moments and gradients (16 bytes per weight), and,
while building, the largest module. Needs about 12 GiB of memory.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import distributed as dist

from lcl_ds.environment import machine, versions
from lcl_ds.files import write_whole
from lcl_ds.flops import size_of
from lcl_ds.models.build import build_empty_model
from lcl_ds.models.initial import units
from lcl_ds.objectives import build_empty_objective
from lcl_ds.objectives.base import local_normalizers, prepare_network
from lcl_ds.training import engine as training_engine
from lcl_ds.training.distributed import RankInfo, init_distributed
from lcl_ds.training.engine import complete_ds_config, start_engine
from tests.chaos.checkpoint_cost import SETTINGS
from tests.support.ranks import GIVES_MEMORY_BACK, Ranks
from tests.support.small import ROW_TOKENS, VOCABULARY, batch_with_images, small_config

STEPS = 3
GIB = 2**30


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ds_config", type=Path, help="engine settings; default: stage 3 and nothing else")
    parser.add_argument("--rank", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    zero = json.loads(arguments.ds_config.read_text()) if arguments.ds_config else {"zero_optimization": {"stage": 3}}
    if arguments.rank:
        measure(init_distributed(), Path(arguments.rank), zero)
        return 0
    options = ["--ds_config", str(arguments.ds_config)] if arguments.ds_config else []
    figures: dict[str, Any] = {"machine": machine(), "packages": versions(), "settings": zero, "ranks": {}}
    for world_size in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            figures["ranks"][world_size] = on_ranks(world_size, Path(folder), options)
    print_figures(figures)
    if arguments.json:
        write_whole(arguments.json, json.dumps(figures, indent=1) + "\n")
    return 0


def on_ranks(world_size: int, folder: Path, options: list[str]) -> dict[str, float]:
    """Return the largest figure of any rank."""
    os.environ.update(GIVES_MEMORY_BACK)
    command = [sys.executable, "-m", "tests.chaos.model_memory", "--rank", str(folder), *options]
    ranks = Ranks(world_size, command, folder / "log")
    codes = ranks.wait(1200)
    assert codes == [0] * world_size, ranks.output()
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]
    return {name: max(result[name] for result in results) for name in results[0]}


def measure(rank_info: RankInfo, folder: Path, zero: dict[str, Any]) -> None:
    figures: dict[str, float] = {}

    def note(name: str) -> None:
        dist.barrier()
        figures[name] = resident("VmHWM") / GIB
        Path("/proc/self/clear_refs").write_text("5")  # the highest from here on

    config = small_config(*SETTINGS)
    note("base")
    network = build_empty_model(config.model, VOCABULARY.size, ROW_TOKENS)
    objective = build_empty_objective(network, config.objective)
    prepare_network(objective)
    weights, module = (
        size_of(objective.parameters()),
        max(size_of(unit.module.parameters()) for unit in units(objective)),
    )
    place = training_engine.place_weights

    def noted(*arguments: Any) -> Any:
        exact = place(*arguments)
        note("building")
        return exact

    training_engine.place_weights = noted
    engine = start_engine(objective, config, complete_ds_config(zero, config, rank_info.world_size), rank_info)
    note("starting")
    batches = [batch_with_images(10 * step + rank_info.rank) for step in range(STEPS)]
    for batch in batches:
        engine.backward(engine(batch, local_normalizers(engine.module, batch)[0])["loss"])
        engine.step()
    note("training")
    share = 4 * weights / rank_info.world_size / GIB
    figures |= {"weights": weights, "share": share, "module": 4 * module / GIB}
    figures["needed for building"] = figures["base"] + share + figures["module"]
    figures["needed for training"] = figures["base"] + 4 * share
    (folder / f"{rank_info.rank}.json").write_text(json.dumps(figures))


def resident(kind: str) -> int:
    """Return a figure of resident memory of this process in bytes: ``VmRSS`` now, ``VmHWM`` at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{kind}:")).split()[1])


def print_figures(figures: dict[str, Any]) -> None:
    print("GiB of resident memory per rank, highest of any rank")
    for ranks, values in figures["ranks"].items():
        parts = {name: values[name] for name in ("base", "share", "module", "starting")}
        print(f"{ranks} ranks, {values['weights']:,} weights:", ", ".join(f"{k} {v:.2f}" for k, v in parts.items()))
        for phase in ("building", "training"):
            needed = values[f"needed for {phase}"]
            print(
                f"{ranks} ranks, {phase}: {values[phase]:.2f}, needed {needed:.2f}: {values[phase] / needed - 1:+.0%}"
            )


if __name__ == "__main__":
    sys.exit(main())
