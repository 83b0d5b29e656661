"""From settings to an opened stream, with everything that can be wrong found before a model is built."""

import logging
from dataclasses import dataclass
from pathlib import Path

from lcl_ds.config import Config
from lcl_ds.data.demo.corpus import ensure_demo
from lcl_ds.data.sequences import View
from lcl_ds.data.settings import DataSettings, SourceSettings
from lcl_ds.data.shards.index import EmptyShardError, Shard, index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.storage import expand_paths
from lcl_ds.data.stream.lanes import LaneSettings
from lcl_ds.errors import UserError
from lcl_ds.tokens import TextTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenData:
    """Indexed sources and the tokenizer of a run."""

    sources: list[Source]
    tokenizer: TextTokenizer


def open_data(settings: DataSettings) -> OpenData:
    """Make the demo corpus where it is wanted, index all shards, load the tokenizer.

    Raises:
        UserError: with every problem found: missing paths, unreadable shards, no tokenizer.
    """
    if settings.demo is not None:
        ensure_demo(Path(settings.demo))
    problems: list[str] = []
    sources: list[Source] = []
    for entry in settings.shards:
        try:
            shards = _index_all(entry, Path(settings.cache))
            sources.append(Source(entry.name, shards, entry.weight))
        except UserError as error:
            problems += [f"data.shards: {entry.name}: {problem}" for problem in error.problems]
    try:
        tokenizer = TextTokenizer(settings.tokenizer)
    except ValueError as error:
        problems.append(f"data.tokenizer: {error}")
    if problems:
        raise UserError(problems)
    return OpenData(sources, tokenizer)


def _index_all(entry: SourceSettings, cache: Path) -> list[Shard]:
    """The shards of a source that hold samples; the others are named in the log.

    Raises:
        UserError: a shard is missing or cannot be read, or none holds samples.
    """
    shards: list[Shard] = []
    empty: list[str] = []
    for path in expand_paths(entry.paths):
        try:
            shards.append(index_shard(path, cache))
        except EmptyShardError as error:
            empty += error.problems
    if not shards:
        raise UserError(empty)
    for problem in empty:
        logger.warning("data.shards: %s: %s and is passed over", entry.name, problem)
    copies = [shard for shard in shards if shard.copied]
    if copies:
        oldest = min(copies, key=lambda shard: str(shard.copied))
        logger.info(
            "data.shards: %s: %d of %d shards are copies that were kept of what their commands wrote, the oldest of %s "
            "(%s); remove a copy, or check its command with python -m lcl_ds.data check, to run the command again",
            entry.name,
            len(copies),
            len(shards),
            oldest.copied,
            oldest.path,
        )
    return shards


def lane_settings(config: Config, view: View, image_tokens: int, image_size: int) -> LaneSettings:
    """What the lanes need to know of a run's settings."""
    data = config.data
    if image_tokens + 4 > data.longest_document:
        name = "row_tokens" if data.document_tokens is None else "document_tokens"
        raise UserError(f"data.{name}: {data.longest_document} cannot hold one image of {image_tokens} tokens plus 4")
    return LaneSettings(
        lanes=data.lanes or 0,
        data_seed=config.seed("data"),
        augmentation_seed=config.seed("augmentation"),
        row_tokens=data.row_tokens,
        document_tokens=data.document_tokens,
        row_images=data.row_images,
        image_tokens=image_tokens,
        image_size=image_size,
        rows_per_step=config.train.global_batch_rows,
        mix_by=data.mix_by,
        group_rows=data.group_rows,
        row_pool=data.row_pool,
        pack_window=data.pack_window,
        block_samples=data.block_samples,
        shuffle_blocks=data.shuffle_blocks,
        view=view,
        crop_scale=data.crop_scale,
        max_image_pixels=data.max_image_pixels,
        max_text_bytes=data.max_text_bytes,
        max_bad_share=data.max_bad_share,
        stall_seconds=data.stall_seconds,
    )
