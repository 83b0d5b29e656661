"""What ranks tell each other about their pairs: counts, features of one side, and the gradients that go back.

Gloo and NCCL alike. Pieces of different lengths travel with exact sizes, or padded where a collective needs equal ones;
always as bytes, because not every backend knows every dtype.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

Exchange = Literal["auto", "gather", "ring"]

_SEVERAL_HOSTS: WeakKeyDictionary[dist.ProcessGroup, bool] = WeakKeyDictionary()
"""Of the groups that have met: whether their ranks are on more than one machine. Kept by group and not by its name,
which a later group can have again."""


@dataclass(frozen=True)
class Ranks:
    """Who has how many pairs."""

    group: dist.ProcessGroup | None
    counts: list[int]
    rank: int
    wants_gradients: bool  # on any rank: then all take part in the exchange that gradients need
    ring: bool  # the same on all ranks

    @property
    def world_size(self) -> int:
        return len(self.counts)

    @property
    def count(self) -> int:
        return self.counts[self.rank]

    @property
    def total(self) -> int:
        return sum(self.counts)

    def slice_of(self, rank: int) -> slice:
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])


def group_name(group: dist.ProcessGroup | None) -> str:
    """The name by which an operator finds the group again; "" for a process on its own."""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    group = dist.group.WORLD if group is None else group
    if group == dist.GroupMember.NON_GROUP_MEMBER or dist.get_rank(group) < 0:
        raise ValueError("this process is not a member of the group that it passed to the loss")
    return str(group.group_name)  # type: ignore[union-attr]


def _group_of(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, unused-ignore]


def meet(
    x: Tensor,
    name: str,
    function: str,
    options: Mapping[str, object],
    *,
    exchange: str,
    counts: Sequence[int] | None,
    wants_gradients: bool,
) -> Ranks:
    """Agree with the other ranks of the group on counts and exchange.

    Without `counts` the ranks exchange theirs in every call. With `counts` they meet in the first call on a group only:
    its first collective has to be one in which all take part, and "auto" has to mean the same to all. Later calls
    exchange nothing here and wait for nothing.

    Raises:
        ValueError: `counts` are wrong, or the ranks met and called differently; then on all of them.
    """
    group = _group_of(name) if name else None
    world_size, rank = (dist.get_world_size(group), dist.get_rank(group)) if name else (1, 0)
    if counts is None and world_size == 1:
        counts = [len(x)]
    if counts is not None and (world_size == 1 or group in _SEVERAL_HOSTS):
        if len(counts) != world_size or counts[rank] != len(x):
            raise ValueError(
                f"counts {list(counts)} do not match: {world_size} ranks, {len(x)} pairs on this one (rank {rank})"
            )
        pairs, wanted = list(counts), wants_gradients
    else:
        options = {"D": x.shape[1], "dtype": x.dtype, "exchange": exchange, **options}
        if counts is not None:
            options = {**options, "counts": list(counts), "gradients": wants_gradients}
        pairs, wanted = _introduce(x, group, function, options, wants_gradients)
        if counts is not None and list(counts) != pairs:
            raise ValueError(f"counts {list(counts)} do not match: the ranks have {pairs} pairs")
    ring = exchange == "ring" or (exchange == "auto" and world_size > 1 and _SEVERAL_HOSTS[group])  # type: ignore[index]
    return Ranks(group, pairs, rank, wanted, ring)


def _introduce(
    x: Tensor, group: dist.ProcessGroup | None, function: str, options: Mapping[str, object], wants_gradients: bool
) -> tuple[list[int], bool]:
    """Tell all ranks of the group what this one has, and remember whether they share a machine.

    Returns:
        The pairs of every rank, and whether any of them wants gradients.
    """
    call = f"{function} with {', '.join(f'{key} {value}' for key, value in options.items())}"
    mine = torch.tensor([len(x), wants_gradients, _number_of(call), _number_of(_machine())], device=x.device)
    table = [row.tolist() for row in _all_gather(mine, group)]
    if len({row[2] for row in table}) > 1:
        calls: list[str] = [""] * len(table)
        dist.all_gather_object(calls, call, group=group)
        listing = "; ".join(f"rank {_listed(calls, call)}: {call}" for call in dict.fromkeys(calls))
        raise ValueError(f"{function} was called differently by the ranks of the group: {listing}")
    assert group is not None
    _SEVERAL_HOSTS[group] = len({row[3] for row in table}) > 1
    return [row[0] for row in table], any(row[1] for row in table)


def _listed(calls: list[str], call: str) -> str:
    """The first rank with this call, and how many more there are."""
    more = calls.count(call) - 1
    return f"{calls.index(call)}{f' and {more} more' if more else ''}"


def _machine() -> str:
    """A name for this machine, made as NCCL makes it: host names alone are often "localhost"."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text() if boot.exists() else ''}"


def _number_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


