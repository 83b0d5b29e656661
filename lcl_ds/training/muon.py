"""Muon for the matrices of the towers, AdamW for all other weights.

The update of a matrix is its momentum with all singular values brought close to 1 (Jordan et al., 2024, "Muon"), by
five steps of a Newton-Schulz iteration, and scaled by ``0.2 * sqrt(largest side)``, so that its size is that of AdamW's
and learning rate and decay can be the same (Liu et al., 2025, arXiv 2502.16982).

The iteration needs whole matrices, which ZeRO cuts up. So every rank brings its pieces of the momentum up to date and
sends them to the owner of each matrix; owners compute side by side, and every rank receives its pieces of the updates.
Each number travels twice, and no rank holds more than its pieces and the matrices that it owns in one round.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from lcl_ds.training.distributed import gather_objects
from lcl_ds.training.engine_state import MOMENTUM, held_parts, stepped_together
from lcl_ds.training.optimizer import BoundedAdamW
from lcl_ds.training.settings import TrainSettings

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the iteration, by Jordan et al.: steepest at 0, and singular values end between about 0.7 and 1.2."""
ITERATIONS = 5
RMS = 0.2
"""Root mean square of AdamW's usual update, which a matrix's update is scaled to."""
ROUND_ELEMENTS = 2**25
"""Elements for each rank that one round exchanges, unless a single matrix has more."""


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring the singular values of [A, B] close to 1, in the type of ``matrix``."""
    a, b, c = COEFFICIENTS
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-30)  # a matrix of zeros stays one
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


@dataclass(frozen=True)
class Piece:
    """Elements ``start .. start + length`` of a flattened matrix, as one rank holds them."""

    rank: int
    start: int
    length: int


@dataclass
class Matrix:
    """One matrix that is updated."""

    number: int
    """Of the weight among the model's."""
    shape: tuple[int, int]
    pieces: list[Piece]
    """All that there is of it, each element on one rank; or the whole of it on every rank."""
    is_split: bool
    owner: int = 0

    @property
    def given(self) -> list[Piece]:
        """Pieces that the owner makes the whole of."""
        return self.pieces if self.is_split else [piece for piece in self.pieces if piece.rank == self.owner]

    @property
    def scale(self) -> float:
        return RMS * math.sqrt(max(self.shape))

    @property
    def cost(self) -> int:
        return math.prod(self.shape) * min(self.shape)


@dataclass(frozen=True)
class Own:
    """Where this rank keeps its piece of a matrix."""

    stepped: Tensor
    """Of the optimizer: long ones hold pieces of many matrices."""
    first: int
    length: int

    @property
    def values(self) -> Tensor:
        """View the piece of the fp32 weight."""
        return self.stepped.view(-1)[self.first : self.first + self.length]

    @property
    def gradient(self) -> Tensor:
        """View the piece of what stands in the gradient's place."""
        assert self.stepped.grad is not None
        return self.stepped.grad.view(-1)[self.first : self.first + self.length]


