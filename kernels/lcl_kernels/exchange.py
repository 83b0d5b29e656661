"""What ranks tell each other about their pairs: counts, features of one side, and the gradients that go back.

Gloo and NCCL alike. Pieces of different lengths travel with exact sizes, or padded where a collective needs equal ones;
always as bytes, because not every backend knows every dtype.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lcl_kernels._common import DTYPES

Exchange = Literal["auto", "gather", "ring"]


@dataclass(frozen=True)
class Ranks:
    """Who has how many pairs."""

    group: dist.ProcessGroup | None
    counts: list[int]
    rank: int
    wants_gradients: bool  # on any rank: then all take part in the exchange that gradients need

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
        raise ValueError("this process is not a member of the group it passed to contrastive_loss")
    return str(group.group_name)  # type: ignore[union-attr]


def _group_of(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, unused-ignore]


def meet(
    x: Tensor,
    name: str,
    wants_gradients: bool,
    common: Sequence[int],
    counts: Sequence[int] | None,
) -> Ranks:
    """Exchanges the counts, and what has to be the same everywhere (`common`), so that a mismatch is an error and not a
    hang. With `counts` nothing is exchanged and nothing waits for the device."""
    group = _group_of(name) if name else None
    world_size, rank = (dist.get_world_size(group), dist.get_rank(group)) if name else (1, 0)
    if counts is not None:
        if len(counts) != world_size or counts[rank] != len(x):
            raise ValueError(
                f"counts {list(counts)} do not match: {world_size} ranks, {len(x)} pairs on this one (rank {rank})"
            )
        return Ranks(group, list(counts), rank, wants_gradients)
    if world_size == 1:
        return Ranks(group, [len(x)], 0, wants_gradients)
    mine = torch.tensor([len(x), wants_gradients, *common], device=x.device)
    table = [row.tolist() for row in _all_gather(mine, group)]
    if any(row[2:] != table[0][2:] for row in table):
        listing = ", ".join(
            f"rank {r}: D {d} {DTYPES[t]} normalize {'global' if g else 'per_rank'} "
            f"detach {('none', 'remote', 'keys')[c]} exchange {'ring' if e else 'gather'}"
            for r, (_, _, d, t, g, c, e) in enumerate(table)
        )
        raise ValueError(f"contrastive_loss was called differently by the ranks of the group: {listing}")
    return Ranks(group, [row[0] for row in table], rank, any(row[1] for row in table))


def uses_ring(exchange: Exchange, name: str) -> bool:
    """ "auto": a gather inside one node, where every pair of ranks has a fast link; a ring across nodes."""
    if exchange != "auto" or not name:
        return exchange == "ring"
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or torch.cuda.device_count() or dist.get_world_size())
    return dist.get_world_size(_group_of(name)) > local


class FeatureBlocks:
    """The features of every rank, block by block, one's own first, each on its way while the one before is in use.

    gather: one all-gather, kept for the next walk. ring: every block moves on from rank to rank, two at a time in
    memory, again in every walk.
    """

    def __init__(self, own: Tensor, ranks: Ranks, ring: bool) -> None:
        self._own, self._ranks, self._ring = own, ranks, ring
        self._gathered: list[Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """(rank, its features [count, D]) of all ranks that have pairs."""
        if self._ranks.world_size == 1 or self._ranks.total == 0:
            yield self._ranks.rank, self._own
            return
        for rank, block in self._walk_ring() if self._ring else self._walk_gathered():
            if len(block):
                yield rank, block

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
        ranks = self._ranks
        if rank == ranks.rank:
            self._home += block
            return
        hop = (rank - ranks.rank) % ranks.world_size
        while self._hop < hop - 1:  # ranks without pairs were passed over
            self._advance(None)
        self._advance(block)

    def finish(self) -> Tensor:
        """The gradient of the own features, complete."""
        while self._hop < self._ranks.world_size - 1:
            self._advance(None)
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
