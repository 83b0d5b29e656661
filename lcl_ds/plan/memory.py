"""How much memory a rank needs, by what it is for and by moment of a step.

What the engine holds is read from DeepSpeed 0.19.8: which flat copies of weights, gradients and optimizer state exist
at each ZeRO stage, and for how long. ``tests/chaos/plan_memory.py`` compares it with what torch's allocator counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from lcl_kernels._common import WORKSPACE_MB, largest_chunk
from torch import Tensor, nn

from lcl_ds.flops import size_of
from lcl_ds.models.settings import part_of
from lcl_ds.plan.contents import RowContents
from lcl_ds.plan.trace import Activations

Device = Literal["cpu", "cuda"]
Bytes = dict[str, float]
"""By what they are for."""
CONTEXT_GIB = 1.5
"""What a GPU holds beside tensors: the context, workspaces of cuBLAS, buffers of NCCL. An assumption."""
FRAGMENTED = 0.05
"""Fraction of the tensors' bytes that the allocator loses between them. An assumption."""
ORTHOGONAL_COPIES = 5
"""Matrices of the size of the largest one that Muon works with at a time: what it gathers, and what it computes."""
TILE_COLUMNS = 128
"""Columns of a tile of the loss kernels; each tile keeps two numbers a row."""
MEANINGS = {
    "weights": "as the model computes with them",
    "gathered weights": "of other ranks, while modules use them (stage 3)",
    "gradients": "as they are added up",
    "masters and moments": "fp32 weights, and the optimizer's two moments of them, of a matrix under Muon one",
    "average": "fp32 weights of the vision tower (train.ema_decay)",
    "communication buffers": "in which gradients are collected",
    "activations": "kept for the backward pass",
    "backward": "one block that is recomputed, gradients on their way",
    "loss workspace": "chunks of logits, tiles of similarities",
    "contrastive features": "those of all ranks",
    "update": "fp32 copy of the gradients of one group",
    "allowance": "context, workspaces of libraries, fragmentation (assumed)",
}


@dataclass(frozen=True)
class Sizes:
    """Elements of a model's weights, and of those that decide how large a buffer is."""

    trained: int
    frozen: int
    largest_group: int
    """Of the groups that the optimizer treats alike."""
    largest_weight: int
    vocabulary: int
    width: int
    """Of the decoder."""
    small: tuple[int, ...] = ()
    """Sizes of all weights, the smallest first: stage 3 keeps the small ones gathered."""
    matrices: tuple[tuple[int, int], ...] = ()
    """Shapes of those that Muon updates, which have one moment, not two."""
    averaged: int = 0
    """Of which an average is kept, see ``train.ema_decay``."""

    @property
    def all(self) -> int:
        return self.trained + self.frozen

    @property
    def moments(self) -> int:
        """Of the optimizer."""
        return 2 * self.trained - sum(a * b for a, b in self.matrices)


@dataclass(frozen=True)
class Layout:
    """How a run is spread: the engine settings that decide about memory and communication."""

    stage: int
    ranks: int
    weight_bytes: int
    """2 in bf16, 4 in fp32."""
    gradient_bytes: int
    """Of the type in which gradients are added up."""
    reduce_bucket: int
    overlap: bool
    sub_group: int
    prefetch: int
    """Elements that stage 3 gathers ahead."""
    live_weights: int
    """Elements that stage 3 may keep gathered."""
    keep_below: int
    """Elements of weights that stage 3 keeps gathered all the time."""
    offload_optimizer: bool = False
    offload_weights: bool = False
    secondary: int = 1
    """Ranks among which hpZ spreads a second copy of the weights; 1: there is none."""

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer's fp32 weights are others than those the model computes with."""
        is_offloaded = self.offload_optimizer or self.offload_weights
        return self.weight_bytes < 4 or self.stage in (1, 2) or (self.stage == 3 and is_offloaded)

    @classmethod
    def of(cls, zero: Any, precision: str, ranks: int, accumulated: str | None = None) -> "Layout":
        """Read DeepSpeed's settings of ZeRO, as they are with its defaults.

        Args:
            accumulated: ``data_types.grad_accum_dtype``.
        """
        stage, size = int(zero.stage), 2 if precision == "bf16" else 4
        offloads = {name: getattr(zero, name) for name in ("offload_optimizer", "offload_param")}
        on_cpu = {name: o is not None and o.device == "cpu" for name, o in offloads.items()}
        return cls(
            stage=stage,
            ranks=ranks,
            weight_bytes=size,
            gradient_bytes=4 if accumulated in ("fp32", "float32") else size,
            reduce_bucket=int(zero.reduce_bucket_size),
            overlap=bool(zero.overlap_comm if zero.overlap_comm is not None else stage == 3),
            sub_group=int(zero.sub_group_size),
            prefetch=int(zero.prefetch_bucket_size),
            live_weights=int(zero.max_live_parameters),
            keep_below=int(zero.param_persistence_threshold),
            offload_optimizer=on_cpu["offload_optimizer"] and stage > 0,
            offload_weights=on_cpu["offload_param"] and stage == 3,
            secondary=int(zero.zero_hpz_partition_size),
        )


