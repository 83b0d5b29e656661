"""Sweep over the tile settings of the kernels: ``python -m launch.gpu_check.tune --out FILE --tuned FILE``.

Candidates are compiled and checked against torch's own products in several processes at once; then one process alone
times them. A candidate that fails to compile, spills registers, is wrong, hangs or breaks the GPU's context is written
down and passed over. ``--out`` gets a JSON line per candidate. ``--tuned`` has the winners so far, in the format of
kernels/lcl_kernels/tuned.json, after every group of a kernel and a width; the most important groups come first.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from launch.gpu_check.pool import Answer, Pool, Task, context_is_lost, serve
from lcl_ds.files import write_whole

TRY_S, TIME_S = 60.0, 20.0
"""Limits of one candidate: to compile and check it, and to time it."""
ROUNDS = 3
"""How often the default and the best candidates are timed again, taking turns."""
FINALISTS = 3
GAIN = 0.99
"""A winner takes at most this part of the default's time; else the default stays."""


class Group(NamedTuple):
    """One kernel at one shape: `rows` and `columns` of its output, and the width of its operands."""

    kernel: str
    rows: int
    width: int
    columns: int


GROUPS = (
    Group("logits", 4096, 768, 49411),
    Group("statistics", 16384, 768, 16384),
    Group("gradient", 16384, 768, 16384),
    Group("logits", 4096, 2048, 128256),
    Group("sigmoid", 16384, 768, 16384),
    Group("logits", 2048, 4096, 128256),
    Group("logits", 4096, 512, 49411),
    Group("statistics", 16384, 512, 16384),
    Group("gradient", 16384, 512, 16384),
    Group("sigmoid", 16384, 512, 16384),
    Group("logits_general", 4096, 768, 49411),
    Group("logits_crowded", 4096, 768, 49411),
    Group("statistics_two", 16384, 768, 16384),
    Group("statistics_crowded", 16384, 768, 16384),
    Group("gradient_crowded", 16384, 768, 16384),
    Group("statistics", 16384, 2048, 16384),
    Group("gradient", 16384, 2048, 16384),
    Group("statistics", 16384, 4096, 16384),
    Group("gradient", 16384, 4096, 16384),
)
DRY_GROUPS = (Group("statistics", 24, 16, 24),)

