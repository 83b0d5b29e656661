"""One run from settings to report: what ``launch/train.py`` does after its arguments are read."""

import logging
from pathlib import Path
from typing import Any

import torch
import yaml
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import distributed as dist

from lcl_ds.config import Config
from lcl_ds.data.corpus import OpenData, lane_settings, open_data
from lcl_ds.data.stream.lanes import LaneSettings
from lcl_ds.data.stream.loader import BatchLoader
from lcl_ds.errors import UserError
from lcl_ds.evaluation.check import check_held_out
from lcl_ds.evaluation.final import close_run
from lcl_ds.metrics import METRICS, keep_metrics
from lcl_ds.models.build import build_model, check_attention_here, image_size, tokens_per_image
from lcl_ds.models.network import LCLModel
from lcl_ds.models.weights.transfer import initialize_parts
from lcl_ds.objectives import build_objective, view_of
from lcl_ds.training.checkpoint import (
    Progress,
    check_resumable,
    load_engine,
    load_model,
    newest_checkpoint,
    read_state,
    resolve_checkpoint,
)
from lcl_ds.training.distributed import Place, init_distributed, on_all_ranks, raise_for_all
from lcl_ds.training.engine import (
    apply_settings,
    complete_ds_config,
    refresh_exact_scalars,
    rows_per_micro_step,
    start_engine,
)
from lcl_ds.training.loop import Trainer
from lcl_ds.training.monitor import kept_metrics
from lcl_ds.training.optimizer import options_of
from lcl_ds.training.resume import check_same_run, engine_changes
from lcl_ds.training.run_folder import check_own_folder, check_run_writable, write_run_files

logger = logging.getLogger(__name__)


def run(config: Config, ds_config: dict[str, Any], run_dir: Path) -> int:
    """Train, evaluate and report; resumes where the run folder has a checkpoint.

    Args:
        ds_config: from :func:`lcl_ds.training.engine.load_ds_config`.

    Returns:
        Exit code: 0 when finished, 128 + signal when a signal stopped the run after a checkpoint, 1 or 2 when the
        closing evaluation failed.

    Raises:
        UserError: settings and input that do not fit together, found before a model is built.
    """
    data = open_checked_data(config)
    place = init_distributed()
    raise_for_all([], place)  # hears what other ranks found before they came here
    check_attention_here(config.model, place.device.type, config.precision)
    full_ds_config = complete_ds_config(ds_config, config, place.world_size)
    with on_all_ranks(place):
        if place.is_first:
            check_own_folder(run_dir)
    checkpoint = newest_checkpoint(run_dir, place)
    changes: list[str] = []
    if checkpoint is not None:
        with on_all_ranks(place):
            changes = check_same_run(checkpoint, config) + engine_changes(run_dir, full_ds_config)
    received = None
    steps_done = read_state(checkpoint)["progress"]["step"] if checkpoint else 0
    if steps_done >= config.train.steps:
        logger.info("%s is finished: %d of %d steps done", run_dir, steps_done, config.train.steps)
    else:
        with on_all_ranks(place):
            check_run_writable(run_dir)
        trainer = prepare(config, full_ds_config, run_dir, place, data, checkpoint)
        for sentence in changes if place.is_first else []:
            logger.info("%s", sentence)
        with on_all_ranks(place):
            if place.is_first:
                write_run_files(run_dir, config, full_ds_config, place.world_size, steps_done)
        received = trainer.train()
        trainer.release()  # its memory is the evaluation's
        del trainer
    dist.destroy_process_group()
    if received is not None:
        return 128 + received
    return finish(config, run_dir, place.device) if place.is_first else 0


def prepare(
    config: Config,
    ds_config: dict[str, Any],
    run_dir: Path,
    place: Place,
    data: OpenData,
    checkpoint: Path | None = None,
) -> Trainer:
    """Loader, model and engine of this rank, at the start or where ``checkpoint`` stands."""
    state = read_state(checkpoint) if checkpoint else None
    vocab_size = data.tokenizer.vocabulary.size
    with on_all_ranks(place):
        loader = BatchLoader(
            data.sources,
            row_settings(config),
            data.tokenizer,
            rows_per_micro_step(config, place.world_size),
            place.rank,
            place.world_size,
            config.data.workers,
            state["loader"] if state else None,
            pin_memory=place.device.type == "cuda",
        )
        if checkpoint and state:
            zero = DeepSpeedZeroConfig(**ds_config.get("zero_optimization", {}))
            check_resumable(checkpoint, state, place.world_size, zero)
        model = build_model(config.model, vocab_size, config.data.longest_document, config.seed("init"))
        sentences = [] if checkpoint else give_weights(model, config, data)
        objective = build_objective(model, config.objective, config.seed("init"))
    for sentence in sentences if place.is_first else []:
        logger.info("%s", sentence)
    engine = start_engine(objective, config, ds_config, place)
    progress = Progress(**state["progress"]) if state else Progress()
    if checkpoint:
        options = options_of(engine.optimizer.param_groups)
        load_engine(engine, checkpoint)
        apply_settings(engine, options, ds_config["gradient_clipping"])
        refresh_exact_scalars(engine)
        if place.is_first:
            logger.info("continuing %s at step %d", checkpoint, progress.step)
    return Trainer(engine, loader, config, place, run_dir, vocab_size, progress)


