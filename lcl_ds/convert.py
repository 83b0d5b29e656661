"""Release a trained encoder: ``python -m lcl_ds.convert RUN|CHECKPOINT OUT [--format F] [--part vision|full] [--ema]``.

``vision`` (default) writes a folder that ``transformers`` loads by itself: config.json, model.safetensors,
preprocessor_config.json and a model card; with ``trust_remote_code=True`` its pooled output is the attentive pooling.
``--format`` writes for another library instead. Each is loaded and compared with the training model before it is kept.
``full`` writes the whole network with code that transformers runs: features of images and texts to compare, and texts
after images; ``model.init_from`` reads it too. With ``--format reference`` it has the layout of the published code.
``--from reference FILE --config JSON`` reads a checkpoint of the published code instead of a run.
"""

import argparse
import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lcl_ds.cli import program_name, run_command
from lcl_ds.errors import UserError
from lcl_ds.files import plain_name, system_error, whole_folder
from lcl_ds.models.settings import Part
from lcl_ds.release.exports import release_onnx, release_torch
from lcl_ds.release.full import release_full
from lcl_ds.release.options import DTYPES, ReleaseOptions
from lcl_ds.release.origin import read_published, read_run
from lcl_ds.release.to_open_clip import release_open_clip
from lcl_ds.release.to_reference import write_published
from lcl_ds.release.to_timm import release_timm
from lcl_ds.release.vision import release_vision

RELEASES = {
    "hf": release_vision,
    "timm": release_timm,
    "open_clip": release_open_clip,
    "onnx": release_onnx,
    "torch": release_torch,
}
"""What writes the encoder in each format."""
NEEDED = {"timm": ("timm",), "open_clip": ("open_clip",), "onnx": ("onnxscript", "onnxruntime")}
"""Modules that a format needs beyond the project's own; the extras in setup.py have the names of the formats."""


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
    check_arguments(arguments)
    options = ReleaseOptions(arguments.out.resolve().name, arguments.license, arguments.dtype, arguments.shard_size)
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
            sentences.append(RELEASES[arguments.format](model, origin, folder, options))
    print("\n".join([*sentences, f"{arguments.run_or_file} -> {arguments.out}"]))
    return 0


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other, and a format whose library is missing.

    Raises:
        UserError: names the argument and a remedy.
    """
    layout = arguments.format
    if layout == "reference" and arguments.part == "vision":
        raise UserError("--format reference: the published layout holds the whole model; leave out --part vision")
    if layout not in ("hf", "reference") and arguments.part == "full":
        raise UserError(f"--format {layout}: it holds the encoder alone; leave out --part full")
    if arguments.ema and arguments.origin == "reference":
        raise UserError("--ema: a file of the published code holds no moving average; leave it out")
    if arguments.dtype != "fp32" and layout in ("reference", "onnx", "torch"):
        raise UserError(f"--dtype {arguments.dtype}: this release is written in fp32; leave it out")
    if arguments.shard_size != ReleaseOptions.shard_size and layout != "hf":
        raise UserError("--shard_size: this release has one file of weights; leave it out")
    for module in NEEDED.get(layout, ()):
        try:
            importlib.import_module(module)
        except (ImportError, RuntimeError) as error:  # torchvision, which two of them load, may not fit to torch
            said = " ".join(str(error).split())[:120]
            raise UserError(
                f"--format {layout}: {module}, which checks what is written, cannot be loaded ({said}): "
                f"pip install 'lcl_ds[{layout}]'"
            ) from error


def shard_size(text: str) -> str:
    """Read a size of files. Raises: ArgumentTypeError, it is no number with a unit."""
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB|TB)", text):
        raise argparse.ArgumentTypeError(f"{text} is no size; write it as 5GB")
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=program_name("convert"), description=__doc__)
    parser.add_argument("run_or_file", type=Path, metavar="RUN|CHECKPOINT|FILE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--part", choices=("vision", "full"), help="default: vision; with --format reference: full")
    parser.add_argument(
        "--format",
        choices=(*RELEASES, "reference"),
        default="hf",
        help="what loads the folder: transformers (default), timm, open_clip, ONNX runtimes, torch.export, or the "
        "published code",
    )
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
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights in the files")
    parser.add_argument(
        "--shard_size",
        type=shard_size,
        default=ReleaseOptions.shard_size,
        metavar="SIZE",
        help="most bytes of a file of weights, as 5GB",
    )
    parser.add_argument("--license", metavar="NAME", help="licence of the weights for the model card, as apache-2.0")
    arguments = parser.parse_args(argv)
    return run_command(lambda: convert(arguments))


if __name__ == "__main__":
    sys.exit(main())
