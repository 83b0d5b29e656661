"""Train on many ranks of this machine: ``python -m tests.chaos.many_ranks [--ranks 1 4 16] [--then 12]``.

Each number of ranks starts, takes 20 steps, saves and ends; then the largest run continues on ``--then`` ranks. The
table shows what a step's time goes to on the first rank: the engine (forward, backward, step), waiting for data, what
ranks tell each other outside of the engine, in which they wait for the slowest, and our own bookkeeping: all the rest
of a step and the line in ``metrics.jsonl``. Where there are more ranks than cores, times are mostly those of waiting
for a core, so the processor time of the bookkeeping is shown as well.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.ranks import Ranks, train_command
from tests.support.runs import metrics_of

STEPS, MORE, FIRST_COUNTED = 20, 4, 5
"""Steps of each run, steps of the continued one, and the first step that is counted: earlier ones warm up."""
ROWS = 48
EXCHANGES = ("all_reduce", "all_gather_into_tensor", "all_gather_object", "gather_object", "broadcast_object_list")
INSIDE = ("engine", "data", "exchange")
"""Parts of a step that are not our own bookkeeping."""
OUT = "MANY_RANKS_OUT"
TIMEOUT_S = 900


class Clock:
    """Adds up where the time of steps goes; parts count within a step alone, and of nested ones the outer."""

    def __init__(self) -> None:
        self.wall, self.processor = Counter[str](), Counter[str]()
        self.part: str | None = None
        self.steps = 0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self.part != ("step" if part in INSIDE else None):
                return function(*args, **options)
            outer, self.part = self.part, part
            wall, processor = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **options)
            finally:
                self.part = outer
                if self.steps >= FIRST_COUNTED:
                    self.wall[part] += time.perf_counter() - wall
                    self.processor[part] += time.thread_time() - processor

        return call

    def summary(self) -> dict[str, float]:
        """Milliseconds of a step by part."""
        counted = self.steps - FIRST_COUNTED
        own = {
            name: values["step"] + values["monitor"] - sum(values[part] for part in INSIDE)
            for name, values in (("own", self.wall), ("own, processor", self.processor))
        }
        parts = {part: self.wall[part] for part in INSIDE} | own
        parts["whole"] = self.wall["step"] + self.wall["monitor"]
        return {name: 1e3 * seconds / counted for name, seconds in parts.items()}


def train_with_clock() -> int:
    """Be one rank: the ordinary program, with clocks around its parts."""
    from torch import distributed as dist

    from lcl_ds.data.stream.loader import BatchLoader
    from lcl_ds.train import main
    from lcl_ds.training import run
    from lcl_ds.training.loop import Trainer
    from lcl_ds.training.monitor import Monitor

    clock, start_engine, step = Clock(), run.start_engine, Trainer._step

    def engine_with_clock(*args: Any, **options: Any) -> Any:
        engine = start_engine(*args, **options)
        for name in ("forward", "backward", "step"):
            setattr(engine, name, clock.timed("engine", getattr(engine, name)))
        return engine

    def counted_step(*args: Any) -> Any:
        result = clock.timed("step", step)(*args)
        clock.steps += 1
        return result

    run.start_engine, Trainer._step = engine_with_clock, counted_step
    Monitor.step = clock.timed("monitor", Monitor.step)
    BatchLoader.__next__ = clock.timed("data", BatchLoader.__next__)
    for name in EXCHANGES:
        setattr(dist, name, clock.timed("exchange", getattr(dist, name)))
    code = main(sys.argv[2:])
    if os.environ["RANK"] == "0":
        Path(os.environ[OUT]).write_text(json.dumps(clock.summary()))
    return code


def run_on(ranks: int, folder: Path, run_dir: Path, steps: int) -> dict[str, float]:
    """Train on that many ranks; returns where the time of a step goes, and the seconds of the whole."""
    overrides = [f"train.steps={steps}", f"train.global_batch_rows={ROWS}", "train.accumulation_steps=1"]
    overrides += ["evaluation.shards=null", "data.lanes=48", "checkpoint.every=1000"]
    python, _, *arguments = train_command(folder / "recipe" / "small.yaml", run_dir, *overrides)
    out = folder / f"clock.{ranks}"
    os.environ[OUT] = str(out)
    started = time.monotonic()
    job = Ranks(ranks, [python, "-m", "tests.chaos.many_ranks", "--as-rank", *arguments], folder / f"log{ranks}")
    codes = job.wait(TIMEOUT_S)
    if set(codes) != {0}:
        print(f"FAULT: {ranks} ranks end with {sorted(set(codes))}\n{job.output()[-6000:]}")
        sys.exit(1)
    done = [row["step"] for row in metrics_of(run_dir)]
    if done != [*range(1, steps + 1)]:
        print(f"FAULT: {ranks} ranks wrote the steps {done}")
        sys.exit(1)
    return json.loads(out.read_text()) | {"seconds": time.monotonic() - started}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--then", type=int, default=12, help="on which the largest run continues; 0: on none")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    from tests.system.conftest import make_recipe

    folder = arguments.folder or Path(tempfile.mkdtemp())
    (folder / "recipe").mkdir(parents=True)
    make_recipe(folder / "recipe")
    print("ranks | step ms | engine | data | exchanges | own bookkeeping | its processor ms | start to end s")
    for ranks in arguments.ranks:
        ms = run_on(ranks, folder, folder / f"run{ranks}", STEPS)
        shares = " | ".join(f"{ms[part] / ms['whole']:6.1%}" for part in ("engine", "data", "exchange", "own"))
        print(
            f"{ranks:5} | {ms['whole']:7.1f} | {shares} | {ms['own, processor']:.2f} | {ms['seconds']:.0f}", flush=True
        )
    if arguments.then:
        most = max(arguments.ranks)
        run_on(arguments.then, folder, folder / f"run{most}", STEPS + FIRST_COUNTED + MORE)
        print(f"ok: {arguments.then} ranks continued what {most} began")
    return 0


if __name__ == "__main__":
    sys.exit(train_with_clock() if sys.argv[1:2] == ["--as-rank"] else main())
