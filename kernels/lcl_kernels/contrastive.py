"""Symmetric InfoNCE over the pairs of all ranks, without the [M, M] similarities.

With S_ij = scale * x_i . y_j and positives on the diagonal, row i of S gives the loss of x_i and column i that of y_i.
A rank walks through its own rows of S, block by block: its own x against the y of every rank. One pass gives the sums
of its rows and its part in the sums of all columns; these parts go to the owners of the columns, whose log-sum-exps
come back to everyone; a second pass makes the gradient of its own x and its part in the gradient of every y, which
goes home to the owner. All of that happens in forward: backward only multiplies by the upstream gradient.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor

from lcl_kernels import torch_contrastive
from lcl_kernels._common import (
    DTYPES,
    Backend,
    check_same,
    compute_dtype,
    operand_dtype,
    refuse_dtensor,
    resolve_workspace,
    separate_rows,
    use_triton,
    wants_gradients,
)
from lcl_kernels.exchange import (
    Exchange,
    FeatureBlocks,
    GradientReturn,
    Ranks,
    gather_rows,
    group_name,
    meet,
    send_rows_home,
)
from lcl_kernels.pairs import check_pairs, define_operators, kept, operator_of
from lcl_kernels.similarity import Block, BlockFunctions, Kind, OwnPairs, PairLosses, PairStatistics

Normalize = Literal["global", "per_rank"]
SameGroup = Literal["ignore", "positive"]
GROUP_DTYPES = [torch.int64, torch.int32]
LEAST_WEIGHT = torch.finfo(torch.float64).tiny
"""Divisor where all weights are 0."""


@overload
def contrastive_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    *,
    group: dist.ProcessGroup | None = ...,
    normalize: Normalize = ...,
    detach_remote: bool = ...,
    detach_keys: bool = ...,
    group_ids: Tensor | None = ...,
    same_group: SameGroup = ...,
    pair_weight: Tensor | None = ...,
    counts: Sequence[int] | None = ...,
    exchange: Exchange = ...,
    return_statistics: Literal[False] = ...,
    backend: Backend = ...,
    workspace_mb: float | None = ...,
) -> Tensor: ...


@overload
def contrastive_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    *,
    group: dist.ProcessGroup | None = ...,
    normalize: Normalize = ...,
    detach_remote: bool = ...,
    detach_keys: bool = ...,
    group_ids: Tensor | None = ...,
    same_group: SameGroup = ...,
    pair_weight: Tensor | None = ...,
    counts: Sequence[int] | None = ...,
    exchange: Exchange = ...,
    return_statistics: Literal[True],
    backend: Backend = ...,
    workspace_mb: float | None = ...,
) -> tuple[Tensor, PairStatistics]: ...


def contrastive_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    normalize: Normalize = "global",
    detach_remote: bool = False,
    detach_keys: bool = False,
    group_ids: Tensor | None = None,
    same_group: SameGroup = "ignore",
    pair_weight: Tensor | None = None,
    counts: Sequence[int] | None = None,
    exchange: Exchange = "auto",
    return_statistics: bool = False,
    backend: Backend = "auto",
    workspace_mb: float | None = None,
) -> Tensor | tuple[Tensor, PairStatistics]:
    """This rank's share of the symmetric InfoNCE loss over the pairs of all ranks (LCL, arXiv 2406.07543; CLIP).

    Pair i is x_i, y_i; every other feature of the opposite side, on any rank, is a negative. Let
    l_i = (-log softmax_j(S_ij)[i] - log softmax_j(S_ji)[i]) / 2, with S_ij = logit_scale * x_i . y_j over all M pairs.

    - normalize="global": the share is sum(l_i over own pairs) / M, so the SUM of the shares is the mean over all pairs.
    - normalize="per_rank": the share is the mean of l_i over the own pairs, as in the published code; what is minimised
      is again the sum of the shares over ranks.
    - The gradients of x and y are those of the sum of the shares over ranks, with the role of the local features as
      negatives on other ranks included. No reduction of feature gradients between ranks is needed or wanted.
    - The gradient of logit_scale is a part of that of the sum: the sum over ranks is the whole.
    - detach_remote=True: features of other ranks are constants, so feature gradients are those of this rank's share.
    - detach_keys=True: every feature is a constant where it stands in the softmax of others, on its own rank too, as in
      OpenCLIP's loss without --gather-with-grad; x_i then learns from the loss of its row only, y_i from its column.
      Features of other ranks are constants then too, so detach_remote changes nothing beside it.

    Pairs of one group, those with the same of `group_ids` on whatever rank, are no negatives of each other:

    - same_group="ignore": they are left out of each other's softmax, in rows and columns;
    - same_group="positive": they are positives of each other (UniCL, arXiv 2204.03610; SupCon, arXiv 2004.11362).
      l_i then has the mean of -log softmax_j(S_ij)[p] over all p of the group of i, i among them; likewise in columns.

    With `pair_weight` w the means become sum(w_i l_i) / sum(w_i), 0 where the weights sum to 0. The weight of a pair is
    that of its own loss; as a negative of others it counts as ever.

    OpenCLIP's logit_bias has no counterpart here: a number added to all S cancels in the softmax. Leave it out.

    The upstream gradient has to be the same number on all ranks. Data parallel wrappers that average parameter
    gradients over W ranks give 1/W of the gradient of the sum: scale the loss by W to undo it.

    Args:
        x, y: [m, D], same dtype (float32, bfloat16, float16 or float64), taken as they are: L2-normalise before.
            m may differ between ranks and be 0.
        logit_scale: the multiplier itself (not its logarithm), a tensor of one element of any float dtype.
        group: process group; None is the default group, or this process alone when torch.distributed is not set up.
        normalize, detach_remote, detach_keys: see above.
        group_ids: [m], int64 or int32, any values; on every rank or on none.
        same_group: see above.
        pair_weight: [m], any float dtype, at least 0 and finite, constants; on every rank or on none.
        counts: pairs of every rank of the group, when the caller knows them: then they are not exchanged and nothing
            waits for the device, but for the first call on a group, in which all ranks meet. All ranks then have to
            want gradients, or none. After the first call nobody notices when ranks differ in their options.
        exchange: "gather" collects y of all ranks at once, "ring" passes it on block by block in less memory, "auto"
            gathers inside one machine and takes the ring across machines.
        return_statistics: also return `PairStatistics` of the own pairs; on every rank or on none. This takes a maximum
            per row and column of a tile of S, and no pass of its own.
        backend: "auto" (Triton on a GPU for bfloat16 and float16, else torch), "triton" or "torch".
        workspace_mb: bound of the similarities kept at a time (one row at least); None: 2048 on a GPU, 128 on a CPU.

    Returns:
        A scalar in float32 (float64 for float64 features); 0, attached to the graph, on a rank without pairs. With
        `return_statistics` (loss, PairStatistics). Gradients have the dtype of their inputs. The same inputs on the
        same ranks give the same bits.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, here or between ranks; a DTensor; an unusable option or
            weight (a negative one on a GPU is an asynchronous device assertion instead, so that nothing waits).
        RuntimeError: backend "triton" where it cannot run; differentiating twice, forward or by torch.func.

    Every rank of the group has to call it, with the same options.
    """
    check_pairs(x, y, exchange, logit_scale=logit_scale)
    if normalize not in ("global", "per_rank"):
        raise ValueError(f"normalize must be 'global' or 'per_rank', not {normalize!r}")
    _check_groups_and_weights(x, group_ids, same_group, pair_weight)
    wanted = wants_gradients(x, y, logit_scale)
    results = operator_of("contrastive", group, counts)(
        x,
        y,
        logit_scale,
        group_ids,
        pair_weight,
        group_name(group),
        normalize,
        "keys" if detach_keys else "remote" if detach_remote else "none",
        same_group,
        counts,
        exchange,
        return_statistics,
        use_triton(backend, x),
        resolve_workspace(workspace_mb, x),
        *wanted,
    )
    return (results[0], PairStatistics(*results[4:])) if return_statistics else results[0]


def _contrastive(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    group_ids: Tensor | None,
    pair_weight: Tensor | None,
    group_name: str,
    normalize: str,
    detach: str,
    same_group: str,
    counts: Sequence[int] | None,
    exchange: str,
    statistics: bool,
    triton: bool,
    workspace_mb: float,
    want_x: bool,
    want_y: bool,
    want_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, d_x, d_y, d_scale, *PairStatistics): the gradients in the compute dtype, empty where not wanted like the
    statistics."""
    module = importlib.import_module("lcl_kernels.triton_contrastive") if triton else torch_contrastive
    backend = cast(BlockFunctions, module)
    wanted = _Wanted(want_x, want_y, want_scale)
    options = {
        "normalize": normalize,
        "detach": detach,
        "group_ids": "none" if group_ids is None else same_group,
        "pair_weight": pair_weight is not None,
        "statistics": statistics,
    }
    common: dict[str, Any] = {"exchange": exchange, "counts": counts, "wants_gradients": any(wanted)}
    ranks = meet(x, group_name, "contrastive_loss", options, **common)
    kind = Kind.of(None if group_ids is None else same_group, statistics)
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        scale = logit_scale.to(compute_dtype(x.dtype)).reshape(())
        left, right = (separate_rows(t.to(operand_dtype(t)).contiguous()) for t in (x, y))
        groups, group_sizes = _groups(group_ids, ranks)
        group_sizes = group_sizes.to(scale.dtype) if group_sizes is not None and kind.positives else None
        weight, unit = _weights(pair_weight, normalize, ranks, scale)
        products = backend.pair_products(left, right, scale.dtype)
        pairs = OwnPairs(left, right, scale, *products, weight, group_sizes, kind)
        walk = _Walk(pairs, groups, ranks, FeatureBlocks(right, ranks), backend, workspace_mb)
        losses = _losses(walk)
        loss = unit * losses.weighted.sum()
        gradients: list[Tensor | None] = [None, None, None]
        if ranks.wants_gradients:
            d_x, d_y, d_scale = _gradients(walk, losses, detach, wanted)
            of_features = unit * scale
            gradients = [d_x.mul_(of_features), d_y.mul_(of_features), d_scale.mul_(unit)]
    known = [losses.pair_loss, pairs.similarity, losses.x_first, losses.y_first] if statistics else []
    known = known or [scale.new_empty(0, dtype=dtype) for dtype in _statistics_dtypes(scale.dtype)]
    return (loss, *kept(gradients, wanted, [x, y, logit_scale]), *known)  # type: ignore[return-value]


