"""Open a corpus: the indexed sources and the tokenizer of a run, with everything that is wrong found at once."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lcl_ds.cli import problems_of
from lcl_ds.data.demo.corpus import ensure_demo
from lcl_ds.data.demo.textured import ensure_textured
from lcl_ds.data.settings import DataSettings, SourceSettings
from lcl_ds.data.shards.shard import Shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.storage import expand_paths
from lcl_ds.data.shards.team import ALONE, Team, Told, open_together
from lcl_ds.errors import UserError
from lcl_ds.tokens import TextTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenData:
    """Indexed sources and the tokenizer of a run."""

    sources: list[Source]
    tokenizer: TextTokenizer


@dataclass(frozen=True)
class Locations:
    """Shards that a source names, and what is wrong with its paths."""

    shards: list[str]
    problems: list[str] = field(default_factory=list)


def open_data(settings: DataSettings, team: Team = ALONE) -> OpenData:
    """Make the embedded corpora where they are wanted, open all shards, load the tokenizer.

    Args:
        team: the processes that share the work; every one of them must call this.

    Raises:
        UserError: with every problem found: missing paths, unreadable shards, no tokenizer. What is wrong with shards
            all processes find, or those of the hosts where they are missing.
    """
    problems: list[str] = []
    try:
        if settings.demo is not None:
            ensure_demo(Path(settings.demo))
        if settings.textured is not None:
            ensure_textured(settings.textured)
    except Exception as error:  # told below, when no other process waits for this one any more
        sentences = problems_of(error)
        if sentences is None:
            raise
        problems += sentences
    found: list[Locations] = team.from_first(lambda: [_expand(entry) for entry in settings.shards])
    opened = open_together([shard for locations in found for shard in locations.shards], Path(settings.cache), team)
    problems += [f"data.shards: {problem}" for problem in opened.problems]
    sources: list[Source] = []
    end = 0
    for entry, locations in zip(settings.shards, found, strict=True):
        start, end = end, end + len(locations.shards)
        try:
            shards = _usable(entry.name, locations, opened.shards[start:end], opened.told[start:end], team)
            sources.append(Source(entry.name, shards, entry.weight))
        except UserError as error:
            problems += [f"data.shards: {entry.name}: {problem}" for problem in error.problems]
    try:
        tokenizer = open_tokenizer(settings)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    return OpenData(sources, tokenizer)


def open_tokenizer(settings: DataSettings) -> TextTokenizer:
    """Load the tokenizer. Raises: UserError when it cannot be loaded."""
    try:
        return TextTokenizer(settings.tokenizer)
    except ValueError as error:
        raise UserError(f"data.tokenizer: {error}") from error


def _expand(entry: SourceSettings) -> Locations:
    """Find the shards that a source names, or what is wrong with its paths."""
    try:
        return Locations(expand_paths(entry.paths))
    except UserError as error:
        return Locations([], error.problems)


def _usable(
    name: str, locations: Locations, opened: Sequence[Shard | None], told: Sequence[Told], team: Team
) -> list[Shard]:
    """Return the shards of a source that hold samples; the others are named in the log.

    Raises:
        UserError: a shard is missing or cannot be read, or none holds samples.
    """
    if locations.problems:
        raise UserError(locations.problems)
    problems = [problem for of_shard in told if not of_shard.is_empty for problem in of_shard.problems]
    empty = [problem for of_shard in told if of_shard.is_empty for problem in of_shard.problems]
    shards = [shard for shard in opened if shard is not None]
    if problems or not shards:
        raise UserError(problems or empty)
    if team.number == 0:
        for problem in empty:
            logger.warning("data.shards: %s: %s and is passed over", name, problem)
        _name_copies(name, shards)
    return shards


def _name_copies(name: str, shards: Sequence[Shard]) -> None:
    """Log that commands were not run, where what they wrote earlier is used."""
    copies = [shard for shard in shards if shard.copied]
    if copies:
        oldest = min(copies, key=lambda shard: str(shard.copied))
        logger.info(
            "data.shards: %s: %d of %d shards are copies that were kept of what their commands wrote, the oldest of %s "
            "(%s); remove a copy, or check its command with python -m lcl_ds.data check, to run the command again",
            name,
            len(copies),
            len(shards),
            oldest.copied,
            oldest.path,
        )
