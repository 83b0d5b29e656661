"""Run studies: ``python -m lcl_ds.study STUDY ... [--page F]``, which is ``launch/study.py`` as well.

A study (``launch/studies/*.yaml``) names a recipe, variants of it, seeds and budgets. Each run is trained and measured,
and its figures become a small file; a run whose file is there is not run again, on any machine. Ctrl-C stops: the next
start goes on from the checkpoint of the unfinished run.
"""

import argparse
import logging
import sys
from pathlib import Path

from rich.table import Table
from rich.text import Text

from lcl_ds.bench.table import open_console
from lcl_ds.cli import positive, print_errors, program_name, run_command
from lcl_ds.errors import UserError
from lcl_ds.files import check_output, write_whole
from lcl_ds.report.numbers import plural
from lcl_ds.settings import suggest
from lcl_ds.study.execution import Programs, Stopped, Workplace, execute_all
from lcl_ds.study.jobs import Job, Run, budget_name, configs_of, jobs_of, runs_of
from lcl_ds.study.page import study_page
from lcl_ds.study.record import Record, find_record
from lcl_ds.study.settings import Study, load_study, study_path
from lcl_ds.study.tables import markdown_of, summary_of, table_of

RESULTS = Path("bench_results/study")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program_name("study"), description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", metavar="STUDY", help="YAML file, or the name of one in launch/studies")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="run these variants alone")
    parser.add_argument("--seeds", nargs="+", type=int, help="run these seeds of the study alone")
    parser.add_argument("--budgets", nargs="+", type=int, metavar="IMAGES", help="run these budgets alone")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at a time; with several, each uses one core")
    parser.add_argument("--dry_run", action="store_true", help="show what would be run and what it costs, and stop")
    parser.add_argument("--no_run", action="store_true", help="show the figures that are there, and run nothing")
    parser.add_argument("--keep", action="store_true", help="keep run folders with their checkpoints")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"folder for figures (default {RESULTS})")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder for unfinished runs")
    parser.add_argument("--page", type=Path, metavar="F", help="write the page about the studies there")
    parser.add_argument("--columns", nargs="+", metavar="PATTERN", help="figures to show instead of the study's")
    parser.add_argument("--markdown", action="store_true", help="print tables for a page of documentation")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="[%(levelname)s] %(message)s")
    return run_command(lambda: study(arguments))


def study(arguments: argparse.Namespace) -> int:
    """Run what has no figures, then show and write them; returns the exit code.

    Raises:
        UserError: a study is wrong, or runs failed.
    """
    check_output("--page", arguments.page)
    paths = [study_path(name) for name in arguments.studies]
    studies = [(path, load_study(path)) for path in paths]
    for path, of in studies:
        configs_of(of, path)
    if arguments.columns:
        studies = [(path, of.model_copy(update={"columns": arguments.columns})) for path, of in studies]
    # Figures of other settings are found before hours are spent.
    missing = [missing_runs(path, of, arguments) for path, of in studies]
    if arguments.dry_run:
        for (path, of), runs in zip(studies, missing, strict=True):
            show_plan(path, of, jobs_of(of, path, runs) if runs else [])
        return 0
    place = Workplace(arguments.runs, arguments.results, arguments.jobs, arguments.keep)
    programs, problems = Programs(), []
    with programs.listening():
        try:
            for (path, of), runs in zip(studies, missing, strict=True):
                if runs and not arguments.no_run:
                    try:
                        execute_all(of, path, jobs_of(of, path, runs), place, programs)
                    except UserError as error:
                        problems += error.problems
        except Stopped:
            print_errors(["stopped; the same command goes on"])
    show_figures(studies, arguments)
    if problems:
        raise UserError(problems)
    return 128 + programs.received if programs.received else 0


def missing_runs(path: Path, of: Study, arguments: argparse.Namespace) -> list[Run]:
    """List the runs that the command line asks for and that have no figures.

    Raises:
        UserError: the study has no such runs, or there are figures of other settings.
    """
    runs = runs_of(of, path)
    budgets = [budget_name(images) for images in arguments.budgets or ()]
    for option, values, key in (
        ("--only", arguments.only, "variant"),
        ("--seeds", arguments.seeds, "seed"),
        ("--budgets", budgets, "budget"),
    ):
        known = list(dict.fromkeys(getattr(run, key) for run in runs_of(of, path)))
        for value in values or ():
            if value not in known:
                hint = suggest(value, known) if isinstance(value, str) else ""
                raise UserError(f"{option} {value}: {path} has none{hint}; it has {', '.join(map(str, known))}")
        runs = [run for run in runs if not values or getattr(run, key) in values]
    return [run for run in runs if find_record(arguments.results, of, run) is None]


def show_plan(path: Path, of: Study, jobs: list[Job]) -> None:
    """Print the runs that would be made, and what they cost."""
    table = Table(title=Text(f"{path.stem}: {of.title}; {plural(len(jobs), 'run')} to make"))
    for number, column in enumerate(("variant", "budget", "seed", "rows", "steps", "images", "TFLOP")):
        table.add_column(column, justify="left" if number < 2 else "right")
    for job in jobs:
        sizes = (job.run.seed, job.sizes["train.global_batch_rows"], job.sizes["train.steps"])
        spent = (_count(job.images), _count(job.tflop, ".3g"))
        table.add_row(Text(job.run.variant), job.run.budget, *map(str, sizes), *spent)
    table.add_section()
    spent = (_count(sum(job.images or 0 for job in jobs)), _count(sum(job.tflop or 0 for job in jobs), ".3g"))
    table.add_row("all", "", "", "", "", *spent)
    open_console().print(table)


def _count(value: float | None, form: str = ".0f") -> str:
    return f"{value:,{form}}" if value else ""


def records_of(path: Path, of: Study, results: Path) -> tuple[list[Record], int]:
    """Read the figures of all runs of a study that are there, and count those that are not."""
    found = [find_record(results, of, run) for run in runs_of(of, path)]
    records = [record for record in found if record is not None]
    return records, len(found) - len(records)


def show_figures(studies: list[tuple[Path, Study]], arguments: argparse.Namespace) -> None:
    """Print the tables and write the page."""
    console = open_console()
    read = [(path, of, *records_of(path, of, arguments.results)) for path, of in studies]
    for path, of, records, missing in read:
        summary = summary_of(of, records, missing)
        if arguments.columns and records and not summary.columns:
            known = ", ".join(summary.metrics)
            raise UserError(f"--columns {' '.join(of.columns)}: no figure of {path} has such a name; there are {known}")
        if arguments.markdown:
            console.print(markdown_of(summary), markup=False, highlight=False, soft_wrap=True)
        elif records:
            console.print(table_of(of, summary))
        if missing:
            console.print(f"{of.title}: {plural(missing, 'run')} without figures yet", markup=False, highlight=False)
    if arguments.page:
        write_whole(arguments.page, study_page(read))
        console.print(str(arguments.page), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
