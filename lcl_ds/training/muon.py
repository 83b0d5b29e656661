"""Muon for the matrices of the towers, AdamW for all other weights.

The update of a matrix is its momentum with all singular values brought close to 1 (Jordan et al., 2024, "Muon"), by
five steps of a Newton-Schulz iteration, and scaled by ``0.2 * sqrt(largest side)``, so that its size is that of AdamW's
and learning rate and decay can be the same (Liu et al., 2025, arXiv 2502.16982).

The iteration needs whole matrices, which ZeRO cuts up. So every rank brings its pieces of the momentum up to date and
sends them to the owner of each matrix; owners compute side by side, and every rank receives its pieces of the updates.
Each number travels twice, and no rank holds more than its pieces and the matrices that it owns in one round.
"""

import math
from collections import defaultdict
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
    """Elements ``start .. stop`` of a flattened matrix, as one rank holds them."""

    rank: int
    start: int
    stop: int


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
    def cost(self) -> int:
        return math.prod(self.shape) * min(self.shape)


@dataclass(frozen=True)
class Round:
    """What one rank does with matrices that are computed side by side; lists are in the order of what is exchanged."""

    own: list[Matrix]
    """Those that this rank computes."""
    held: list[Matrix]
    """Those that this rank holds a piece of, by owner."""
    given: list[Matrix]
    """Those of ``held`` whose piece this rank sends."""
    arriving: list[tuple[int, Piece]]
    """Pieces that come, by the rank that sends them: which of ``own`` and what of it."""
    leaving: list[tuple[int, Piece]]
    """Pieces of updates that go, by the rank that holds them."""


def round_of(matrices: list[Matrix], rank: int) -> Round:
    """Work out what a rank does with the matrices of a round."""
    by_owner = sorted(matrices, key=lambda matrix: matrix.owner)
    own = [matrix for matrix in by_owner if matrix.owner == rank]
    held = [matrix for matrix in by_owner if any(piece.rank == rank for piece in matrix.pieces)]
    arriving = [(index, piece) for index, matrix in enumerate(own) for piece in matrix.given]
    leaving = [(index, piece) for index, matrix in enumerate(own) for piece in matrix.pieces]
    return Round(
        own,
        held,
        [matrix for matrix in held if any(piece.rank == rank for piece in matrix.given)],
        sorted(arriving, key=lambda entry: entry[1].rank),
        sorted(leaving, key=lambda entry: entry[1].rank),
    )


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
        self.rms, self.momentum, self.dtype = settings.muon_rms, settings.muon_momentum, dtype
        self._rounds: dict[int, list[Round]] = {}
        """By the first of the tensors that are stepped together."""
        self._own: dict[int, Own] = {}
        """By the number of the matrix."""

    def share_out(self, engine: Any) -> None:
        """Learn who holds what of each matrix, and decide who computes it; collective, once the engine has started."""
        self._device = engine.device
        numbers = {name: number for number, (name, _) in enumerate(engine.module.named_parameters())}
        shapes = [tuple(getattr(weight, "ds_shape", weight.shape)) for weight in engine.module.parameters()]
        turns = {id(weight): n for n, together in enumerate(stepped_together(engine)) for weight in together}
        held = []
        for part in held_parts(engine):
            if part.stepped is None or MOMENTUM not in part.values:
                continue
            number, length = numbers[part.name], part.values[MOMENTUM].numel()
            self._own[number] = Own(part.stepped, part.first, length)
            held.append((turns[id(part.stepped)], number, part.start, part.start + length, part.is_split))
        everywhere = [(*entry, rank) for rank, of_rank in enumerate(gather_objects(held)) for entry in of_rank]
        matrices: dict[int, dict[int, Matrix]] = defaultdict(dict)
        for turn, number, start, stop, is_split, rank in sorted(everywhere):
            matrix = matrices[turn].setdefault(number, Matrix(number, shapes[number], [], is_split))
            matrix.pieces.append(Piece(rank, start, stop))
        for turn, together in enumerate(stepped_together(engine)):
            rounds = rounds_of(list(matrices[turn].values()), dist.get_world_size())
            self._rounds[id(together[0])] = [round_of(of_round, dist.get_rank()) for of_round in rounds]

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
        for work in self._rounds[id(group["params"][0])]:
            for matrix, update in zip(work.held, self._orthogonal_pieces(work), strict=True):
                values = self._own[matrix.number].values
                scale = self.rms * math.sqrt(max(matrix.shape))
                values.add_(update.to(values.device, values.dtype), alpha=-group["lr"] * scale)

    def _orthogonal_pieces(self, work: Round) -> list[Tensor]:
        """Compute this rank's pieces of the updates of what it holds; collective."""
        owners = [(matrix.owner, self._own[matrix.number]) for matrix in work.given]
        arrived = self._exchange(
            [(owner, own.gradient) for owner, own in owners],
            [(piece.rank, piece.stop - piece.start) for _, piece in work.arriving],
        )
        wholes = [torch.empty(math.prod(matrix.shape), dtype=self.dtype, device=self._device) for matrix in work.own]
        for (index, piece), values in zip(work.arriving, arrived, strict=True):
            wholes[index][piece.start : piece.stop] = values
        updates = [orthogonalize(w.view(m.shape)).reshape(-1) for m, w in zip(work.own, wholes, strict=True)]
        return self._exchange(
            [(piece.rank, updates[index][piece.start : piece.stop]) for index, piece in work.leaving],
            [(matrix.owner, self._own[matrix.number].length) for matrix in work.held],
        )

    def _exchange(self, sent: list[tuple[int, Tensor]], received: list[tuple[int, int]]) -> list[Tensor]:
        """Send tensors to ranks and receive some from them; collective.

        Args:
            sent: with the rank it goes to, in the order of ranks.
            received: the rank it comes from and its length, in the order of ranks.
        """
        flat = [tensor.to(self._device, self.dtype) for _, tensor in sent]
        outgoing = torch.cat(flat) if flat else torch.empty(0, dtype=self.dtype, device=self._device)
        incoming = torch.empty(sum(length for _, length in received), dtype=self.dtype, device=self._device)
        coming, going = ([0] * dist.get_world_size() for _ in range(2))
        for rank, length in received:
            coming[rank] += length
        for rank, tensor in sent:
            going[rank] += len(tensor)
        dist.all_to_all_single(incoming, outgoing, coming, going)
        return list(incoming.split([length for _, length in received]))


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
