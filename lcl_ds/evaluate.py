"""Measure an encoder: ``python -m lcl_ds.evaluate MODEL_OR_RUN --task TASK ... --data DATA [--json F]``.

MODEL_OR_RUN is a run folder, a checkpoint, a folder that lcl_ds.convert wrote, or any vision model that transformers
loads, by folder or name. DATA is a folder with a subfolder for each class, a table (.csv, .tsv) with the columns path
and label or caption, a caption file of COCO or Flickr30k (.json), or shards. Start it with accelerate launch to share
the work among processes.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers.utils import logging as transformers_logging

from lcl_ds.cli import positive, program_name, run_command
from lcl_ds.config import Config
from lcl_ds.data.settings import default_of
from lcl_ds.environment import versions
from lcl_ds.errors import UserError
from lcl_ds.evaluation.attentive import AttentiveSettings
from lcl_ds.evaluation.caption import CaptionSettings
from lcl_ds.evaluation.encoder import KINDS, FrozenEncoder, of_network, open_released
from lcl_ds.evaluation.fewshot import SHOTS
from lcl_ds.evaluation.finetune import FinetuneSettings
from lcl_ds.evaluation.neighbours import NEIGHBOURS
from lcl_ds.evaluation.pictures import PictureSet, has_train_side, is_shards, open_pictures
from lcl_ds.evaluation.probes import ProbeOptions
from lcl_ds.evaluation.results import Figure, Results, table_of
from lcl_ds.evaluation.tasks import PROMPTS, TASKS, Measured, Options, Trained, document_retrieval
from lcl_ds.files import check_output, write_whole
from lcl_ds.models.build import build_empty_model
from lcl_ds.models.initial import fill_weights
from lcl_ds.models.network import LCLModel
from lcl_ds.models.placement import place
from lcl_ds.models.weights.transfer import given_weights
from lcl_ds.phases import config_of_step
from lcl_ds.tokens import CONTROL_TOKENS
from lcl_ds.training.checkpoint import MANIFEST, checkpoints_folder, load_config_of, load_model, read_state
from lcl_ds.training.checkpoint import resolve_checkpoint as find_checkpoint
from lcl_ds.training.warm_start import find_start, open_start

logger = logging.getLogger(__name__)

UNTRAINED = {"retrieval", "zeroshot"}
"""Tasks that train nothing, so that the pictures for it need not be there."""
WIDTH = 150
"""Columns where the output is no terminal."""


def is_run(path: Path) -> bool:
    """Say whether a path is a run folder or a checkpoint, and not a released folder or a name."""
    return (path / MANIFEST).is_file() or checkpoints_folder(path).is_dir()


def open_model(arguments: argparse.Namespace) -> tuple[FrozenEncoder, Trained | None, dict[str, Any]]:
    """Load what is evaluated, with the decoder where there is one, and say what it is.

    Raises:
        UserError: it is nothing of what can be loaded, or is damaged.
    """
    source = Path(arguments.model)
    if not is_run(source):
        if arguments.ema or arguments.untrained:
            option = "--ema" if arguments.ema else "--untrained"
            raise UserError(f"{option}: {source} is neither a run nor a checkpoint; leave it out")
        return open_released(arguments.model), None, {"source": arguments.model, "kind": "released"}
    checkpoint = find_checkpoint(source)
    state = read_state(checkpoint)
    step = state["progress"]["step"]
    config = config_of_step(load_config_of(checkpoint), step)
    facts = {"source": arguments.model, "kind": "checkpoint", "name": config.name, "step": step}
    if arguments.untrained:
        model = first_network(config, state["vocab_size"])
        facts |= {"step": 0}
    else:
        model = load_model(checkpoint, ema=arguments.ema)
    return of_network(model, arguments.model), Trained(model, config), facts | {"ema": arguments.ema}


def first_network(config: Config, vocab_size: int) -> LCLModel:
    """Build the network of a run as it began: drawn, or with the weights that its settings name.

    Raises:
        UserError: such weights are not there any more.
    """
    model = build_empty_model(config.model, vocab_size, config.data.longest_document)
    text_size, seed = vocab_size - len(CONTROL_TOKENS), config.seed("init")
    given, _ = given_weights(
        model, config.model, text_size, seed, partial(open_start, config.model, find_start(config.model))
    )
    fill_weights(model, seed, given)
    model.eval().choose_attention()
    return model


def evaluate(arguments: argparse.Namespace, console: Console) -> int:
    """Run the tasks that the command line names."""
    started = time.perf_counter()
    if arguments.offload and "finetune" in arguments.task:
        raise UserError("--offload: finetune trains all weights on the device; leave one of the two out")
    check_output("--json", arguments.json)
    device_of(arguments.device)
    state = PartialState(cpu=arguments.device == "cpu")
    encoder, trained, facts = open_model(arguments)
    device = device_of(arguments.device) or state.device
    module = trained.model if trained else encoder.module
    module.to(torch.bfloat16 if arguments.precision == "bf16" else torch.float32)
    place(module, device, arguments.offload)
    data = data_of(arguments, trained)
    results = Results(facts | {"precision": arguments.precision, "image_size": encoder.image_size}, {})
    figures = measure(arguments, encoder, trained, data, results)
    for figure in figures:
        results.figures.append(figure)
        logger.info("%s", " ".join(str(v) for v in (figure.task, figure.label, figure.features) if v))
    results.data |= {"source": ", ".join(data), "seconds": round(time.perf_counter() - started, 1)}
    if state.is_main_process:
        console.print(table_of(results.figures, f"{arguments.model} on {', '.join(data)}"))
        for note in results.notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)
        if arguments.json:
            write_whole(arguments.json, json.dumps(results.tree() | {"environment": versions()}, indent=1) + "\n")
    state.wait_for_everyone()
    return 0


def device_of(name: str | None) -> torch.device | None:
    """Read ``--device``. Raises: UserError where there is no such device."""
    if name is None:
        return None
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {' '.join(str(error).split())[:120]}; leave it out, or name cpu") from None
    return torch.device(name)


def data_of(arguments: argparse.Namespace, trained: Trained | None) -> list[str]:
    """Say what is evaluated on: ``--data``, or the held-out shards of the run.

    Raises:
        UserError: nobody says.
    """
    if arguments.data:
        return arguments.data
    shards = trained.config.evaluation.shards if trained else None
    if shards is None:
        raise UserError("--data: is missing; name pictures, for a run without evaluation.shards knows none")
    return [shards] if isinstance(shards, str) else shards


def measure(
    arguments: argparse.Namespace,
    encoder: FrozenEncoder,
    trained: Trained | None,
    data: list[str],
    results: Results,
) -> Iterator[Figure]:
    """Open the pictures and run one task after the other; notes and facts about the data go to ``results``."""
    cache = Path(arguments.cache).expanduser()
    images = arguments.images
    test = open_pictures(data, images, cache, arguments.limit, "test")
    train: PictureSet | None = None
    if not UNTRAINED.issuperset(arguments.task) and (arguments.train_data or has_train_side(data)):
        train = open_pictures(arguments.train_data or data, images, cache, arguments.train_limit, "train")
    kept = None if arguments.no_cache else cache
    measured = Measured(encoder, test, train, trained, options_of(arguments, trained), kept, results.notes)
    documents = not any(picture.captions for picture in test.pictures) and is_shards(data)
    for task in arguments.task:
        if task == "retrieval" and trained and documents:
            made, notes = document_retrieval(trained, data, arguments.limit)
            results.notes += notes
            yield from made
        else:
            yield from TASKS[task](measured)
    left_out = dict(measured.all.left_out.most_common())
    results.data |= {"pictures": len(measured.all.pictures), "left_out": left_out}
    results.notes += [f"left out: {reason} ({count})" for reason, count in left_out.items()]


def options_of(arguments: argparse.Namespace, trained: Trained | None) -> Options:
    """Collect the options of the tasks. Raises: UserError when a file they name cannot be used."""
    labels = arguments.label
    if not labels and not arguments.data and trained:
        labels = trained.config.evaluation.probe_labels
    chosen: dict[str, Any] = {
        "epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    return Options(
        kinds=tuple(arguments.features),
        labels=tuple(labels),
        probe=ProbeOptions(AttentiveSettings(**chosen), tuple(arguments.shots), arguments.neighbours),
        finetune=FinetuneSettings(**chosen),
        caption=CaptionSettings(**chosen),
        prompts=prompts_of(arguments.prompts),
        class_names=class_names_of(arguments.classes),
        memory=int(arguments.memory * (1 << 30)),
        decoder=arguments.decoder,
        tokenizer=arguments.tokenizer,
    )


def prompts_of(prompts: list[str]) -> tuple[str, ...]:
    """Read prompts from the command line or from a file with one a line. Raises: UserError for one without ``{}``."""
    if len(prompts) == 1 and Path(prompts[0]).is_file():
        prompts = [line for line in Path(prompts[0]).read_text(encoding="utf-8").splitlines() if line.strip()]
    if lacking := [prompt for prompt in prompts if "{}" not in prompt]:
        raise UserError(f"--prompts: {lacking[0]!r} lacks {{}}, where the name of the class goes")
    return tuple(prompts)


def class_names_of(path: Path | None) -> dict[str, str]:
    """Read what classes are called: lines ``label<TAB>name``. Raises: UserError naming the line that is not."""
    if path is None:
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path}: cannot be read: {error}") from error
    pairs = [line.split("\t", 1) for line in lines if line.strip()]
    if wrong := [pair[0] for pair in pairs if len(pair) != 2]:
        raise UserError(f"--classes {path}: {wrong[0]!r}: a line is a label, a tab and the name of the class")
    return {label.strip(): name.strip() for label, name in pairs}


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(prog=program_name("evaluate"), description=__doc__)
    parser.add_argument("model", metavar="MODEL_OR_RUN")
    parser.add_argument("--task", nargs="+", required=True, choices=tuple(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--data", nargs="+", help="what is tested on (default: the run's held-out shards)")
    parser.add_argument("--train_data", nargs="+", help="what trains probes (default: two thirds of --data)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the pictures that a table or .json names")
    parser.add_argument("--label", nargs="+", default=[], help="labels to predict (default: all)")
    parser.add_argument(
        "--features",
        nargs="+",
        choices=tuple(KINDS),
        default=list(KINDS),
        help="; ".join(map(": ".join, KINDS.items())),
    )
    parser.add_argument("--ema", action="store_true", help="the moving average of the encoder")
    parser.add_argument("--untrained", action="store_true", help="the run's first weights, to compare with")
    parser.add_argument("--limit", type=positive, help="pictures, or documents of retrieval, to test on")
    parser.add_argument("--train_limit", type=positive, help="pictures of --train_data")
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures there")
    parser.add_argument(
        "--prompts", nargs="+", default=list(PROMPTS), help="of zeroshot, with {} for the class; or a file"
    )
    parser.add_argument("--classes", type=Path, metavar="F", help="lines label<TAB>name: what zeroshot calls a class")
    parser.add_argument("--shots", type=positive, nargs="+", default=list(SHOTS), help="of fewshot")
    parser.add_argument("--neighbours", type=positive, default=NEIGHBOURS, help=f"of knn (default {NEIGHBOURS})")
    parser.add_argument("--epochs", type=positive, help="of what is trained (default: each task's own)")
    parser.add_argument("--learning_rate", type=float, help="of what is trained (default: each task's own)")
    parser.add_argument("--batch_size", type=positive, help="of what is trained (default: each task's own)")
    parser.add_argument("--decoder", metavar="DIR", help="decoder of caption (default: a small one from scratch)")
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer of caption (default: the run's or the decoder's)")
    parser.add_argument("--memory", type=float, default=4.0, metavar="GIB", help="for patch tokens (default 4)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the encoder (default fp32)")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument(
        "--offload",
        action="store_true",
        help="leave weights on the host, from where they visit the device (default: where they do not fit)",
    )
    parser.add_argument("--cache", default=default_of("cache"), metavar="DIR", help="folder for features and indices")
    parser.add_argument("--no_cache", action="store_true", help="make features anew and keep none")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="[%(levelname)s] %(message)s")
    transformers_logging.set_verbosity_error()  # what it says of missing weights, we say as an error
    console = Console(stderr=False)
    return run_command(lambda: evaluate(arguments, console if console.is_terminal else Console(width=WIDTH)))


if __name__ == "__main__":
    sys.exit(main())