def _statistics_dtypes(dtype: torch.dtype) -> list[torch.dtype]:
    return [dtype, dtype, torch.bool, torch.bool]


def _fake_statistics(x: Tensor, *arguments: Any) -> list[Tensor]:
    rows = len(x) if arguments[-6] else 0
    return [x.new_empty(rows, dtype=dtype) for dtype in _statistics_dtypes(compute_dtype(x.dtype))]


define_operators("contrastive", _contrastive, 3, _fake_statistics)


class _Wanted(NamedTuple):
    x: bool
    y: bool
    scale: bool


class _Walk(NamedTuple):
    pairs: OwnPairs
    groups: Tensor | None  # [M] int32, of the pairs of all ranks
    ranks: Ranks
    blocks: FeatureBlocks
    backend: BlockFunctions
    workspace_mb: float

    def block(self, owner: int, y: Tensor) -> Block:
        """The similarities of the own x and the features `y` of a rank."""
        pairs, ranks = self.pairs, self.ranks
        x_groups, y_groups = (
            (None, None) if self.groups is None else (self.groups[ranks.slice_of(rank)] for rank in (ranks.rank, owner))
        )
        return Block(pairs.x, y, pairs.scale, pairs.x_norm, x_groups, y_groups, owner == ranks.rank, pairs.kind)