SETTINGS = (  # rows, columns, inner, warps, stages, programs
    (128, 256, 64, 8, 3, 1),
    (128, 256, 64, 8, 4, 1),
    (128, 256, 64, 8, 2, 1),
    (128, 128, 64, 8, 3, 1),
    (128, 128, 64, 8, 2, 2),
    (128, 128, 64, 8, 3, 2),
    (128, 128, 64, 4, 2, 2),
    (128, 128, 64, 4, 3, 2),
    (128, 128, 64, 8, 4, 1),
    (128, 128, 128, 8, 2, 1),
    (128, 128, 64, 4, 4, 1),
    (256, 128, 64, 8, 3, 1),
    (256, 128, 64, 8, 2, 1),
    (128, 256, 32, 8, 4, 1),
    (64, 256, 64, 8, 3, 1),
    (64, 256, 64, 4, 3, 1),
    (64, 256, 64, 4, 2, 2),
    (128, 64, 64, 4, 3, 2),
    (128, 64, 64, 4, 4, 2),
    (64, 128, 64, 4, 3, 2),
    (64, 128, 64, 4, 4, 2),
    (64, 128, 128, 4, 2, 2),
)
HEIGHTS = (4, 16, 32)
"""Of the blocks of tiles, for the best candidates; the others have the default, 8."""
Tile = dict[str, int]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of JSON lines")
    parser.add_argument("--tuned", type=Path, help="file of the winners")
    parser.add_argument("--seconds", type=float, default=300.0, help="for the sweep (default: 300)")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile (default: 8)")
    parser.add_argument("--dry", action="store_true", help="tiny shapes and few candidates, without a GPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        from launch.gpu_check import candidate

        serve(candidate.run, broken=context_is_lost)
        return 0
    if options.out is None or options.tuned is None:
        parser.error("--out and --tuned are needed")
    until = time.monotonic() + options.seconds
    command = [sys.executable, "-m", "launch.gpu_check.tune", "--worker"]
    with (
        Pool(command, options.workers) as compilers,
        Pool(command, 1) as clock,
        options.out.open("w", encoding="utf-8") as out,
    ):
        sweep = Sweep(compilers, clock, until, out)
        return sweep.run(DRY_GROUPS if options.dry else GROUPS, options.tuned, dry=options.dry)


def settings(dry: bool) -> list[Tile]:
    """The candidates of a group."""
    names = ("rows", "columns", "inner", "warps", "stages", "programs")
    return [dict(zip(names, setting, strict=True)) for setting in (SETTINGS[:2] if dry else SETTINGS)]


class Sweep:
    """The pools, the lines and what has won so far."""

    def __init__(self, compilers: Pool, clock: Pool, until: float, out: Any) -> None:
        self.compilers, self.clock, self.until, self.out = compilers, clock, until, out
        self.patience = 1
        self.winners: list[dict[str, Any]] = []

    def run(self, groups: tuple[Group, ...], tuned: Path, *, dry: bool) -> int:
        """1 if the default itself could not be timed in some group that was begun."""
        _, answer = next(self.clock.run([{"do": "describe"}], limit=TRY_S, until=self.until))
        if "device" not in answer:
            print(f"error: no worker came up: {answer}", file=sys.stderr)
            return 1
        if not (answer["gpu"] or dry):
            print("error: no CUDA device; --dry runs tiny shapes without one", file=sys.stderr)
            return 1
        self.patience = 5 if dry else 1  # a dry run may share its machine
        failed = False
        write_whole(tuned, json.dumps(self.winners, indent=1) + "\n")
        for group in groups:
            if group.kernel not in answer["kernels"]:
                self.write({"group": group._asdict(), "message": "this version has no such kernel"})
                continue
            if time.monotonic() > self.until:
                self.write({"group": group._asdict(), "message": "not started: the time is used up"})
                continue
            failed |= not self.tune(group, answer["device"], settings(dry), () if dry else HEIGHTS)
            write_whole(tuned, json.dumps(self.winners, indent=1) + "\n")
        return 1 if failed else 0

    def write(self, line: dict[str, Any]) -> None:
        self.out.write(json.dumps(line) + "\n")
        self.out.flush()
        print(json.dumps(line))

    def tune(self, group: Group, device: str, candidates: list[Tile], heights: tuple[int, ...]) -> bool:
        """Find the best tile of a group; False if its default cannot be timed."""
        usable = list(self.usable(group, [None, *candidates]))
        times = [(self.time(group, tile), tile) for tile in usable]
        timed = sorted(((ms, tile) for ms, tile in times if ms and tile), key=lambda pair: pair[0])
        higher = [{**tile, "group": height} for _, tile in timed[:2] for height in heights]
        again = [(self.time(group, tile), tile) for tile in self.usable(group, higher)]
        timed = sorted([*timed, *((ms, tile) for ms, tile in again if ms and tile)], key=lambda pair: pair[0])
        finalists = [None, *(tile for _, tile in timed[:FINALISTS])]
        rounds = [[self.time(group, tile) for tile in finalists] for _ in range(ROUNDS)]
        medians = [median_of([one[i] for one in rounds]) for i in range(len(finalists))]
        default, *others = medians
        if default is None:
            in_time = time.monotonic() < self.until
            message = "the default could not be timed" if in_time else "not finished: the time is used up"
            self.write({"group": group._asdict(), "message": message})
            return not in_time
        best = min((ms for ms in others if ms is not None), default=default)
        winner = finalists[1 + others.index(best)] if best in others else None
        self.write({"group": group._asdict(), "winner": winner, "time_ms": best, "default_ms": default})
        if winner is not None and best <= GAIN * default:
            record = {"device": device, "kernel": group.kernel, "width": group.width, "columns": group.columns}
            self.winners.append({**record, "tile": winner, "time_ms": best, "default_ms": default})
        return True

    def usable(self, group: Group, tiles: list[Any]) -> Iterator[Any]:
        """The tiles that compile, do not spill and are right; None stands for the default."""
        tasks: list[Task] = [{"do": "try", **group._asdict(), "tile": tile} for tile in tiles]
        good = []
        for task, answer in self.compilers.run(tasks, limit=TRY_S * self.patience, until=self.until):
            if not (answer.get("ok") and not answer.get("spills")):
                self.write({**task, **reason(answer)})
            elif task["tile"] is not None:
                good.append(task["tile"])
        yield from (tile for tile in tiles if tile is None or tile in good)

    def time(self, group: Group, tile: Tile | None) -> float | None:
        """Milliseconds of the kernel alone, None where it cannot be timed."""
        task = {"do": "time", **group._asdict(), "tile": tile}
        for _, answer in self.clock.run([task], limit=TIME_S * self.patience, until=self.until):
            self.write({**task, **reason(answer)})
            return answer.get("ms")
        return None


def reason(answer: Answer) -> Answer:
    """The answer, with the end of a worker as a failure."""
    return {**answer, "ok": False, "message": answer["ended"]} if "ended" in answer else answer


def median_of(times: list[float | None]) -> float | None:
    known = [ms for ms in times if ms is not None]
    return statistics.median(known) if known else None


if __name__ == "__main__":
    # Without a GPU, kernels run in Triton's interpreter; decided before lcl_kernels is imported.
    if "--worker" in sys.argv:
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"
    sys.exit(main())