class FeatureBlocks:
    """The features of every rank, block by block, one's own first, each on its way while the one before is in use.

    gather: one all-gather, kept for the next walk. ring: every block moves on from rank to rank, two at a time in
    memory, again in every walk.
    """

    def __init__(self, own: Tensor, ranks: Ranks) -> None:
        self._own, self._ranks = own, ranks
        self._gathered: list[Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """(rank, its features [count, D]) of all ranks that have pairs."""
        return self.walk(None)

    def walk(self, home: GradientReturn | None) -> Iterator[tuple[int, Tensor]]:
        """The same, for a walk that sends gradients home.

        NCCL runs the transfers of a rank one after another. Every rank has to start them in the same order then, also
        those that pass over a rank without pairs: else two ranks wait for each other.
        """
        if self._ranks.world_size == 1 or self._ranks.total == 0:
            yield self._ranks.rank, self._own
            return
        for rank, block in self._walk_ring() if self._ranks.ring else self._walk_gathered():
            if len(block):
                yield rank, block
            elif home is not None:
                home.pass_over(rank)

    def _walk_gathered(self) -> Iterator[tuple[int, Tensor]]:
        ranks, work = self._ranks, None
        if self._gathered is None:
            padded = _padded(self._own, max(ranks.counts))
            self._gathered = [torch.empty_like(padded) for _ in ranks.counts]
            work = dist.all_gather(_bytes_of(self._gathered), _bytes(padded), group=ranks.group, async_op=True)
        yield ranks.rank, self._own
        if work is not None:
            work.wait()
        for hop in range(1, ranks.world_size):
            rank = (ranks.rank + hop) % ranks.world_size
            yield rank, self._gathered[rank][: ranks.counts[rank]]

    def _walk_ring(self) -> Iterator[tuple[int, Tensor]]:
        ranks, held = self._ranks, self._own
        for hop in range(ranks.world_size):
            rank, following = ((ranks.rank + h) % ranks.world_size for h in (hop, hop + 1))
            incoming = self._own.new_empty(ranks.counts[following], self._own.shape[1])
            last = hop == ranks.world_size - 1
            requests = [] if last else _swap(held, ranks.rank - 1, incoming, ranks.rank + 1, ranks)
            yield rank, held
            for request in requests:
                request.wait()
            held = incoming


class GradientReturn:
    """Brings gradients of the features of other ranks home. Sums in the order of the hops, so the bits are the same
    every time; a transfer runs while the next block is computed."""

    def __init__(self, ranks: Ranks, home: Tensor) -> None:
        self._ranks, self._home, self._hop = ranks, home, 0
        self._pending: tuple[list[dist.Work], Tensor, Tensor] | None = None

    def send(self, rank: int, block: Tensor) -> None:
        """Gradient of the features of `rank` from the losses here; the ranks have to come in the order of the hops."""
        if rank == self._ranks.rank:
            self._home += block
        else:
            self._advance(block)

    def pass_over(self, rank: int) -> None:
        """The turn of a rank that has no features; others may send meanwhile."""
        if rank != self._ranks.rank:
            self._advance(None)

    def finish(self) -> Tensor:
        """The gradient of the own features, complete."""
        self._receive()
        return self._home

    def _advance(self, block: Tensor | None) -> None:
        self._hop += 1
        ranks = self._ranks
        source = (ranks.rank - self._hop) % ranks.world_size
        block = self._home.new_empty(0, self._home.shape[1]) if block is None or not ranks.count else block
        expected = ranks.count if ranks.counts[source] else 0
        incoming = self._home.new_empty(expected, self._home.shape[1])
        requests = _swap(block, ranks.rank + self._hop, incoming, source, ranks)
        self._receive()
        self._pending = (requests, incoming, block)

    def _receive(self) -> None:
        if self._pending is None:
            return
        requests, incoming, _ = self._pending
        for request in requests:
            request.wait()
        if len(incoming):
            self._home += incoming
        self._pending = None


def gather_rows(rows: Tensor, ranks: Ranks) -> Tensor:
    """[m, ...] of each rank -> [M, ...], in the order of the ranks."""
    if ranks.world_size == 1 or ranks.total == 0:
        return rows
    padded = _padded(rows, max(ranks.counts))
    pieces = [torch.empty_like(padded) for _ in ranks.counts]
    dist.all_gather(_bytes_of(pieces), _bytes(padded), group=ranks.group)
    return torch.cat([piece[:n] for piece, n in zip(pieces, ranks.counts, strict=True)])


def send_rows_home(rows: Tensor, ranks: Ranks) -> Tensor:
    """[M, K] here, one row for each pair of all ranks -> [world_size, m, K], all ranks' rows for the own pairs."""
    if ranks.world_size == 1 or ranks.total == 0:
        return rows.unsqueeze(0)
    received = rows.new_empty(ranks.world_size * ranks.count, rows.shape[1])
    dist.all_to_all_single(
        _bytes(received), _bytes(rows), [ranks.count] * ranks.world_size, ranks.counts, group=ranks.group
    )
    return received.view(ranks.world_size, ranks.count, rows.shape[1])


def _swap(sent: Tensor, to: int, received: Tensor, source: int, ranks: Ranks) -> list[dist.Work]:
    """Starts sending to one rank and receiving from another; empty tensors do not travel."""
    operations = [
        dist.P2POp(call, _bytes(tensor), group=ranks.group, group_peer=peer % ranks.world_size)
        for call, tensor, peer in ((dist.isend, sent, to), (dist.irecv, received, source))
        if tensor.numel()
    ]
    return dist.batch_isend_irecv(operations) if operations else []


def _padded(rows: Tensor, length: int) -> Tensor:
    padded = rows.new_zeros(length, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded


def _bytes(tensor: Tensor) -> Tensor:
    return (
        tensor.contiguous().view(torch.uint8) if tensor.dim() > 1 else tensor.contiguous().view(-1, 1).view(torch.uint8)
    )


def _bytes_of(tensors: list[Tensor]) -> list[Tensor]:
    return [_bytes(tensor) for tensor in tensors]


def _all_gather(tensor: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    pieces = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(pieces, tensor, group=group)
    return pieces
