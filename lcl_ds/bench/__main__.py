"""``python -m lcl_ds.bench losses|contrastive``: compare the losses of lcl_kernels with those of other projects.

Prints a table per shape: median time of forward and backward, useful TFLOP/s, their share of what a matrix product
reaches in the same run, peak memory without the inputs, and errors against float64. A method that cannot run is named
with the reason. --json keeps everything, and is whole after every row, so an interrupted run leaves what it has.
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lcl_ds.bench.case import Case
from lcl_ds.bench.contrastive import contrastive_cases
from lcl_ds.bench.figures import draw_contrastive, draw_losses
from lcl_ds.bench.losses import loss_cases
from lcl_ds.bench.measure import DeviceLostError
from lcl_ds.bench.peers import CONTRASTIVE, DTYPES, LOSSES, OURS
from lcl_ds.bench.runner import Record, new_record, run_cases
from lcl_ds.bench.table import open_console, show_rows
from lcl_ds.errors import UserError

METHODS = {"losses": LOSSES, "contrastive": CONTRASTIVE}
FIGURES: dict[str, Callable[[dict[str, Any], Path], list[Path]]] = {
    "losses": draw_losses,
    "contrastive": draw_contrastive,
}
LETTERS = {"losses": "N,H,V", "contrastive": "M,D"}
REPEATS = {"cuda": 20, "cpu": 3}


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    command = "python -m lcl_ds.bench " + shlex.join(sys.argv[1:] if argv is None else argv)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` ends a run like Ctrl-C
    try:
        return run(arguments, command)
    except UserError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lcl_ds.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    for job, what in (("losses", "linear layer and cross entropy"), ("contrastive", "symmetric InfoNCE")):
        sub = jobs.add_parser(job, help=what, description=what)
        sub.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
        sub.add_argument("--plots", type=Path, metavar="DIR", help="write PNG files there")
        names = ", ".join(METHODS[job])
        sub.add_argument(
            "--peers", nargs="?", metavar="A,B", help=f"compare {OURS} with these alone (default: all of {names})"
        )
        sub.add_argument(
            "--shape", action="append", default=[], metavar=LETTERS[job], help="may be repeated (default: by device)"
        )
        sub.add_argument("--dtype", choices=list(DTYPES), help="of the inputs (default: bf16 on a GPU, fp32 on a CPU)")
        sub.add_argument("--repeats", type=int, help="timed steps per method (default: 20 on a GPU, 3 on a CPU)")
        sub.add_argument("--seed", type=int, default=0, help="of the data (default: 0)")
        sub.add_argument("--workspace_mb", type=float, help=f"that of {OURS} (default: its own)")
        sub.add_argument("--no_memory", action="store_true", help="do not measure memory")
        if job == "losses":
            sub.add_argument("--valid", metavar="F,F", help="fractions of labels that count (default: by shape)")
            sub.add_argument("--large", action="store_true", help="on a GPU, N 32768, H 4096, V 151936 too")
        else:
            sub.add_argument("--sweep", metavar="M,M", help="measure memory alone at these M too (default: by device)")
            sub.add_argument("--scale", type=float, default=14.3, help="logit scale (default: 14.3)")
    return parser


def run(arguments: argparse.Namespace, command: str) -> int:
    """Measure, print, write.

    Raises:
        UserError: an option that cannot be used.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names, cases = choose_methods(arguments), choose_cases(arguments, device)
    repeats = REPEATS[device] if arguments.repeats is None else arguments.repeats
    if repeats < 1:
        raise UserError(f"--repeats {repeats}: must be 1 or more")
    check_writable(arguments.json, arguments.plots)
    if arguments.no_memory:
        cases = [case for case in cases if case.timed]
    console = open_console()
    if device == "cpu":
        console.print("no GPU: torch paths at small shapes; these are not GPU figures")
    record = new_record(command, arguments.json, cases[0].device, cases[0].dtype)
    show_machine(console, record)
    try:
        run_cases(
            cases,
            names,
            record,
            repeats=repeats,
            memory=not arguments.no_memory,
            show=lambda case, rows: show_rows(console, case, rows),
        )
    except KeyboardInterrupt:
        print("interrupted: what is measured so far is kept", file=sys.stderr)
        return 130
    except DeviceLostError as error:
        print(f"error: the GPU takes no more work from this process: {error}", file=sys.stderr)
        return 1
    finally:
        write_results(console, arguments, record)
    return 0


