"""Release a trained encoder: ``python -m lcl_ds.convert RUN|CHECKPOINT OUT [--part vision|full] [--ema]``.

``vision`` (default) writes a folder that ``transformers`` loads by itself: config.json, model.safetensors,
preprocessor_config.json and a model card; with ``trust_remote_code=True`` its pooled output is the attentive pooling.
``full`` writes the whole network with code that transformers runs: features of images and texts to compare, and text
after images; ``model.init_from`` reads it too. With ``--format reference`` it has the layout of the published code. ``--from reference FILE --config JSON`` reads a checkpoint of the published code instead of a run.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lcl_ds.cli import program_name, run_command
from lcl_ds.errors import UserError
from lcl_ds.files import plain_name, system_error, whole_folder
from lcl_ds.models.settings import Part
from lcl_ds.release.full import release_full
from lcl_ds.release.options import ReleaseOptions
from lcl_ds.release.origin import read_published, read_run
from lcl_ds.release.vision import release_vision
from lcl_ds.release.whole import write_published


@contextmanager
def release_folder(out: Path) -> Iterator[Path]:
    """Make a new folder that becomes ``out`` when it is whole, with files that others may read as the umask says.

    Raises:
        UserError: ``out`` is a file, or a folder that is not empty.
        OSError: it cannot be written; with a path.
    """
    with whole_folder(out) as folder:
        try:
            with plain_name(folder) as plain:
                yield plain
        except SafetensorError as error:
            raise system_error(error, out) or error from error
        mode = folder.stat().st_mode & 0o666
        for file in folder.iterdir():  # safetensors writes for the owner alone
            file.chmod(mode)


def convert(arguments: argparse.Namespace) -> int:
    """Read, write and compare, as the command line asks."""
    if arguments.format == "reference" and arguments.part == "vision":
        raise UserError("--format reference: the published layout holds the whole model; leave out --part vision")
    if arguments.ema and arguments.origin == "reference":
        raise UserError("--ema: a file of the published code holds no moving average; leave it out")
    options = ReleaseOptions(name=arguments.out.resolve().name)
    sentences = []
    with release_folder(arguments.out) as folder:
        if arguments.origin == "reference":
            model, origin, vocabulary = read_published(arguments.run_or_file, arguments.config)
        else:
            releases_all = arguments.format == "reference" or arguments.part == "full"
            parts: tuple[Part, ...] = () if releases_all else ("vision", "pooling")
            model, origin, vocabulary = read_run(arguments.run_or_file, parts, arguments.ema)
        if arguments.format == "reference":
            write_published(model, vocabulary, folder)
        elif arguments.part == "full":
            sentences.append(release_full(model, origin, vocabulary, folder, options))
        else:
            sentences.append(release_vision(model, origin, folder, options))
    print("\n".join([*sentences, f"{arguments.run_or_file} -> {arguments.out}"]))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=program_name("convert"), description=__doc__)
    parser.add_argument("run_or_file", type=Path, metavar="RUN|CHECKPOINT|FILE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--part", choices=("vision", "full"), help="default: vision; with --format reference: full")
    parser.add_argument("--format", choices=("hf", "reference"), default="hf", help="layout that is written")
    parser.add_argument(
        "--from",
        dest="origin",
        choices=("run", "reference"),
        default="run",
        help="what is read: a run or checkpoint, or a file of the published code",
    )
    parser.add_argument("--config", type=Path, metavar="JSON", help="model configuration of --from reference")
    parser.add_argument(
        "--ema", action="store_true", help="take the vision tower from its moving average (train.ema_decay)"
    )
    arguments = parser.parse_args(argv)
    return run_command(lambda: convert(arguments))


if __name__ == "__main__":
    sys.exit(main())