def sizes_of(
    model: nn.Module, groups: Iterable[dict[str, Any]], vocabulary: int, width: int, is_averaged: bool = False
) -> Sizes:
    """Read the sizes of a model whose weights may take no memory.

    Args:
        groups: of the optimizer.
        is_averaged: whether an average of the vision tower is kept.
    """
    weights = list(model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    tower = [w for name, w in model.named_parameters() if part_of(name) == "vision" and w.requires_grad]
    groups = list(groups)
    matrices = [weight for group in groups if group["is_matrices"] for weight in group["params"]]
    return Sizes(
        trained=size_of(trained),
        frozen=size_of(weights) - size_of(trained),
        largest_group=max((size_of(group["params"]) for group in groups), default=0),
        largest_weight=max(_numbers(weights), default=0),
        vocabulary=vocabulary,
        width=width,
        small=tuple(sorted(_numbers(weights))),
        matrices=tuple((matrix.shape[0], matrix.shape[1]) for matrix in matrices),
        averaged=size_of(tower) if is_averaged else 0,
    )


def _numbers(weights: Iterable[Tensor]) -> list[int]:
    return [size_of([weight]) for weight in weights]


@dataclass(frozen=True)
class Memory:
    """What one rank needs at most."""

    device: Bytes
    """At the moment of a step when it is most; without the allowance what torch calls allocated."""
    moment: str
    host: Bytes
    """Of this rank in the host's memory, where something is offloaded."""

    @property
    def allocated(self) -> float:
        return sum(size for name, size in self.device.items() if name != "allowance")

    @property
    def needed(self) -> float:
        return sum(self.device.values())


def memory_of(
    layout: Layout, sizes: Sizes, activations: Activations, losses: Bytes, micro_steps: int, device: Device
) -> Memory:
    """Plan the memory of one rank.

    Args:
        losses: from :func:`loss_memory`.
    """
    held, host = _held(layout, sizes, device)
    moments = _moments(layout, sizes, activations, losses, micro_steps, device)
    complete = {moment: _sum(held, some) for moment, some in moments.items()}
    moment = max(complete, key=lambda name: sum(complete[name].values()))
    needed = complete[moment]
    if device == "cuda":
        needed["allowance"] = CONTEXT_GIB * 2**30 + FRAGMENTED * sum(needed.values())
    return Memory({name: size for name, size in needed.items() if size}, moment, host)


def _held(layout: Layout, sizes: Sizes, device: Device) -> tuple[Bytes, Bytes]:
    """Say what a rank holds all the time, on its device and, of what is offloaded, on its host."""
    share = 1 if layout.stage == 0 else layout.ranks
    masters = 4 if layout.has_masters else 0
    optimizer = (masters * sizes.trained + 4 * sizes.moments) / share
    weights = layout.weight_bytes * sizes.all / (layout.ranks if layout.stage == 3 else 1)
    average = 4 * sizes.averaged / layout.ranks  # at stage 0 as well, since each rank keeps what it would save
    held: Bytes = {"weights": weights, "masters and moments": optimizer, "average": average}
    host: Bytes = {}
    if layout.stage == 3:
        held["gradients"] = layout.gradient_bytes * sizes.trained / layout.ranks
        held["communication buffers"] = layout.weight_bytes * layout.reduce_bucket
        held["gathered weights"] = layout.weight_bytes * _always_gathered(layout, sizes)
        if layout.secondary > 1:
            held["gathered weights"] += layout.weight_bytes * sizes.all / layout.secondary
    if device == "cpu":
        return held, host
    if layout.offload_optimizer:
        host |= {name: held.pop(name) for name in ("masters and moments", "average")}
        host["gradients"] = (4 + layout.gradient_bytes) * sizes.trained / layout.ranks
        held.pop("gradients", None)
        if layout.stage < 3:
            held["communication buffers"] = layout.weight_bytes * sizes.largest_weight
    if layout.offload_weights:
        host["weights"] = held.pop("weights")
    return held, host


def _moments(
    layout: Layout, sizes: Sizes, activations: Activations, losses: Bytes, micro_steps: int, device: Device
) -> dict[str, Bytes]:
    """Say what comes on top of that at each moment of a step."""
    b, g, stage = layout.weight_bytes, layout.gradient_bytes, layout.stage
    is_offloaded = layout.offload_optimizer and device == "cuda"
    own_gradients = 0.0 if is_offloaded or stage == 3 else g * sizes.trained / (layout.ranks if stage else 1)
    # Below stage 2 every rank adds up whole gradients, unless they are sent while the backward pass goes on.
    whole = b * sizes.trained if stage == 1 and not layout.overlap else 0
    before = {"gradients": own_gradients + (b * sizes.trained if stage == 1 else 0)} if micro_steps > 1 else {}
    gathered: Bytes = {}
    if stage == 3:  # what is on its way is laid out a second time, weight by weight
        others = sizes.all - _always_gathered(layout, sizes)
        on_the_way = min(others, max(layout.prefetch, sizes.largest_weight)) * (layout.ranks > 1)
        gathered = {"gathered weights": b * (min(others, layout.live_weights) + on_the_way)}
    buffers: Bytes = {}
    if stage in (1, 2):
        buffers = {"communication buffers": b * layout.reduce_bucket * (2 if layout.overlap else 1)}
    elif stage == 0 and layout.ranks > 1:
        buffers = {"communication buffers": b * min(layout.reduce_bucket, sizes.trained)}
    elif stage == 3:  # the pieces of a bucket are laid out anew for each rank
        buffers = {"communication buffers": b * min(layout.reduce_bucket, sizes.trained) * (layout.ranks > 1)}
    kept: Bytes = {"activations": activations.kept}
    flat = {"gradients": own_gradients if stage == 2 or layout.overlap else 0.0}  # made whole for the first gradient
    updated = min(sizes.largest_group, layout.sub_group) if stage == 3 else sizes.largest_group
    if stage == 0:
        update = 4.0 * sizes.trained if b < 4 else 0.0
    else:
        update = (4.0 + (b if b < 4 else 0)) * updated / layout.ranks
    if is_offloaded:
        update = 0.0
    if sizes.matrices:  # a whole matrix is gathered and made orthogonal
        update = max(update, b * ORTHOGONAL_COPIES * max(rows * columns for rows, columns in sizes.matrices))
    return {
        "losses": _sum(gathered, kept, before, losses),
        "backward pass": _sum(gathered, kept, before or flat, buffers, {"backward": activations.beyond}),
        "end of the backward pass": _sum(gathered, buffers, {"gradients": own_gradients + whole}),
        "update": {"gradients": own_gradients, "update": update},
    }


def _always_gathered(layout: Layout, sizes: Sizes) -> int:
    return sum(size for size in sizes.small if size <= layout.keep_below) if layout.ranks > 1 else 0


def _sum(*tables: Bytes) -> Bytes:
    total: Bytes = {}
    for table in tables:
        for name, size in table.items():
            total[name] = total.get(name, 0.0) + size
    return total


def loss_memory(
    row: RowContents, rows: int, sizes: Sizes, layout: Layout, device: Device, ranks_per_host: int
) -> Bytes:
    """Say what the losses work in, in one micro-step of so many rows on this rank.

    Args:
        ranks_per_host: the features of all ranks are gathered within one host, and passed on block by block beyond.
    """
    labels, own = int(row.labels * rows), row.pairs * rows
    everyone = own * layout.ranks
    vocabulary, width = sizes.vocabulary, sizes.width
    limit = WORKSPACE_MB[device]
    if device == "cpu":
        chunk = largest_chunk(labels, 4 * vocabulary, limit)
        generation = chunk * (4.0 * vocabulary + 4 * width)
        if layout.weight_bytes < 4 and labels:
            generation += 4.0 * vocabulary * width
        similarities = min(12 * own * everyone, limit * 2**20)
    else:
        per_row = layout.weight_bytes * vocabulary + 8 * (vocabulary // TILE_COLUMNS)
        chunk = largest_chunk(labels, per_row, limit, TILE_COLUMNS)
        generation = chunk * (per_row + 8.0 * width)
        similarities = min(2 * own * everyone, limit * 2**20)
    blocks = layout.ranks if layout.ranks <= ranks_per_host else 3
    features = own * blocks * width * layout.weight_bytes + 16 * everyone + 8 * own * width
    return {"loss workspace": max(generation, similarities), "contrastive features": features if own else 0.0}