class Muon(BoundedAdamW):
    """Updates groups with ``is_matrices`` by Muon and the others by AdamW.

    Args:
        dtype: of the iteration and of what is exchanged for it.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        settings: TrainSettings,
        max_norm: float | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(groups, settings, max_norm)
        self.momentum, self.dtype = settings.muon_momentum, dtype
        self._rounds: dict[int, list[list[Matrix]]] = {}
        """By the first of the tensors that are stepped together."""
        self._own: dict[int, Own] = {}
        """By the number of the matrix."""

    def share_out(self, engine: Any) -> None:
        """Learn who holds what of each matrix, and decide who computes it; collective, once the engine has started."""
        self._device = engine.device
        numbers = {name: number for number, (name, _) in enumerate(engine.module.named_parameters())}
        shapes = [tuple(getattr(weight, "ds_shape", weight.shape)) for weight in engine.module.parameters()]
        turns = {id(weight): n for n, together in enumerate(stepped_together(engine)) for weight in together}
        firsts = [id(together[0]) for together in stepped_together(engine)]
        own = []
        for part in held_parts(engine):
            if part.stepped is None or MOMENTUM not in part.values:
                continue
            length = part.values[MOMENTUM].numel()
            self._own[numbers[part.name]] = Own(part.stepped, part.first, length)
            own.append((turns[id(part.stepped)], numbers[part.name], part.start, length, part.is_split))
        held = [(*entry, rank) for rank, of_rank in enumerate(gather_objects(own)) for entry in of_rank]
        for turn, of_turn in groupby(sorted(held), key=lambda entry: entry[0]):
            matrices = []
            for number, of_matrix in groupby(of_turn, key=lambda entry: entry[1]):
                entries = list(of_matrix)
                pieces = [Piece(rank, start, length) for _, _, start, length, _, rank in entries]
                matrices.append(Matrix(number, shapes[number], pieces, entries[0][4]))
            self._rounds[firsts[turn]] = list(rounds_of(matrices, dist.get_world_size()))

    def _update(self, closure: Any) -> None:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["is_matrices"]]
        super()._update(closure)
        self.param_groups = groups
        for group in groups:
            if group["is_matrices"] and group["params"]:
                self._update_matrices(group)

    def _update_matrices(self, group: dict[str, Any]) -> None:
        for weight in group["params"]:
            momentum = self.state[weight][MOMENTUM]
            if weight.grad is None:  # at stage 0, where no loss reaches it
                weight.grad = torch.zeros_like(weight)
            momentum.lerp_(weight.grad, 1 - self.momentum)
            weight.grad.lerp_(momentum, self.momentum)  # Nesterov's, in the place of the gradient, which is done with
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        for matrices in self._rounds.get(id(group["params"][0]), []):
            for matrix, update in self._orthogonal_pieces(matrices):
                values = self._own[matrix.number].values
                values.add_(update.to(values.device, values.dtype), alpha=-group["lr"] * matrix.scale)

    def _orthogonal_pieces(self, matrices: list[Matrix]) -> Iterator[tuple[Matrix, Tensor]]:
        """Give this rank's piece of the update of every matrix of a round that it holds some of; collective."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        by_owner = [[matrix for matrix in matrices if matrix.owner == owner] for owner in range(world_size)]
        to_owners = [
            [self._own[m.number].gradient for m in owned for p in m.given if p.rank == rank] for owned in by_owner
        ]
        own = by_owner[rank]
        sizes = [[p.length for m in own for p in m.given if p.rank == source] for source in range(world_size)]
        received = self._exchange(to_owners, sizes)
        wholes = [torch.empty(math.prod(matrix.shape), dtype=self.dtype, device=self._device) for matrix in own]
        for source in range(world_size):
            pieces = iter(received[source])
            for matrix, whole in zip(own, wholes, strict=True):
                for piece in matrix.given:
                    if piece.rank == source:
                        whole[piece.start : piece.start + piece.length] = next(pieces)
        updates = [orthogonalize(w.view(m.shape)).reshape(-1) for m, w in zip(own, wholes, strict=True)]
        to_holders = [
            [
                update[piece.start : piece.start + piece.length]
                for matrix, update in zip(own, updates, strict=True)
                for piece in matrix.pieces
                if piece.rank == holder
            ]
            for holder in range(world_size)
        ]
        held = [[m for m in owned if any(p.rank == rank for p in m.pieces)] for owned in by_owner]
        sizes = [[self._own[matrix.number].length for matrix in of_owner] for of_owner in held]
        for of_owner, pieces_of_owner in zip(held, self._exchange(to_holders, sizes), strict=True):
            yield from zip(of_owner, pieces_of_owner, strict=True)

    def _exchange(self, sent: list[list[Tensor]], sizes: list[list[int]]) -> list[list[Tensor]]:
        """Send tensors to each rank and receive some of these ``sizes`` from each; collective."""
        flat = [tensor.to(self._device, self.dtype) for of_rank in sent for tensor in of_rank]
        outgoing = torch.cat(flat) if flat else torch.empty(0, dtype=self.dtype, device=self._device)
        counts = [sum(of_rank) for of_rank in sizes]
        incoming = torch.empty(sum(counts), dtype=self.dtype, device=self._device)
        dist.all_to_all_single(incoming, outgoing, counts, [sum(map(len, of_rank)) for of_rank in sent])
        return [list(part.split(of_rank)) for part, of_rank in zip(incoming.split(counts), sizes, strict=True)]


def rounds_of(matrices: list[Matrix], world_size: int) -> Iterator[list[Matrix]]:
    """Divide matrices into rounds that fit into memory, and give each matrix of a round an owner.

    The costliest come first, each to the rank with the least to do.
    """
    limit = ROUND_ELEMENTS * world_size
    totals = accumulate(math.prod(matrix.shape) for matrix in matrices)
    numbered = zip((total // limit for total in totals), matrices, strict=True)
    for _, of_round in groupby(numbered, key=lambda entry: entry[0]):
        chosen = [matrix for _, matrix in of_round]
        work = [0] * world_size
        for matrix in sorted(chosen, key=lambda matrix: -matrix.cost):
            matrix.owner = work.index(min(work))
            work[matrix.owner] += matrix.cost
        yield chosen