def _groups(group_ids: Tensor | None, ranks: Ranks) -> tuple[Tensor | None, Tensor | None]:
    """The groups of the pairs of all ranks, [M] int32 numbers from 0 to M, and how many pairs are in those of the own
    pairs [m]."""
    if group_ids is None:
        return None, None
    ids = gather_rows(group_ids.to(torch.int64), ranks)
    ordered = ids.sort().values
    groups = torch.searchsorted(ordered, ids, out_int32=True)
    own = ranks.slice_of(ranks.rank)
    return groups, torch.searchsorted(ordered, ids[own], out_int32=True, right=True) - groups[own]


def _weights(
    pair_weight: Tensor | None, normalize: str, ranks: Ranks, scale: Tensor
) -> tuple[Tensor | float, Tensor | float]:
    """The weights of the own pairs [m], or of each of them, and the unit they are in, which is the same on all ranks.

    No weight is above 1, so that no gradient of S leaves the range of float16.
    """
    if pair_weight is None:
        if normalize == "global":
            return 1.0, 0.5 / max(1, ranks.total)
        least = min((count for count in ranks.counts if count), default=1)
        return least / max(1, ranks.count), 0.5 / least
    own = pair_weight.detach().double()
    _check_weights(own)
    if normalize == "per_rank":
        own = own / own.sum().clamp(min=LEAST_WEIGHT)
    everyone = gather_rows(own, ranks)
    largest = (everyone.amax() if ranks.total else everyone.sum()).clamp(min=LEAST_WEIGHT)
    whole = everyone.sum().clamp(min=LEAST_WEIGHT) if normalize == "global" else 1.0
    return (own / largest).to(scale.dtype), (0.5 * largest / whole).to(scale.dtype)