def choose_methods(arguments: argparse.Namespace) -> list[str]:
    """Names of methods, ours first."""
    known = METHODS[arguments.job]
    if not arguments.peers:
        return list(known)
    asked = [name.strip() for name in arguments.peers.split(",") if name.strip()]
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise UserError(f"--peers: {', '.join(unknown)} is none of {', '.join(known)}")
    return [name for name in known if name == OURS or name in asked]


def choose_cases(arguments: argparse.Namespace, device: str) -> Sequence[Case]:
    dtype = arguments.dtype or ("bf16" if device == "cuda" else "fp32")
    letters = LETTERS[arguments.job]
    shapes: list[Any] = [read_numbers("--shape", text, int, letters) for text in arguments.shape]
    if arguments.workspace_mb is not None and not arguments.workspace_mb > 0:
        raise UserError(f"--workspace_mb {arguments.workspace_mb:g}: must be positive")
    common: dict[str, Any] = {"shapes": shapes, "seed": arguments.seed, "workspace_mb": arguments.workspace_mb}
    if arguments.job == "losses":
        fractions = read_numbers("--valid", arguments.valid, float) if arguments.valid else ()
        if any(fraction > 1 for fraction in fractions):
            raise UserError(f"--valid {arguments.valid}: fractions are at most 1")
        return loss_cases(device, dtype, fractions=fractions, large=arguments.large, **common)
    sweep = None if arguments.sweep is None else read_numbers("--sweep", arguments.sweep, int)
    return contrastive_cases(device, dtype, sweep=sweep, scale=arguments.scale, **common)


def read_numbers(option: str, text: str, kind: type, letters: str | None = None) -> tuple[Any, ...]:
    """Positive numbers between commas; as many as `letters` names."""
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(number > 0 for number in numbers):
        raise UserError(f"{option} {text}: must be positive numbers, {letters or 'separated by commas'}")
    if letters and len(numbers) != len(letters.split(",")):
        raise UserError(f"{option} {text}: must be {letters}, {len(letters.split(','))} numbers")
    return numbers


def check_writable(json_file: Path | None, plots: Path | None) -> None:
    """Before minutes of work, not after them."""
    for option, folder in (("--json", json_file and json_file.parent), ("--plots", plots)):
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{option}: cannot make the folder {folder}: {error.strerror}") from error
        if not os.access(folder, os.W_OK):
            raise UserError(f"{option}: cannot write to {folder}")
    if json_file is not None and json_file.is_dir():
        raise UserError(f"--json {json_file}: is a folder; name a file")


def show_machine(console: Console, record: Record) -> None:
    environment, ceilings = record.document["environment"], record.document["ceilings"]
    machine = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} threads"
    n, dtype = ceilings["matmul_n"], ceilings["matmul_dtype"]
    console.print(
        f"{machine}; torch {environment['torch']}, triton {environment['triton']}; {dtype} matmul of {n}: "
        f"{ceilings['matmul_tflops']:.4g} TFLOP/s, copy: {ceilings['copy_tb_per_s']:.3g} TB/s\n",
        highlight=False,
    )


def write_results(console: Console, arguments: argparse.Namespace, record: Record) -> None:
    """The files that were asked for, of whatever rows there are."""
    record.write()
    if arguments.json:
        console.print(str(arguments.json), highlight=False, soft_wrap=True)
    if arguments.plots:
        for path in FIGURES[arguments.job]({**record.document, "rows": record.rows}, arguments.plots):
            console.print(str(path), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
