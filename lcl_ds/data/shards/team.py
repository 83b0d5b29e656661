"""Open the shards of a run together: each of several processes opens its share and tells the others.

One process alone is a team of one. What is told of a shard is small: number of samples and layout. Its index lies
beside the shard, where all find it; one that could not be kept there goes to the hosts that lack it, which keep it in
their cache or, where they cannot, in memory. Every later read looks at the member's own header, so a host whose shards
are others than those that were told finds it out.
"""

import os
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lcl_ds.cli import problems_of
from lcl_ds.data.shards.index import ShardIndex
from lcl_ds.data.shards.index_file import keep_index, sidecars_of
from lcl_ds.data.shards.scan import Scan
from lcl_ds.data.shards.shard import EmptyShardError, Shard, index_shard
from lcl_ds.data.shards.storage import copy_of, is_command, is_remote
from lcl_ds.errors import UserError

ROUND = 16
"""Shards of each process between two exchanges: nobody waits long for the slowest."""

SEEN = 64
"""Shards of a folder at which a host looks one by one; for the others the folder is listed."""


@dataclass(frozen=True)
class Team:
    """Which of how many processes this is, and how they tell each other."""

    number: int
    count: int
    is_first_here: bool
    """Whether it is the first process of its host."""
    from_first: Callable[[Callable[[], Any]], Any]
    """Return on all what the first makes, or raise its UserError on all; collective."""
    gather: Callable[[Any], list[Any]]
    """Return on all what each gives, in their order; collective."""


ALONE = Team(0, 1, True, from_first=lambda make: make(), gather=lambda value: [value])


@dataclass(frozen=True)
class Told:
    """What a process tells the others of a shard that it opened."""

    samples: int = 0
    layout: str = ""
    kept: Literal["beside", "cache", "memory"] = "beside"
    """Where its index is."""
    copied: str | None = None
    """As in :class:`Shard`."""
    problems: list[str] = field(default_factory=list)
    is_empty: bool = False
    """Whether the only problem is that it holds no samples."""


@dataclass
class Opened:
    """What became of the shards that were asked for, the same on every process but for where indices are."""

    shards: list[Shard | None]
    """In the order of the locations; None: it is empty or cannot be used."""
    told: list[Told]
    problems: list[str]
    """What is wrong on this host alone."""


def open_together(locations: Sequence[str], cache: Path, team: Team = ALONE) -> Opened:
    """Open shards, each by one process of the team; what they find wrong is the same on all.

    Args:
        locations: the same on all.
        cache: folder for what cannot be kept beside the shards; may be another one on each host.
    """
    opened = Opened([], [], [])
    size = ROUND * team.count
    for start in range(0, len(locations), size):
        part = _open_round(locations[start : start + size], cache, team)
        opened.shards += part.shards
        opened.told += part.told
        opened.problems += part.problems
    if team.is_first_here and team.count > 1:
        opened.problems += _missing([path for path, shard in zip(locations, opened.shards, strict=True) if shard])
    return opened


def _open_round(locations: Sequence[str], cache: Path, team: Team) -> Opened:
    own = {n: _open(locations[n], cache) for n in range(team.number, len(locations), team.count)}
    by_process = team.gather((socket.gethostname(), [told for _, told in own.values()]))
    hosts = {host for host, _ in by_process}
    told: list[Told] = [Told()] * len(locations)
    for number, (host, some) in enumerate(by_process):
        if len(hosts) > 1:
            some = [replace(one, problems=[f"on {host}: {problem}" for problem in one.problems]) for one in some]
        told[number :: team.count] = some
    shards = [
        (own[n][0] if n in own else _shard_of(location, cache, told[n])) if not told[n].problems else None
        for n, location in enumerate(locations)
    ]
    _hand_on_indices(shards, told, own.keys(), team)
    commands = {n: shard for n, shard in enumerate(shards) if shard is not None and is_command(locations[n])}
    problems = _run_here({locations[n]: shard for n, shard in commands.items() if n not in own}, cache, team.number)
    return Opened(shards, told, problems)


