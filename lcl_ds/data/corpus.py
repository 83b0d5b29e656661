"""Open a corpus: the indexed sources and the tokenizer of a run, with everything that is wrong found at once."""

import logging
from dataclasses import dataclass
from pathlib import Path

from lcl_ds.data.demo.corpus import ensure_demo
from lcl_ds.data.settings import DataSettings, SourceSettings
from lcl_ds.data.shards.shard import EmptyShardError, Shard, index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.storage import expand_paths
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
    """Index the shards of a source and return those that hold samples; the others are named in the log.

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
