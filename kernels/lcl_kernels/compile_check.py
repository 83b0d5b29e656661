"""Compiles every Triton kernel for GPUs that need not be there: ``python -m lcl_kernels.compile_check [--json F]``.

The losses run as ever, on small CPU tensors, but each launch only compiles, for the target's tile settings. The table
tells registers, spills, shared memory, how many programs fit on a multiprocessor and how many are started there, and
whether the tensor cores' wgmma instruction is used; the exit code is 1 when a kernel does not compile, spills, needs
more shared memory than there is, starts more programs than fit, or misses wgmma on Hopper.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from lcl_kernels.similarity import Block, Kind, OwnPairs


class Multiprocessor(NamedTuple):
    """What one multiprocessor (AMD: compute unit) has for the programs that run on it at the same time."""

    shared: int
    """Bytes of shared memory, of all programs together."""
    most_shared: int
    """Bytes of shared memory that one program can have."""
    reserved: int
    """Bytes of shared memory that each program takes besides its own."""
    warps: int
    registers: int
    """Of 32 bits and one thread, of all warps together."""
    granularity: int
    """Registers of a thread are handed out in multiples of this."""


TARGETS = {
    # CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 ISA: four SIMDs of 512
    # vector registers and eight waves each.
    "sm_80": Multiprocessor(167_936, 166_912, 1024, 64, 2048, 8),
    "sm_90": Multiprocessor(233_472, 232_448, 1024, 64, 2048, 8),
    "sm_100": Multiprocessor(233_472, 232_448, 1024, 64, 2048, 8),
    "gfx942": Multiprocessor(65_536, 65_536, 0, 32, 2048, 8),
}
MULTIPROCESSORS = 132
"""Of the GPUs that are compiled for; the number goes into the kernels as a constant."""
COLUMNS = ("target", "kernel", "setting", "registers", "spills", "shared", "warps", "fit", "started", "hgmma", "error")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcl_kernels.compile_check", description=__doc__)
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    targets = options.target or list(TARGETS)
    if options.here:
        print(json.dumps(compile_all(targets[0])))
        return 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [row for made in pool.map(_in_a_process_of_its_own, targets) for row in made]
    print(f"triton {version('triton')}, torch {version('torch')}", table(rows), sep="\n")
    if options.json:
        result = {"torch": version("torch"), "triton": version("triton"), "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    problems = [problem for row in rows if (problem := problem_of(row))]
    print(*(f"FAILED {problem}" for problem in problems), sep="\n", end="\n" if problems else "")
    print(f"{len(rows)} kernels compiled for {', '.join(targets)}, {len(problems)} problems")
    return 1 if problems else 0


def problem_of(row: dict[str, Any]) -> str | None:
    name = f"{row['target']} {row['kernel']} {row['setting']}"
    if row["error"]:
        return f"{name}: {row['error']}"
    if row["spills"] and "retry" not in row["setting"]:  # those run only when a token costs more than about 70 nats
        return f"{name}: spills {row['spills']} bytes"
    most = TARGETS[row["target"]].most_shared
    if row["shared"] > most:
        return f"{name}: needs {row['shared']} bytes of shared memory, {row['target']} has {most}"
    if row["started"] and row["started"] > row["fit"]:
        return f"{name}: starts {row['started']} programs on each multiprocessor, where {row['fit']} fit"
    if row["hgmma"] is False:
        return f"{name}: no HGMMA instruction"
    return None


def resident_programs(target: str, registers: int, warps: int, shared: int) -> int:
    """How many programs of a kernel fit on a multiprocessor at the same time, `registers` being those of a thread."""
    has = TARGETS[target]
    per_thread = -(-max(1, registers) // has.granularity) * has.granularity
    return min(has.registers // (per_thread * warps), has.warps // warps, has.shared // (shared + has.reserved or 1))


def table(rows: list[dict[str, Any]]) -> str:
    cells = [COLUMNS, *([_shown(row[column]) for column in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _shown(value: Any) -> str:
    return (
        ""
        if value is None
        else {True: "yes", False: "NO"}.get(value, str(value))
        if isinstance(value, bool)
        else str(value)
    )


def _in_a_process_of_its_own(target: str) -> list[dict[str, Any]]:
    """The stand-in driver cannot be taken back, and a compiler that crashes must not end the others."""
    command = [sys.executable, "-m", "lcl_kernels.compile_check", "--here", "--target", target]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return list(json.loads(done.stdout.splitlines()[-1]))
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return [dict.fromkeys(COLUMNS) | {"target": target, "kernel": "all", "setting": "", "error": reason}]


def compile_all(target: str) -> list[dict[str, Any]]:
    """One row for every kernel and setting; must be called once in a process."""
    rows: list[dict[str, Any]] = []
    with compiling_for(target, rows):
        _launch_linear_cross_entropy()
        _launch_contrastive()
        _launch_sigmoid()
    return rows


@contextmanager
def compiling_for(target: str, rows: list[dict[str, Any]]) -> Iterator[None]:
    """Launches compile for `target` and add to `rows`, each kernel and setting once."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from lcl_kernels import tiles

    cuda = target.startswith("sm_")
    arch: int | str = int(target[3:]) if cuda else target
    driver.set_active(_Driver(GPUTarget("cuda" if cuda else "hip", arch, 32 if cuda else 64)))
    launch, seen = JITFunction.run, set()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        row: dict[str, Any] = dict.fromkeys(COLUMNS) | {
            "target": target,
            "kernel": self.__name__,
            "setting": _setting(args, kwargs),
        }
        if (key := (row["kernel"], row["setting"])) in seen:
            return
        seen.add(key)
        rows.append(row)
        try:
            kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
            half = getattr(args[0], "base", args[0]).dtype.itemsize == 2
            row.update(_resources(kernel, wgmma=target == "sm_90" and half and "INNER" in kwargs))
            row["warps"] = kernel.metadata.num_warps
            row["fit"] = resident_programs(target, row["registers"], row["warps"], row["shared"])
            if "PROGRAMS" in kwargs:
                row["started"] = -(-kwargs["PROGRAMS"] // MULTIPROCESSORS)
        except Exception as error:  # every way a compiler can fail belongs into the table
            row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"

    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(tiles, "target_of", return_value=arch if cuda else tiles.HIP),
        mock.patch.object(tiles, "multiprocessors", return_value=MULTIPROCESSORS),
    ):
        yield