def _open(location: str, cache: Path) -> tuple[Shard | None, Told]:
    """Open one shard; its problems are told and not raised, so that all processes stay in step."""
    try:
        shard = index_shard(location, cache)
    except Exception as error:
        problems = problems_of(error)
        if problems is None:
            raise
        return None, Told(problems=problems, is_empty=isinstance(error, EmptyShardError))
    kept: Literal["beside", "cache", "memory"] = "memory"
    if shard.index is None:
        kept = "beside" if is_command(location) or shard.kept_in == shard.sidecars[0] else "cache"
    return shard, Told(shard.sample_count, shard.layout, kept, shard.copied)


def _shard_of(location: str, cache: Path, told: Told) -> Shard:
    """Make the shard that another process opened; nothing is read."""
    path = location
    if is_command(location):
        with suppress(RuntimeError):  # there is no home folder here: found out when the command is run
            path = str(copy_of(location, cache))
    return Shard(path, told.samples, told.layout, sidecars_of(path, cache), copied=told.copied)


def _hand_on_indices(shards: list[Shard | None], told: list[Told], own: Set[int], team: Team) -> None:
    """Give indices that are not beside their shards to the hosts that have none; changes ``shards``."""
    usable = {n: shard for n, shard in enumerate(shards) if shard is not None}
    in_cache, in_memory = ({n for n in usable if told[n].kept == where} for where in ("cache", "memory"))
    if team.count == 1 or not in_cache | in_memory:
        return
    lacking = {n for n in in_cache - own if not _is_kept(usable[n])} if team.is_first_here else set()
    wanted = in_memory.union(*team.gather(lacking))
    turns = max(Counter(n % team.count for n in wanted).values(), default=0)
    mine = sorted(wanted & own)
    for turn in range(turns):  # of each process one index at a time is under way
        for given in team.gather({n: _index_of(usable[n]) for n in mine[turn : turn + 1]}):
            for n in given.keys() - own:
                if given[n] is not None and not _is_kept(usable[n]):
                    shards[n] = _keep(usable[n], given[n])


def _is_kept(shard: Shard) -> bool:
    """Say whether this host's cache has an index that is not beside the shard, where another program's file may be."""
    return any(os.path.exists(sidecar) for sidecar in shard.sidecars[1:])


def _index_of(shard: Shard) -> ShardIndex | None:
    """Load an index for others; None where it went away, so that they read the headers when they need them."""
    try:
        return shard.load_index()
    except (OSError, UserError):
        return None


def _keep(shard: Shard, index: ShardIndex) -> Shard:
    """Keep an index that another process made, in a file or, where that is not possible, in memory."""
    try:
        kept = keep_index(Scan(index, shard.layout, None, 1), shard.path, shard.sidecars)
    except (OSError, UserError):  # the shard is out of reach from here, which is found out where it is looked for
        kept = None
    return shard if kept else replace(shard, index=index)


def _missing(paths: Sequence[str]) -> list[str]:
    """Write a sentence about each folder of this host that lacks some of the shards; the folders are listed."""
    folders: dict[str, list[str]] = defaultdict(list)
    for path in (path for path in paths if not is_remote(path) and not is_command(path)):
        folders[os.path.dirname(path)].append(path)
    problems = []
    for folder, inside in folders.items():
        try:
            names = set(os.listdir(folder or "."))
        except OSError:  # it may be a folder whose files can be read though it cannot be listed
            names = set()
        some = set(inside[:: len(inside) // SEEN + 1])  # a name that is there may be a link to nowhere
        missing = [
            path
            for path in inside
            if (os.path.basename(path) not in names or path in some) and not os.path.exists(path)
        ]
        more = f", and {len(missing) - 1} more shards of that folder" if len(missing) > 1 else ""
        if missing:
            problems.append(f"shard {missing[0]}: is not on this host{more}; every host must see all shards")
    return problems


def _run_here(shards: Mapping[str, Shard], cache: Path, number: int) -> list[str]:
    """Run the commands whose output this host has not kept; the processes of a host begin at different ones."""
    turn = number % max(1, len(shards))
    problems = []
    for command, shard in [*shards.items()][turn:] + [*shards.items()][:turn]:
        if os.path.exists(shard.path):
            continue
        try:
            if index_shard(command, cache).layout != shard.layout:
                problems.append(f"shard {command}: the command writes something else on this host than on others")
        except UserError as error:
            problems += error.problems
    return problems
