"""Trace a few steps with torch's profiler: a file for Perfetto or chrome://tracing, and a table of what costs how much.

A step is divided into parts by ranges that :class:`StepProfiler` opens and closes. Outside of the steps that are asked
for nothing is measured: opening a part is then one comparison.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from lcl_ds.files import sentence_of
from lcl_ds.training.distributed import RankInfo
from lcl_ds.training.pulse import PULSE
from lcl_ds.training.settings import LogSettings

logger = logging.getLogger(__name__)

PROFILES = "profile"
"""The subfolder of a run with the traces."""
StepPart = Literal["data", "vision", "decoder", "losses", "backward", "communication", "optimizer", "bookkeeping"]
"""What a step spends its time on; losses are all of the forward pass but the towers and the pooling."""
RANGE = "lcl_ds."
"""How the names of our ranges begin in a trace."""
COMMUNICATION = ("c10d::", "gloo:", "nccl:", "record_param_comms")
"""How the names of collectives begin."""
AUTOGRAD = "autograd::"
"""How the names of what backward runs in threads of its own begin."""
SHOWN_OPERATIONS = 3
"""Most expensive operations of a part that the table names."""


class StepProfiler:
    """Profiles the steps ``log.profile_steps`` of one rank."""

    def __init__(self, run_dir: Path, settings: LogSettings, rank_info: RankInfo):
        self.folder, self.rank_info = run_dir / PROFILES, rank_info
        wanted = settings.profile_ranks == "all" or rank_info.is_first
        self.steps = settings.profile_steps if wanted else None
        self._running: profile | None = None
        self._first = 0
        self._range: record_function | None = None
        self._hooks: list[Any] = []

    def begin(self, step: int, model: nn.Module) -> None:
        """Begin to profile, if this is the first step of those that are.

        Args:
            model: whose towers get ranges of their own until the last of these steps.
        """
        if self.steps is None or self._running or not self.steps[0] <= step <= self.steps[1]:
            return
        activities = [ProfilerActivity.CPU]
        if self.rank_info.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        towers: dict[StepPart, tuple[str, ...]] = {"vision": ("vision", "pooling"), "decoder": ("decoder",)}
        for part, names in towers.items():
            for name in names:
                self._watch(part, getattr(model, name))
        self._running, self._first = profile(activities=activities), step
        self._running.start()

    def enter(self, part: StepPart | None) -> None:
        """Let what follows count as ``part``, until the next call; None: as none."""
        if self._running is None:
            return
        if self._range is not None:
            self._range.__exit__(None, None, None)
        self._range = None
        if part is not None:
            self._range = record_function(f"{RANGE}{part}")
            self._range.__enter__()

    def end(self, step: int) -> None:
        """End a step; after the last one that is profiled the trace is written and the table printed."""
        self.enter(None)
        if self._running is not None and self.steps is not None and step >= self.steps[1]:
            self._finish(step)

    def close(self, step: int) -> None:
        """Write what was measured where training ends within the steps to be profiled."""
        self.enter(None)
        if self._running is not None:
            self._finish(step)

    def _watch(self, part: StepPart, module: nn.Module) -> None:
        ranges: list[record_function] = []

        def begin(*_: Any) -> None:
            ranges.append(record_function(f"{RANGE}{part}"))
            ranges[-1].__enter__()

        def end(*_: Any) -> None:
            ranges.pop().__exit__(None, None, None)

        self._hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)]

    def _finish(self, step: int) -> None:
        measured, self._running = self._running, None
        assert measured is not None
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        PULSE.begin("profiling", step)
        measured.stop()
        path = self.folder / f"steps_{self._first}_to_{step}_rank_{self.rank_info.rank}.json.gz"
        try:
            path.parent.mkdir(exist_ok=True)
            measured.export_chrome_trace(str(path))
        except OSError as error:
            logger.warning("%s: the trace cannot be written: %s", path, sentence_of(error) or error)
        if self.rank_info.is_first:
            logger.info("trace of steps %d to %d: %s", self._first, step, path)
            table = table_of(costs_by_part(measured.events() or []), step - self._first + 1)
            Console().print(table)


def costs_by_part(events: Iterable[Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """Sum microseconds on the host and on the device by part of a step and operation.

    Time counts for the innermost range that it was spent in, and collectives as communication wherever they are.

    Args:
        events: of torch's profiler.
    """
    costs: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for event in events:
        if event.is_async or (part := part_of_event(event)) is None:
            continue
        host, device = costs[part].get(event.name, (0.0, 0.0))
        costs[part][event.name] = (host + event.self_cpu_time_total, device + event.self_device_time_total)
    return costs


def part_of_event(event: Any) -> str | None:
    """Say which part of a step an event of the profiler belongs to; None: to none, as with what ran beside the step."""
    if event.name.startswith(COMMUNICATION):
        return "communication"
    ancestor = event
    while ancestor is not None:
        if ancestor.name.startswith(COMMUNICATION):
            return "communication"
        if ancestor.name.startswith(RANGE):
            return str(ancestor.name.removeprefix(RANGE))
        if ancestor.name.startswith(AUTOGRAD) and ancestor.cpu_parent is None:  # of a thread of backward's own
            return "backward"
        ancestor = ancestor.cpu_parent
    return None


def table_of(costs: dict[str, dict[str, tuple[float, float]]], steps: int) -> Table:
    """Make a table of what each part of a step costs, with its most expensive operations."""
    has_device = any(device for of_part in costs.values() for _, device in of_part.values())
    table = Table(title=f"Cost of a step by part, mean of {steps}")
    clock = 1 if has_device else 0
    columns = ["part", "host ms", *(["device ms"] if has_device else []), "share", "most expensive operations, ms"]
    for column in columns:
        table.add_column(column, justify="left" if column in (columns[0], columns[-1]) else "right")
    total = sum(time[clock] for of_part in costs.values() for time in of_part.values()) or 1.0
    for part in get_args(StepPart):
        of_part = costs.get(part, {})
        host, device = (sum(time[index] for time in of_part.values()) for index in (0, 1))
        top = sorted(of_part.items(), key=lambda item: -item[1][clock])[:SHOWN_OPERATIONS]
        operations = ", ".join(f"{_shown(name)} {_ms(time[clock], steps)}" for name, time in top if time[clock])
        share = f"{(host, device)[clock] / total:.1%}"
        table.add_row(part, _ms(host, steps), *([_ms(device, steps)] if has_device else []), share, operations)
    return table


def _shown(name: str) -> str:
    """Name an operation in a table: time of a range itself was spent in no operation of torch."""
    return "Python and waiting" if name.startswith(RANGE) else name.removeprefix("aten::")


def _ms(microseconds: float, steps: int) -> str:
    return f"{microseconds / 1000 / steps:.3g}"
