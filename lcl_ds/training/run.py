"""One run from settings to report: what ``launch/train.py`` does after its arguments are read."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import distributed as dist

from lcl_ds.assembly import build_empty, lane_settings, open_checked_data, weights_given
from lcl_ds.config import Config
from lcl_ds.data.corpus import OpenData
from lcl_ds.data.stream.loader import BatchLoader
from lcl_ds.evaluation.check import check_held_out
from lcl_ds.evaluation.final import close_run
from lcl_ds.metrics import METRICS, keep_metrics
from lcl_ds.models.build import check_attention_here, image_size
from lcl_ds.models.network import LCLModel
from lcl_ds.models.placement import place
from lcl_ds.phases import config_of_step, last_step_of_phase
from lcl_ds.training.averaging import start_average
from lcl_ds.training.checkpoint import (
    EMA,
    Progress,
    holds,
    load_model,
    newest_checkpoint,
    read_manifest,
    read_state,
    resolve_checkpoint,
)
from lcl_ds.training.distributed import (
    RankInfo,
    collective_timeout_s,
    init_distributed,
    on_all_ranks,
    raise_for_all,
    team_of,
)
from lcl_ds.training.engine import complete_ds_config, load_engine, rows_per_micro_step, start_engine
from lcl_ds.training.loop import Trainer
from lcl_ds.training.many_ranks import spread
from lcl_ds.training.monitor import kept_metrics
from lcl_ds.training.peers import peers_of
from lcl_ds.training.pulse import PULSE
from lcl_ds.training.resume import check_same_run, engine_changes
from lcl_ds.training.run_folder import (
    check_run_writable,
    check_same_settings,
    check_seen_by_all,
    holding_folder,
    write_run_files,
)
from lcl_ds.training.saver import check_room_for_all, remove_partial
from lcl_ds.training.signals import STOP
from lcl_ds.training.trackers import check_trackers
from lcl_ds.training.warm_start import agree_on_start, find_start, open_start
from lcl_ds.training.watch import WATCH, Limits

logger = logging.getLogger(__name__)


def run(config: Config, ds_config: dict[str, Any], run_dir: Path) -> int:
    """Train, evaluate and report; resumes where the run folder has a checkpoint.

    Args:
        ds_config: from :func:`lcl_ds.training.engine.load_ds_config`.

    Returns:
        Exit code: 0 when finished, 128 + signal when a signal stopped the run after a checkpoint, 1 or 2 when the
        final evaluation failed.

    Raises:
        UserError: settings and input that do not fit together, found before a model is built.
    """
    rank_info = init_distributed(collective_timeout_s(config.train))
    raise_for_all([], rank_info)  # hears what other ranks found before they came here
    with on_all_ranks(rank_info):
        check_same_settings(config, ds_config, rank_info)
    with on_all_ranks(rank_info):
        data = open_checked_data(config, team_of(rank_info))
        if rank_info.is_first:
            check_evaluation(config, data)
    with peers_of(rank_info) as peers, holding_folder(run_dir, rank_info):
        WATCH.guard(Limits(config.train.start_hang_seconds, config.train.hang_seconds), peers)
        return _run(config, ds_config, run_dir, rank_info, data)


def _run(config: Config, ds_config: dict[str, Any], run_dir: Path, rank_info: RankInfo, data: OpenData) -> int:
    check_attention_here(config.model, rank_info.device.type, config.precision)
    full_ds_config = complete_ds_config(ds_config, config, rank_info.world_size)
    with on_all_ranks(rank_info):
        if rank_info.is_first:
            check_trackers(config.log.trackers)
    checkpoint = newest_checkpoint(run_dir, rank_info, config.checkpoint.ignore_damaged)
    changes: list[str] = []
    if checkpoint is not None:
        with on_all_ranks(rank_info):
            changes = check_same_run(checkpoint, config) + engine_changes(run_dir, full_ds_config)
    received = None
    steps_done = read_state(checkpoint)["progress"]["step"] if checkpoint else 0
    if steps_done >= config.train.steps:
        logger.info("%s is finished: %d of %d steps done", run_dir, steps_done, config.train.steps)
    else:
        with on_all_ranks(rank_info):
            check_run_writable(run_dir)
            if rank_info.is_first:
                remove_partial(run_dir)
        check_seen_by_all(run_dir, rank_info)
        trainer = prepare(config, full_ds_config, run_dir, rank_info, data, checkpoint)
        for sentence in changes if rank_info.is_first else []:
            logger.info("%s", sentence)
        with on_all_ranks(rank_info):
            if rank_info.is_first:
                check_room_for_all(run_dir, trainer.saver.bytes_of_checkpoint(), config.checkpoint.keep)
                write_run_files(run_dir, config, full_ds_config, rank_info.world_size, steps_done)
        received = train(
            trainer,
            lambda: prepare(config, full_ds_config, run_dir, rank_info, data, newest_checkpoint(run_dir, rank_info)),
        )
        del trainer
    STOP.enter("closing")
    PULSE.begin("closing", PULSE.step)
    dist.destroy_process_group()
    received = received or STOP.received  # it may have come after the ranks last asked each other
    if received:
        return 128 + received
    return finish(config, run_dir, rank_info.device) if rank_info.is_first else 0


def train(trainer: Trainer, prepare_again: Callable[[], Trainer]) -> int | None:
    """Train all phases to the end, whatever is rolled back on the way, and give back the memory for the evaluation.

    Args:
        prepare_again: makes a trainer that goes on from the newest checkpoint.

    Returns:
        The number of a signal that asked to stop; None at the end.
    """
    received = trainer.train()
    while received is None and not trainer.is_finished:
        trainer.release()
        trainer = prepare_again()
        received = trainer.train()
    trainer.release()
    return received


def prepare(
    config: Config,
    ds_config: dict[str, Any],
    run_dir: Path,
    rank_info: RankInfo,
    data: OpenData,
    checkpoint: Path | None = None,
) -> Trainer:
    """Make loader, model and engine of this rank, at the start or where ``checkpoint`` stands."""
    state = read_state(checkpoint) if checkpoint else None
    progress = Progress(**state["progress"]) if state else Progress()
    phase = config_of_step(config, progress.step + 1)
    if phase != config_of_step(config, progress.step):
        progress.recent.clear()  # what was usual with images of another size says nothing of these
    vocab_size = data.tokenizer.vocabulary.size
    start = None if checkpoint else agree_on_start(config.model, rank_info)
    with on_all_ranks(rank_info):
        loader = BatchLoader(
            data.sources,
            lane_settings(phase),
            data.tokenizer,
            rows_per_micro_step(config, rank_info.world_size),
            rank_info.rank,
            rank_info.world_size,
            config.data.workers,
            state["loader"] if state else None,
            pin_memory=rank_info.device.type == "cuda",
        )
        objective = build_empty(phase, vocab_size)
        open_weights = partial(open_start, phase.model, start)
        given, sentences = ({}, []) if checkpoint else weights_given(objective.model, phase, data, open_weights)
    for sentence in sentences if rank_info.is_first else []:
        logger.info("%s", sentence)
    engine = start_engine(objective, config, ds_config, rank_info, given, has_values=checkpoint is None)
    if checkpoint:
        load_engine(engine, checkpoint, rank_info)
        if rank_info.is_first:
            logger.info("continuing %s at step %d", checkpoint, progress.step)
    if config.train.image_sizes and rank_info.is_first:
        last, size = last_step_of_phase(config, progress.step + 1), image_size(phase.model)
        logger.info("images of %d x %d pixels until step %d", size, size, last)
    average = start_average(engine, config.train.ema_decay, checkpoint, rank_info)
    return Trainer(engine, loader, config, rank_info, run_dir, vocab_size, progress, average)


def check_evaluation(config: Config, data: OpenData) -> None:
    """Try the input of the final evaluation before the training; say what will be left out.

    Raises:
        UserError: held-out shards cannot be read, or nothing in one of them can be evaluated.
    """
    if config.evaluation.shards is not None:
        for sentence in check_held_out(config, data.tokenizer):
            logger.info("final evaluation: %s", sentence)


def finish(config: Config, run_dir: Path, device: torch.device) -> int:
    """Evaluate, where held-out documents are named, and write the report, as far as this was not done before.

    It needs no process group. Returns an exit code.
    """
    checkpoint = resolve_checkpoint(run_dir)
    step = read_state(checkpoint)["progress"]["step"]
    keep_metrics(run_dir / METRICS, step, kept_metrics(run_dir))  # the report reads them

    def load(ema: bool = False) -> LCLModel:
        model = load_model(checkpoint, ema=ema)
        place(model, device)
        return model

    has_average = holds(read_manifest(checkpoint), EMA)
    return close_run(config, run_dir, step, load, partial(load, ema=True) if has_average else None)


def dry_run(config: Config, ds_config: dict[str, Any], ranks: int = 1) -> str:
    """Check everything that can be checked without training, for so many ranks: data, model, engine settings.

    Returns:
        YAML with sample counts, parameters by part and one batch.

    Raises:
        UserError: with what is wrong, or does not fit this number of ranks.
    """
    complete = complete_ds_config(ds_config, config, ranks)
    check_trackers(config.log.trackers)
    data = open_checked_data(config)
    check_evaluation(config, data)
    rows = rows_per_micro_step(config, ranks)
    phase = config_of_step(config, 1)
    objective = build_empty(phase, data.tokenizer.vocabulary.size)
    network = objective.model
    _, loaded = weights_given(network, phase, data, partial(open_start, phase.model, find_start(phase.model)))
    settings, batches = lane_settings(phase), {}
    for rank in sorted({0, ranks - 1}):
        loader = BatchLoader(data.sources, settings, data.tokenizer, rows, rank, ranks)
        batches[rank] = next(loader)
    batch = batches[0]
    return yaml.safe_dump(
        {
            "samples": {source.name: len(source) for source in data.sources},
            "vocabulary": data.tokenizer.vocabulary.size,
            "parameters": {n: sum(w.numel() for w in module.parameters()) for n, module in network.named_children()},
            **({"given_weights": loaded} if loaded else {}),
            "objective": {"name": config.objective.name, "decoder_passes_per_sample": objective.decoder_passes},
            "first_micro_batch_of_one_rank": {
                "rows": rows,
                "tokens": batch.token_count,
                "images": batch.image_count,
                **objective.count_terms(batch),
                "padding_fraction": 1 - batch.token_count / batch.input_ids.numel(),
            },
            **({"spread": spread(config, loader, batches, ranks)} if ranks > 1 else {}),
            "ds_config": complete,
        },
        sort_keys=False,
    )
