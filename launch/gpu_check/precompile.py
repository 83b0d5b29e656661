"""Compile the candidates of ``tune`` for a GPU that is not there: ``python -m launch.gpu_check.precompile [--json F]``.

Shows which tile settings spill registers or need more shared memory than there is, and how many programs fit on a
multiprocessor. With TRITON_CACHE_DIR set, a GPU of that kind finds the kernels there and compiles none of them again:
Triton's key holds what divides the sizes, not the sizes, so tiny tensors make the same kernels as large ones.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import lcl_kernels
import torch
from lcl_kernels import compile_check, linear_operators, tiles
from lcl_kernels.sweep import Counted

from launch.gpu_check import candidate
from launch.gpu_check.tune import settings

TARGET = "sm_90"
VOCABULARIES = (515, 512)
"""One that 16 does not divide, like 49,411, and one that it does, like 128,256."""
COLUMNS = ("kernel", "tile", "function", "setting", "registers", "spills", "shared", "fit", "started", "error")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--kernel", action="append", help="this kernel alone; may be repeated (default: all)")
    options = parser.parse_args(argv)
    rows = []
    for kernel in options.kernel or [name for name in candidate.FUNCTIONS if name in tiles.TILES]:
        for tile in [None, *settings(dry=False)]:
            rows += compile_tile(kernel, tile)
            print(json.dumps({name: rows[-1][name] for name in COLUMNS} if rows else {}), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def compile_tile(kernel: str, tile: dict[str, int] | None) -> list[dict[str, Any]]:
    """A row for each function and setting that calls with this tile launch."""
    made = []
    for columns in VOCABULARIES if kernel.startswith("logits") else VOCABULARIES[1:]:
        rows: list[dict[str, Any]] = []
        task = {"kernel": kernel, "rows": 256, "width": 768, "columns": columns, "tile": tile}
        with compile_check.compiling_for(TARGET, rows), _as_on_a_gpu(), candidate.using(task):
            candidate.step_of(task, "triton")()
        wanted = [row for row in rows if candidate.FUNCTIONS[kernel] in row["kernel"]]
        made += [{**row, "function": row["kernel"], "kernel": kernel, "tile": tile} for row in wanted]
    return made


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """The losses take the Triton backend and low precision for tensors on the CPU, and the caller's word for the rows.

    No kernel runs, so what it would have counted is not there to be checked.
    """
    modules = [module for name, module in sys.modules.items() if name.startswith(lcl_kernels.__name__ + ".")]
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "use_triton"):
                stack.enter_context(mock.patch.object(module, "use_triton", return_value=True))
            if hasattr(module, "operand_dtype"):
                stack.enter_context(mock.patch.object(module, "operand_dtype", lambda tensor: tensor.dtype))
        stack.enter_context(mock.patch.object(linear_operators, "_counted", _as_told))
        yield


def _as_told(scan: object, labels: torch.Tensor, shift: int, counted_rows: int, vocab: int) -> Counted:
    """Stands for linear_operators._counted."""
    rows = torch.arange(counted_rows, dtype=torch.int32)
    return Counted(rows, torch.zeros_like(rows))


if __name__ == "__main__":
    sys.exit(main())