def give_weights(model: LCLModel, config: Config, data: OpenData) -> list[str]:
    """Weights for the parts of which ``config`` names a source; a sentence about each.

    Raises:
        UserError: names every weight that does not fit.
    """
    return initialize_parts(model, config.model, data.tokenizer.vocabulary.text_size, config.seed("init"))


def row_settings(config: Config) -> LaneSettings:
    """What rows are made of, for the objective and the image size of ``config``."""
    view = view_of(config.objective, config.data.image_first_probability)
    return lane_settings(config, view, tokens_per_image(config.model, training=True), image_size(config.model))


def open_checked_data(config: Config) -> OpenData:
    """The run's data, after everything about it that can be wrong was looked at.

    Raises:
        UserError: names the key and the file.
    """
    data = open_data(config.data)
    check_vocabulary(config, data)
    check_evaluation(config, data)
    return data


def check_vocabulary(config: Config, data: OpenData) -> None:
    """Raises: UserError when the decoder's vocabulary is set and is not the tokenizer's plus the control tokens, or
    when its weights belong to another tokenizer."""
    folder = config.model.decoder.pretrained
    if folder and (difference := data.tokenizer.difference_to(Path(folder) / "tokenizer.json")):
        raise UserError(
            f"data.tokenizer: {config.data.tokenizer} is not the tokenizer of model.decoder.pretrained: {difference}; "
            f"set data.tokenizer={folder}"
        )
    wanted = config.model.decoder.hf_keys.get("vocab_size")
    size = data.tokenizer.vocabulary.size
    if wanted is not None and wanted != size:
        raise UserError(
            f"model.decoder.vocab_size: {wanted} does not match data.tokenizer {config.data.tokenizer} with "
            f"{data.tokenizer.vocabulary.text_size} tokens plus {size - data.tokenizer.vocabulary.text_size} control "
            f"tokens = {size}; leave the key out to follow the tokenizer"
        )


def check_evaluation(config: Config, data: OpenData) -> None:
    """Try the closing evaluation's input before a whole training goes by; say what will be left out.

    Raises:
        UserError: held-out shards cannot be read, or nothing in one of them can be evaluated.
    """
    if config.evaluation.shards is not None:
        for sentence in check_held_out(config, data.tokenizer):
            logger.info("closing evaluation: %s", sentence)


def finish(config: Config, run_dir: Path, device: torch.device) -> int:
    """Closing evaluation, where held-out documents are named, and the report, as far as they are not there; needs no
    process group. Returns an exit code."""
    checkpoint = resolve_checkpoint(run_dir)
    step = read_state(checkpoint)["progress"]["step"]
    keep_metrics(run_dir / METRICS, step, kept_metrics(run_dir))  # the report reads them
    return close_run(config, run_dir, step, lambda: load_model(checkpoint).to(device))


def dry_run(config: Config, ds_config: dict[str, Any]) -> str:
    """Check everything that can be checked without training, for one rank: data, model, engine settings.

    Returns:
        YAML with sample counts, parameters by part and one batch.
    """
    data = open_checked_data(config)
    complete = complete_ds_config(ds_config, config, 1)
    rows = rows_per_micro_step(config, 1)
    vocab_size = data.tokenizer.vocabulary.size
    model = build_model(config.model, vocab_size, config.data.longest_document, config.seed("init"))
    given = give_weights(model, config, data)
    objective = build_objective(model, config.objective, config.seed("init"))
    batch = next(BatchLoader(data.sources, row_settings(config), data.tokenizer, rows))
    return yaml.safe_dump(
        {
            "samples": {source.name: len(source) for source in data.sources},
            "vocabulary": data.tokenizer.vocabulary.size,
            "parameters": {n: sum(w.numel() for w in part.parameters()) for n, part in model.named_children()},
            **({"given_weights": given} if given else {}),
            "objective": {"name": config.objective.name, "decoder_passes_per_sample": objective.decoder_passes},
            "first_micro_batch_of_one_rank": {
                "rows": rows,
                "tokens": batch.token_count,
                "images": batch.image_count,
                **objective.counts(batch),
                "padding_fraction": 1 - batch.token_count / batch.input_ids.numel(),
            },
            "ds_config": complete,
        },
        sort_keys=False,
    )
