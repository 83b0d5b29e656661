"""``python -m lcl_ds.data``: make shards, check them, look into them, write a recipe for them."""

import argparse
import json
import logging
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lcl_ds.cli import positive, program_name, run_command
from lcl_ds.data.contents import MEASURED_SAMPLES, measure
from lcl_ds.data.corpora import READERS
from lcl_ds.data.corpora.build import build
from lcl_ds.data.corpora.build_folder import HELD_OUT
from lcl_ds.data.corpora.build_unit import EXAMPLES
from lcl_ds.data.corpora.check import check_shards, show, total_of
from lcl_ds.data.corpora.inputs import FOLDERS, local_files
from lcl_ds.data.corpora.links import list_urls, tried_links
from lcl_ds.data.corpora.record import ReadOptions
from lcl_ds.data.documents import MAX_TEXT_BYTES
from lcl_ds.data.info import RowFacts, facts_of, show_facts
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.storage import expand_paths
from lcl_ds.errors import UserError
from lcl_ds.files import check_output, printable, write_whole

WIDTH = 150
"""Columns where the output is no terminal."""
CPUS = os.cpu_count() or 1


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(prog=program_name("data"), description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = ReadOptions()

    make = commands.add_parser("build", help="your own images or files of a published corpus to shards with an index")
    make.add_argument(
        "files", nargs="+", metavar="FILE", help="input files, or a folder of images; globs and braces in quotes work"
    )
    make.add_argument("out", type=Path, metavar="OUT", help="new folder, or one with an unfinished build to go on with")
    make.add_argument("--format", required=True, choices=sorted(READERS))
    make.add_argument("--images", nargs="+", type=Path, default=[], metavar="PATH", help="folders or tars of images")
    make.add_argument(
        "--holdout", type=_fraction, default=0.0, metavar="F", help="fraction of documents for OUT/heldout, as in 0.01"
    )
    make.add_argument("--image-column", nargs="+", default=[], metavar="NAME", help="tables: columns of images")
    make.add_argument("--text-column", nargs="+", default=[], metavar="NAME", help="tables: columns of texts")
    make.add_argument("--caption", metavar="TEXT", help="of images without text, as in 'a photo of a {label}'")
    make.add_argument("--workers", type=positive, default=CPUS, help=f"processes (default {CPUS})")
    make.add_argument("--shard-samples", type=positive, default=1000, help="samples of a shard (default 1000)")
    make.add_argument("--deduplicate", action="store_true", help="keep the first of documents with equal content")
    make.add_argument("--skip-unreadable", action="store_true", help="go on without files that cannot be read")
    make.add_argument("--min-similarity", type=float, default=defaults.min_similarity, help="MMC4 (default 0.24)")
    make.add_argument("--images-per-sentence", type=int, default=defaults.images_per_sentence, help="MMC4 (default 1)")
    make.add_argument("--max-images", type=int, help="images kept of a document (default: MMC4 6, others all)")
    make.add_argument("--min-images", type=int, default=defaults.min_images, help="per document (default 1)")
    make.add_argument(
        "--max-text-bytes", type=positive, default=defaults.max_text_bytes, help="per document (default 1 MiB)"
    )
    make.add_argument("--max-image-pixels", type=positive, default=defaults.max_image_pixels, help="larger: left out")
    make.add_argument("--seed", type=int, default=defaults.seed, help="of MMC4's draw of one image per sentence")
    make.set_defaults(run=run_build)

    links = commands.add_parser("urls", help="list the images of a corpus for img2dataset, and report dead links")
    links.add_argument("files", nargs="+", metavar="FILE", help="input files, as for build")
    links.add_argument("out", type=Path, metavar="OUT", help="new folder for lists (.csv with the column url)")
    links.add_argument("--format", required=True, choices=sorted({*READERS} - {*FOLDERS}))
    links.add_argument(
        "--images", nargs="+", type=Path, default=[], metavar="PATH", help="what was fetched already, and is not listed"
    )
    links.add_argument("--workers", type=positive, default=CPUS, help=f"processes (default {CPUS})")
    links.add_argument("--json", type=Path, metavar="F", help="write the report there")
    links.add_argument("--min-similarity", type=float, default=defaults.min_similarity, help="MMC4 (default 0.24)")
    links.add_argument("--image-column", nargs="+", default=[], metavar="NAME", help="tables: columns of addresses")
    links.set_defaults(run=run_urls)

    check = commands.add_parser("check", help="read everything; exit code 1 when something is bad")
    check.add_argument("shards", nargs="+", metavar="SHARDS", help="as in data.shards: paths, globs, braces, URLs")
    check.add_argument("--json", type=Path, metavar="F", help="write the report there")
    check.add_argument(
        "--max-text-bytes", type=positive, help="per document (default 1 MiB, or what the shards were built with)"
    )
    check.add_argument("--workers", type=positive, default=CPUS, help=f"processes (default {CPUS})")
    check.set_defaults(run=run_check)

    look = commands.add_parser("inspect", help="show rows as the model gets them")
    look.add_argument("shards", nargs="*", metavar="SHARDS", help="as in data.shards; default: those of --recipe")
    look.add_argument("--html", type=Path, metavar="F", help="write a page with the images; else to the terminal")
    look.add_argument("--recipe", help="whose settings are used (default: those that init would write for SHARDS)")
    look.add_argument("--tokenizer", help="another one than the recipe's")
    look.add_argument("--rows", type=int, default=4, help="how many (default 4)")
    look.add_argument("--set", nargs="+", default=[], metavar="key.sub=value", help="other settings of the recipe")
    look.set_defaults(run=run_inspect)

    tell = commands.add_parser("info", help="say what is in shards, and how much of it a row holds")
    tell.add_argument("shards", nargs="+", metavar="SHARDS", help="as in data.shards: paths, globs, braces, URLs")
    tell.add_argument("--recipe", help="whose tokenizer and sizes are used (default: estimates)")
    tell.add_argument("--samples", type=positive, default=MEASURED_SAMPLES, help="read (default 20000)")
    tell.add_argument("--json", type=Path, metavar="F", help="write the figures there")
    tell.set_defaults(run=run_info)

    first = commands.add_parser("init", help="write a recipe for shards, which trains as it stands")
    first.add_argument("shards", nargs="+", metavar="SHARDS", help="as in data.shards: paths, globs, braces, URLs")
    first.add_argument("out", type=Path, metavar="RECIPE", help="file to write, as in mine.yaml")
    first.add_argument(
        "--tokenizer", help="name or folder (default: one is made from the text and saved beside RECIPE)"
    )
    first.add_argument("--size", choices=("tiny", "small", "base"), help="of the towers (default: by number of images)")
    first.add_argument("--heldout", metavar="SHARDS", help="to evaluate on (default: heldout/ beside SHARDS)")
    first.set_defaults(run=run_init)
    return parser


def _fraction(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a fraction: name one from 0 on and below 1")
    return number


def run_build(arguments: argparse.Namespace, console: Console) -> int:
    files = local_files(arguments.files, arguments.format)
    names = ("min_similarity", "images_per_sentence", "max_images", "min_images", "max_text_bytes", "max_image_pixels")
    options = ReadOptions(
        image_columns=tuple(arguments.image_column),
        text_columns=tuple(arguments.text_column),
        caption=arguments.caption,
        seed=arguments.seed,
        **{name: getattr(arguments, name) for name in names},
    )
    built = build(
        files,
        arguments.out,
        arguments.format,
        options,
        arguments.images,
        workers=arguments.workers,
        shard_samples=arguments.shard_samples,
        deduplicate=arguments.deduplicate,
        holdout=arguments.holdout,
        skip_unreadable=arguments.skip_unreadable,
        console=console,
    )
    if not built.is_new:
        _say(console, f"{arguments.out}: already built from these files; name a new folder to build again")
    _show_tried(arguments.images, console)
    _show_manifest(built.manifest, arguments.out, console)
    return 0


def run_urls(arguments: argparse.Namespace, console: Console) -> int:
    check_output("--json", arguments.json)
    files = local_files(arguments.files, arguments.format)
    options = ReadOptions(
        min_similarity=arguments.min_similarity,
        image_columns=tuple(arguments.image_column),
        caption="",  # texts are not needed
        min_images=0,
    )
    out = arguments.out
    report = list_urls(files, out, arguments.format, options, arguments.images, arguments.workers, console)
    if arguments.json:
        write_whole(arguments.json, json.dumps(report, indent=1) + "\n")
    _say(console, f"{report['urls']:,} addresses of images in {report['records']:,} records")
    if report["no_addresses"]:
        _say(console, f"{report['no_addresses']:,} of them cannot be fetched: no address of the web")
    if arguments.images:
        _say(console, f"{report['there']:,} of the images are there, {report['listed']:,} are not:")
        hosts = ", ".join(f"{host} ({count:,})" for host, count in report["hosts"].items())
        _say(console, f"hosts of those that are not there: {hosts or 'none'}")
    _show_tried(arguments.images, console)
    if report["listed"]:
        _say(
            console,
            f"{out}: {report['listed']:,} addresses; fetch them with img2dataset --url_list {out} "
            "--input_format csv --url_col url --output_folder FOLDER",
        )
    return 0


def _show_tried(images: list[Path], console: Console) -> None:
    """Print what came of the addresses that img2dataset tried."""
    tried = tried_links(images)
    if tried:
        table = Table("img2dataset's result", "addresses")
        for status, count in tried.most_common():
            table.add_row(Text(printable(status)), f"{count:,}")
        console.print(table)


def _show_manifest(manifest: dict[str, Any], out: Path, console: Console) -> None:
    units = manifest["sources"]
    table = Table("left out", "times", "in")
    for reason, count in sorted(manifest["skips"].items(), key=lambda item: -item[1]):
        examples = [key for unit in units for key in unit["examples"].get(reason, ())][:EXAMPLES]
        table.add_row(
            Text(reason), str(count), Text(", ".join([*examples, *(["..."] if count > len(examples) else [])]))
        )
    if manifest["skips"]:
        console.print(table)
    names = ("documents", "pairs", "images", "records", "incomplete")
    sums = {name: sum(unit[name] for unit in units) for name in names}
    contents = ", ".join(f"{sums[name]} {name}" for name in names[:3] if sums[name])
    duplicates = f", {manifest['duplicates']} duplicates left out" if manifest["duplicates"] else ""
    if sums["incomplete"]:
        _say(console, f"of {sums['incomplete']} of {sums['records']} records something or everything was left out")
    if manifest["longest_text_bytes"] > MAX_TEXT_BYTES:
        longest = manifest["longest_text_bytes"]
        _say(console, f"the longest document has {longest} bytes of text: train with data.max_text_bytes={longest}")
    for problem in [*manifest["image_problems"], *(unit["problem"] for unit in units if unit["problem"])]:
        _say(console, f"not read: {problem}")
    _say(console, f"{out}: {contents}{duplicates}; {_shards_of(manifest['shards'])} to train on")
    if manifest["heldout"]:
        _say(console, f"{out / HELD_OUT}: {_shards_of(manifest['heldout'])} held out")
    elif manifest["settings"]["holdout"]:
        _say(console, f"--holdout {manifest['settings']['holdout']} is so small a fraction that nothing is held out")


def _shards_of(shards: dict[str, Any]) -> str:
    samples = sum(facts["samples"] for facts in shards.values())
    return f"{samples} samples in {len(shards)} shard{'' if len(shards) == 1 else 's'}"


def _say(console: Console, line: str) -> None:
    """Print a line with names in it, without markup and without breaking it."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def run_check(arguments: argparse.Namespace, console: Console) -> int:
    check_output("--json", arguments.json)
    reports = check_shards(expand_paths(arguments.shards), arguments.workers, console, arguments.max_text_bytes)
    total = total_of(reports)
    show(reports, console)
    if arguments.json:
        write_whole(arguments.json, json.dumps({"total": total, "shards": reports}, indent=1) + "\n")
    return 1 if total["problem_count"] else 0


def run_inspect(arguments: argparse.Namespace, console: Console) -> int:
    check_output("--html", arguments.html)
    if not arguments.shards and arguments.recipe is None:
        raise UserError("inspect: name shards, or the recipe whose shards are to be shown: --recipe NAME")
    with tempfile.TemporaryDirectory() as folder:
        return _show_rows(arguments, Path(folder), console)


def _show_rows(arguments: argparse.Namespace, folder: Path, console: Console) -> int:
    # Sizes and the objective's view are the recipe's; the data package itself knows neither models nor objectives.
    from lcl_ds.assembly import lane_settings
    from lcl_ds.config import load_config, recipe_path
    from lcl_ds.data.corpus import open_data
    from lcl_ds.data.stream.loader import BatchLoader
    from lcl_ds.new_recipe import draft_recipe
    from lcl_ds.report.batch_page import page
    from lcl_ds.report.batch_page import show as show_rows

    overrides = ["data.group_rows=1", *arguments.set]
    if arguments.recipe is None:
        draft_recipe(folder, "inspected", arguments.shards, arguments.tokenizer)
        recipe = folder / "recipe.yaml"
    else:
        recipe = recipe_path(arguments.recipe)
        if arguments.shards:
            overrides.insert(0, f"data.shards={json.dumps([{'name': 'data', 'paths': arguments.shards}])}")
        if arguments.shards and arguments.tokenizer:
            overrides[:0] = ["data.demo=null", "data.textured=null"]  # nothing of them is needed
        if arguments.tokenizer:
            overrides.insert(0, f"data.tokenizer={json.dumps(arguments.tokenizer)}")
    config = load_config(recipe, overrides)
    data = open_data(config.data)
    batch = next(BatchLoader(data.sources, lane_settings(config), data.tokenizer, arguments.rows))
    if arguments.html is None:
        show_rows(batch, data.tokenizer, console)
    else:
        title = f"{', '.join(arguments.shards) or arguments.recipe}, as {config.objective.name} sees it"
        write_whole(arguments.html, page(batch, data.tokenizer, title))
        console.print(str(arguments.html), highlight=False, markup=False, soft_wrap=True)
    return 0


def run_init(arguments: argparse.Namespace, console: Console) -> int:
    from lcl_ds.new_recipe import write_recipe

    out = arguments.out
    notes = write_recipe(out, arguments.shards, arguments.tokenizer, arguments.size, arguments.heldout)
    for note in notes:
        _say(console, note)
    _say(console, f"{out}: train with {program_name('train')} --recipe {shlex.quote(str(out))}")
    return 0


def run_info(arguments: argparse.Namespace, console: Console) -> int:
    check_output("--json", arguments.json)
    source = Source("data", [index_shard(path) for path in expand_paths(arguments.shards)])
    row = _row_of(arguments.recipe)
    contents = measure(source, row.tokenizer, arguments.samples, row.max_text_bytes)
    facts = facts_of(contents, row)
    show_facts(facts, row, console)
    if arguments.json:
        write_whole(arguments.json, json.dumps(facts, indent=1) + "\n")
    return 0


def _row_of(recipe: str | None) -> RowFacts:
    """Say how a recipe makes rows; without one, how a ViT-B/16 would at 224 px."""
    if recipe is None:
        return RowFacts()
    from lcl_ds.assembly import lane_settings
    from lcl_ds.config import load_config, recipe_path
    from lcl_ds.data.corpus import open_tokenizer

    config = load_config(recipe_path(recipe))
    rows = lane_settings(config, training=False)
    tokenizer = open_tokenizer(config.data)
    return RowFacts(tokenizer, rows.image_tokens, (rows.row_tokens,), rows.max_text_bytes)


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="[%(levelname)s] %(message)s")
    console = Console(stderr=False)
    return run_command(lambda: arguments.run(arguments, console if console.is_terminal else Console(width=WIDTH)))


if __name__ == "__main__":
    sys.exit(main())