def _losses(walk: _Walk) -> PairLosses:
    """The first pass."""
    pairs, ranks = walk.pairs, walk.ranks
    rows, columns = (pairs.similarity.new_empty(n, pairs.kind.sums) for n in (ranks.count, ranks.total))
    for owner, y in walk.blocks:
        walk.backend.statistics(
            walk.block(owner, y),
            rows,
            columns[ranks.slice_of(owner)],
            first=owner == ranks.rank,
            workspace_mb=walk.workspace_mb,
        )
    return walk.backend.pair_losses(pairs, rows, send_rows_home(columns, ranks))


def _gradients(walk: _Walk, losses: PairLosses, detach: str, wanted: _Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """The second pass: d sum of the weighted losses / d (scale * x), d (scale * y), d scale."""
    pairs, ranks, backend = walk.pairs, walk.ranks, walk.backend
    row_terms, column_terms = losses.row_terms, gather_rows(losses.column_terms, ranks)
    of_x, of_y = losses.of_row, losses.of_column
    if detach != "keys":
        of_x = of_y = of_x + of_y
    # The positives, in full precision; everything else is added to them.
    d_x, d_y = backend.pair_gradients(pairs.x, pairs.y, of_x, of_y)
    d_scale = [losses.d_scale]
    home = GradientReturn(ranks, d_y)
    for owner, y in walk.blocks.walk(home):
        block, own = walk.block(owner, y), owner == ranks.rank
        of_block = column_terms[ranks.slice_of(owner)]
        d_block = d_y if own else d_y.new_zeros(y.shape)
        targets = d_x if wanted.x else None, d_block if wanted.y or ranks.world_size > 1 else None
        if detach == "none" or (detach == "remote" and own):
            steps: list[tuple[Tensor | None, ...]] = [(row_terms, of_block, *targets)]
        else:  # own rows act on own x alone, and columns on the y of their owners
            steps = [(row_terms, None, targets[0], None), (None, of_block, None, targets[1])]
        for rows, columns, to_x, to_y in steps:
            made = backend.gradients(block, rows, columns, d_x=to_x, d_y=to_y, workspace_mb=walk.workspace_mb)
            d_scale.append(made)
        if not own:
            home.send(owner, d_block)
    return d_x, home.finish(), torch.cat(d_scale).sum()


def _check_groups_and_weights(x: Tensor, group_ids: Tensor | None, same_group: str, pair_weight: Tensor | None) -> None:
    refuse_dtensor(group_ids=group_ids, pair_weight=pair_weight)
    for name, given in (("group_ids", group_ids), ("pair_weight", pair_weight)):
        if given is not None and not isinstance(given, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(given).__name__}")
    check_same("device", x=x, group_ids=group_ids, pair_weight=pair_weight)
    if same_group not in ("ignore", "positive"):
        raise ValueError(f"same_group must be 'ignore' or 'positive', not {same_group!r}")
    if group_ids is None and same_group == "positive":
        raise ValueError("same_group='positive' needs group_ids")
    for name, tensor, dtypes in (("group_ids", group_ids, GROUP_DTYPES), ("pair_weight", pair_weight, DTYPES)):
        if tensor is not None and (tensor.shape != x.shape[:1] or tensor.dtype not in dtypes):
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(
                f"{name} must be [{x.shape[0]}], one for each pair, of {allowed}; got {list(tensor.shape)} of "
                f"{tensor.dtype}"
            )
    if pair_weight is not None and pair_weight.requires_grad:
        raise ValueError("pair_weight is a constant and gets no gradient; pass pair_weight.detach()")


def _check_weights(weights: Tensor) -> None:
    """Refuse negative and infinite weights, on a GPU without waiting for it."""
    usable = ((weights >= 0) & (weights < torch.inf)).all()
    message = "pair_weight must be at least 0 and finite"
    if weights.is_cuda:
        torch._assert_async(usable, message)
    elif not usable:
        raise ValueError(message)
