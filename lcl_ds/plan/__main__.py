"""Plan a run: ``lcl plan --recipe R --ds_config D --gpus N --gpu h100|FILE [key.sub=value ...]``."""

import argparse
import math
import sys
from pathlib import Path

from lcl_ds.cli import program_name, run_command
from lcl_ds.errors import UserError

GPUS_PER_HOST = 8
DRAWINGS = (".svg", ".png", ".pdf")
"""How the names of files end that scaling can be drawn to."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; settings of the recipe follow as ``key.sub=value``."""
    parser = argparse.ArgumentParser(
        prog=program_name("plan"), description="Say what a run needs before a GPU is rented: memory, time, money."
    )
    parser.add_argument("--recipe", default="demo", help="YAML file, or the name of one in launch/recipes")
    parser.add_argument("--ds_config", default="zero3", help="DeepSpeed JSON, or the name of one in ds_configs")
    parser.add_argument("--gpus", type=int, default=8, help="all GPUs together (default: 8)")
    parser.add_argument("--gpu", default="h100", help="h100, h200, b200, a100, mi300x, ..., or a YAML or JSON file")
    parser.add_argument("--nodes", type=int, help=f"hosts (default: {GPUS_PER_HOST} GPUs on each)")
    parser.add_argument("--price", type=float, help="dollars of one GPU for one hour")
    parser.add_argument("--text_per_image", type=int, help="text tokens of made-up documents for each image")
    parser.add_argument("--images_per_document", type=int, help="of made-up documents (default: as many as fit)")
    parser.add_argument("--text_vocabulary", type=int, help="text tokens, where the tokenizer is not here")
    parser.add_argument("--like", type=Path, metavar="RUN", help="take what rows hold from a finished run")
    parser.add_argument("--efficiency", type=float, help="fraction of the peak that the towers reach, such as 0.4")
    parser.add_argument("--no_search", action="store_true", help="plan the given settings alone")
    parser.add_argument("--scaling", type=Path, metavar="FILE", help="draw scaling to 4,096 GPUs (.svg, .png, .pdf)")
    parser.add_argument("--check", type=Path, metavar="RUN", help="compare with a finished run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parse_arguments(argv)
    return run_command(lambda: plan(arguments))


def check_values(arguments: argparse.Namespace) -> None:
    """Refuse values that mean nothing. Raises: UserError naming each."""
    problems = []
    for name in ("gpus", "nodes", "text_per_image", "images_per_document", "text_vocabulary"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value}: must be 1 or more")
    if arguments.nodes and arguments.gpus % arguments.nodes:
        problems.append(f"--nodes {arguments.nodes}: {arguments.gpus} GPUs do not divide by it")
    if arguments.price is not None and not 0 <= arguments.price < math.inf:
        problems.append(f"--price {arguments.price}: must not be negative")
    if arguments.efficiency is not None and not 0 < arguments.efficiency <= 1:
        problems.append(f"--efficiency {arguments.efficiency}: must be above 0 and at most 1")
    if arguments.scaling is not None and arguments.scaling.suffix not in DRAWINGS:
        problems.append(f"--scaling {arguments.scaling}: name a file that ends in {', '.join(DRAWINGS)}")
    if problems:
        raise UserError(problems)


def plan(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for; returns the exit code. Imports what takes seconds, once arguments are right."""
    check_values(arguments)
    from lcl_ds.config import ds_config_path, load_config, recipe_path
    from lcl_ds.gpus import gpu_of

    recipe = load_config(recipe_path(arguments.recipe), arguments.overrides)
    gpu = gpu_of(arguments.gpu)
    from lcl_ds.training.preparation import prepare_for_deepspeed

    prepare_for_deepspeed()
    from lcl_ds.plan import check, contents, printing, search
    from lcl_ds.plan.planner import Planner
    from lcl_ds.training.engine import load_ds_config

    config = contents.with_largest_squares(recipe)
    ds_config = load_ds_config(ds_config_path(arguments.ds_config))
    vocabulary, how = contents.vocabulary_of(config, arguments.text_vocabulary)
    text_tokens = arguments.text_per_image or contents.TEXT_TOKENS
    row = contents.made_up_row(config, vocabulary, text_tokens, arguments.images_per_document)
    holds = contents.contents_of(row, config, text_tokens)
    if run := arguments.like or arguments.check:
        holds = contents.contents_of_run(run, config, holds.pairs / max(1.0, holds.images))
    hosts = arguments.nodes or math.ceil(arguments.gpus / GPUS_PER_HOST)
    planner = Planner(
        config,
        ds_config,
        vocabulary.size,
        row,
        holds,
        gpu,
        arguments.gpus,
        hosts,
        arguments.price,
        arguments.efficiency,
    )
    given = planner.plan(planner.given())
    out = printing.console()
    notes = [
        f"rows: {holds.images:.1f} images, {holds.labels:.0f} labels, {holds.tokens:.0f} tokens: {holds.known_from}",
        f"vocabulary: {how}",
        f"attention: {planner.attention}; GPU: {gpu.source}",
    ]
    if recipe.model.vision.resolution == "native":
        side = math.isqrt(planner.objective.model.vision.patch_tokens)
        notes.append(f"images: each counts as {side} x {side} patches, the square for model.vision.max_image_tokens")
    printing.print_plan(given, planner, notes, out)
    if arguments.check:
        compared = check.compare(given, arguments.check, check.ran_on_gpus(arguments.check))
        printing.print_comparison(compared, str(arguments.check), out)
        return 0
    if not arguments.no_search:
        printing.print_search(search.search(planner), given, planner, out)
    if arguments.scaling:
        from lcl_ds.plan import scaling

        points = scaling.scale(planner)
        printing.print_scaling(points, scaling.assumptions(planner), out)
        scaling.draw(points, planner, arguments.scaling)
        out.print(f"drawn: {arguments.scaling}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