class _Driver:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _setting(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """dtype, tile and the flags that are on."""
    first = getattr(args[0], "base", args[0])
    tile = "x".join(str(kwargs[k]) for k in ("ROWS", "COLUMNS", "INNER") if k in kwargs)
    flags = [k.lower() for k, v in kwargs.items() if v is True and k != "UPCAST"]
    return " ".join([str(first.dtype).removeprefix("torch."), *([tile] if tile else []), *flags])


def _resources(kernel: Any, wgmma: bool) -> dict[str, Any]:
    if "amdgcn" in kernel.asm:
        number = lambda name: int(re.search(rf"\.{name}:?\s+(\d+)", kernel.asm["amdgcn"]).group(1))  # type: ignore[union-attr] # noqa: E731
        # Spilled scalar registers go to vector registers, not to memory.
        spills = 4 * number("vgpr_spill_count")
        return {"registers": number("vgpr_count"), "spills": spills, "shared": kernel.metadata.shared}
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target (sm_\w+)", kernel.asm["ptx"]).group(1)  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        command = [
            get_ptxas(kernel.metadata.target.arch).path,
            "-v",
            f"--gpu-name={target}",
            str(source),
            "-o",
            f"{source}.o",
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    number = lambda pattern: int(re.search(pattern, report).group(1))  # type: ignore[union-attr] # noqa: E731
    return {
        "registers": number(r"Used (\d+) registers"),
        "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "shared": kernel.metadata.shared,
        "hgmma": "HGMMA" in kernel.asm["sass"] if wgmma else None,
    }


def _launch_linear_cross_entropy() -> None:
    from lcl_kernels.sweep import Counted, Inputs, Options, Wanted, empty_rows
    from lcl_kernels.triton_linear_cross_entropy import scan, sweep

    # A real vocabulary: how many tiles it has goes into the kernels, and few tiles compile where many do not.
    n, vocab, everything = 64, 49_411, Wanted(True, True, True)
    capped = Options(z_loss=1e-4, softcap=30.0, statistics=True)
    for dtype, options, wanted, width in (
        (torch.bfloat16, Options(), Wanted(True, True, False), 768),
        (torch.bfloat16, Options(), Wanted(), 768),
        (torch.bfloat16, Options(), Wanted(True, True, False), 771),  # rows that no descriptor can serve
        (torch.bfloat16, capped, everything, 768),
        (torch.bfloat16, capped._replace(label_smoothing=0.1), everything, 768),
        (torch.bfloat16, capped._replace(label_smoothing=0.1, predicted=True), everything, 768),
        (torch.bfloat16, Options(statistics=True, predicted=True), everything, 768),
        (torch.bfloat16, Options(softcap=30.0), Wanted(True, True, False), 768),
        (torch.float16, Options(), everything, 768),
        (torch.float16, Options(softcap=30.0, label_smoothing=0.1), everything, 768),
        (torch.float32, Options(), everything, 768),
    ):
        # Weights go into kernels that every product shares, but for those of a smoothed label.
        weights = (
            (False, True) if options.label_smoothing or (dtype, options) == (torch.bfloat16, Options()) else (False,)
        )
        for weighted in weights:
            inputs = Inputs(
                hidden=torch.zeros(n, width, dtype=dtype),
                weight=torch.zeros(vocab, width, dtype=dtype),
                bias=torch.zeros(vocab, dtype=dtype) if wanted.bias else None,
                labels=torch.zeros(n, dtype=torch.int64),
                token_weight=torch.zeros(n) if weighted else None,
                class_weight=torch.zeros(vocab) if weighted else None,
                lse_grad=torch.zeros(n) if weighted and any(wanted) else None,
            )
            rows_made = empty_rows(inputs, options)
            read = scan(inputs, options, None, rows_made)
            labels = torch.zeros_like(read.labels)[: n - weighted]  # nothing has run that would have filled them
            counted = Counted(torch.arange(n - weighted, dtype=torch.int32), labels)
            sweep(inputs, counted, options, wanted, rows_made)


def _launch_contrastive() -> None:
    plain, crowded = Kind(), Kind(positives=True, highest=True)
    # The variant for the own block has all that the other has, and looks for the diagonal besides.
    for kind in (plain, Kind(highest=True), Kind(ignored=True), crowded):
        _launch_pair_losses(kind)
        _launch_block(torch.bfloat16, 768, True, kind, one_sided=kind == plain)
    _launch_block(torch.bfloat16, 768, False, plain)
    for dtype, width in ((torch.bfloat16, 771), (torch.float32, 768), (torch.float16, 768)):
        _launch_block(dtype, width, True, plain)
    _launch_block(torch.bfloat16, 771, True, crowded)


def _launch_block(dtype: torch.dtype, width: int, diagonal: bool, kind: Kind, one_sided: bool = False) -> None:
    from lcl_kernels import triton_contrastive

    x, norms, groups = torch.zeros(256, width, dtype=dtype), torch.zeros(256), torch.zeros(256, dtype=torch.int32)
    grouped = groups if kind.ignored or kind.positives else None
    block = Block(x, x, torch.ones(()), norms, grouped, grouped, diagonal, kind)
    rows, columns = (torch.zeros(256, kind.sums) for _ in range(2))
    triton_contrastive.pair_products(x, x, torch.float32)
    triton_contrastive.statistics(block, rows, columns, first=True, workspace_mb=64.0)
    d_x, d_y = triton_contrastive.pair_gradients(x, x, norms, norms)
    terms = torch.zeros(256, 1 + kind.positives)
    for from_rows, from_columns in ((terms, terms), (terms, None), (None, terms))[: 3 if one_sided else 1]:
        triton_contrastive.gradients(block, from_rows, from_columns, d_x=d_x, d_y=d_y, workspace_mb=64.0)


def _launch_pair_losses(kind: Kind) -> None:
    from lcl_kernels import triton_contrastive

    x, numbers, sums = torch.zeros(256, 64), torch.ones(256), torch.zeros(4, 256, kind.sums)
    for weight in (1.0, numbers):
        pairs = OwnPairs(
            x, x, torch.ones(()), numbers, numbers, numbers, weight, numbers if kind.positives else None, kind
        )
        triton_contrastive.pair_losses(pairs, sums[0], sums)


def _launch_sigmoid() -> None:
    from lcl_kernels import triton_sigmoid_contrastive
    from lcl_kernels.sigmoid_negatives import Block

    for dtype, width in ((torch.bfloat16, 768), (torch.bfloat16, 771), (torch.float16, 768), (torch.float32, 768)):
        x, scale, d_x = torch.zeros(256, width, dtype=dtype), torch.ones(()), torch.zeros(256, width)
        for diagonal, gradients in ((True, True), (True, False), (False, True)):
            block = Block(x, x, scale, scale, diagonal)
            triton_sigmoid_contrastive.negatives(block, gradients=gradients, d_x=d_x, want_y=True, workspace_mb=64.0)


if __name__ == "__main__":
    sys.exit(main())
