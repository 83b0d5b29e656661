"""Where the time of one call goes: ``python -m launch.gpu_check.profiles --out FILE`` writes a JSON line per case.

A line has the kernels of one forward and backward with their launches and times, their sum, the time by events, and
what the CPU takes to enqueue the call. Then come several sizes of the workspace, with time and memory alone.
"""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from launch.gpu_check import lines
from launch.gpu_check.lines import Measurement
from launch.gpu_check.timing import DEVICE, GPU, enqueue_ms, kernels_of, median_ms
from lcl_ds.bench.case import Case
from lcl_ds.bench.contrastive import ContrastiveCase
from lcl_ds.bench.losses import LossCase
from lcl_ds.bench.peers import COUNTED, OURS
from lcl_ds.bench.runner import step

WORKSPACES_MB = (512, 1024, 2048, 4096, 8192)
MOST_KERNELS = 40


def main(argv: list[str] | None = None) -> int:
    return lines.main(__doc__ or "", measurements, argv)


def measurements(dry: bool) -> Iterator[Measurement]:
    """What to measure, most important first."""
    heads = [(8192, 768, 49411), (16384, 2048, 128256), (4096, 4096, 128256)] if not dry else [(16, 32, 131)]
    pairs = [(32768, 768)] if not dry else [(32, 16)]
    device = DEVICE.type
    cases: list[tuple[Case, str]] = [(LossCase(heads[0], "bf16", device, valid=0.12), COUNTED)]
    cases += [(LossCase(shape, "bf16", device), name) for shape in heads for name in (COUNTED, OURS)]
    cases += [(ContrastiveCase(shape, "bf16", device, scale=14.3), OURS) for shape in pairs]
    for case, name in cases:
        yield {"case": f"{case.title}, {name}"}, partial(profile_case, case, name)
    for megabytes in WORKSPACES_MB if not dry else (1,):
        for shape in heads:
            case = LossCase(shape, "bf16", device, workspace_mb=megabytes)
            yield {"case": f"{case.title}, workspace {megabytes} MB"}, partial(time_case, case, COUNTED)
        for widths in pairs:
            block = ContrastiveCase(widths, "bf16", device, workspace_mb=megabytes, scale=14.3)
            yield {"case": f"{block.title}, workspace {megabytes} MB"}, partial(time_case, block, OURS)


def profile_case(case: Case, name: str) -> dict[str, Any]:
    """Kernels and times of one step."""
    loss, inputs = case.methods[name].build(case), case.inputs()
    call = lambda: step(loss, inputs)  # noqa: E731
    kernels = kernels_of(call, 3)
    return {
        "ms": median_ms(call, 10),
        "enqueue_ms": enqueue_ms(call, 10),
        "kernels_ms": sum(row["ms"] for row in kernels),
        "launches": sum(row["launches"] for row in kernels),
        "kernels": kernels[:MOST_KERNELS],
    }


def time_case(case: Case, name: str) -> dict[str, Any]:
    """Time and peak memory of one step."""
    loss, inputs = case.methods[name].build(case), case.inputs()
    ms = median_ms(lambda: step(loss, inputs), 5, warm_up=2)
    if not GPU:
        return {"ms": ms}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(loss, inputs)
    torch.cuda.synchronize()
    return {"ms": ms, "peak_extra_mb": (torch.cuda.max_memory_allocated() - before) / 2**20}


if __name__ == "__main__":
    sys.exit(main())
