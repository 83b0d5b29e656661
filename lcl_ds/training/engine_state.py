"""What a run has learned, as this rank holds it under DeepSpeed: fp32 weights and their moments, at every ZeRO stage.

DeepSpeed keeps them in tensors of its own making, cut up in another way at each stage. Here they are seen as slices of
the model's flattened weights, as views: writing to one changes what is trained. ``tests/distributed/test_elastic.py``
fails when a release of DeepSpeed keeps them elsewhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lcl_ds.training.checkpoint import WEIGHT

MOMENT_KINDS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each weight, by its own names."""
MOMENTUM = "momentum"
"""What Muon keeps of each matrix."""


@dataclass(frozen=True)
class HeldPart:
    """The part of one weight that this rank holds: elements from ``start`` on of the flattened weight."""

    name: str
    shape: tuple[int, ...]
    """Of the whole weight."""
    start: int
    weight: nn.Parameter
    """The model's own."""
    values: dict[str, Tensor]
    """Views [elements]: ``weight`` (fp32; of a frozen weight, in the model's precision) and, unless it is frozen,
    ``exp_avg`` and ``exp_avg_sq`` or, of a matrix under Muon, ``momentum``."""
    is_split: bool
    """Whether each rank holds another part of the weight; else all ranks hold the whole of it."""
    stepped: Tensor | None = None
    """The optimizer's tensor that the values are views of or lie beside, from element ``first`` on; None of a frozen
    weight."""
    first: int = 0


def held_parts(engine: Any) -> list[HeldPart]:
    """List what this rank holds of every weight; a weight of which it holds nothing is left out."""
    make_moments(engine)
    stage = engine.zero_optimization_stage()
    parts = []
    for name, weight in engine.module.named_parameters():
        if stage == 3:
            part = _part_at_stage_3(engine.optimizer, name, weight)
        elif stage > 0 and weight.requires_grad:
            part = _part_at_stage_1_or_2(engine.optimizer, name, weight)
        else:
            part = _whole(engine, name, weight)
        if part is not None:
            parts.append(part)
    return parts


def own_share(part: HeldPart) -> tuple[int, dict[str, Tensor]]:
    """Return start and values of what this rank writes: all it holds where others lack it, else an equal share."""
    if part.is_split:
        return part.start, part.values
    size = part.values[WEIGHT].numel()
    share = -(-size // dist.get_world_size())
    first = min(size, dist.get_rank() * share)
    last = min(size, first + share)
    return first, {kind: values[first:last] for kind, values in part.values.items()}


def share_memory_of_masters(engine: Any) -> None:
    """Keep fp32 weights and the optimizer's copy of them once at stage 3, where both lie on one device.

    DeepSpeed means to, but compares a device with the name of one. Its own step then copies a tensor onto itself.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() < 3 or optimizer.offload_optimizer or optimizer.offload_param:
        return
    pairs = zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
    for weights, masters in pairs:
        if (weights.dtype, weights.device) == (masters.dtype, masters.device):
            masters.data = weights.data


def make_moments(engine: Any) -> None:
    """Make the optimizer's state where there is none yet: AdamW makes its own in its first step."""
    optimizer = _adamw(engine)
    for group, weight in _stepped(engine):
        state = optimizer.state[weight]
        if state:
            continue
        if group["is_matrices"]:
            state[MOMENTUM] = torch.zeros_like(weight)
        else:
            state["step"] = torch.zeros((), device=weight.device)
            for kind in MOMENT_KINDS:
                state[kind] = torch.zeros_like(weight)


def optimizer_steps(engine: Any) -> int:
    """Return how often AdamW has stepped, which its correction of young moments depends on."""
    optimizer = _adamw(engine)
    return max((int(optimizer.state[weight].get("step", 0)) for _, weight in _stepped(engine)), default=0)


def set_optimizer_steps(engine: Any, steps: int) -> None:
    """Let AdamW continue after so many steps."""
    optimizer = _adamw(engine)
    for group, weight in _stepped(engine):
        if not group["is_matrices"]:
            optimizer.state[weight]["step"].fill_(steps)


@torch.no_grad()
def spread_weights(engine: Any, parts: list[HeldPart]) -> None:
    """Let the model compute with the optimizer's weights after they were changed; collective."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # no weight is gathered
        for part in parts:
            weight: Any = part.weight
            if weight.requires_grad:
                weight.ds_tensor.view(-1)[: part.values[WEIGHT].numel()].copy_(part.values[WEIGHT])
        for weight in engine.module.parameters():
            if getattr(weight, "ds_secondary_tensor", None) is not None:
                weight.ds_secondary_tensor = None  # hpZ's second copy, which of frozen weights is never made anew
        optimizer.checkpoint_event_epilogue()  # small ones are gathered again
    elif stage > 0:
        optimizer.update_lp_params()
    else:
        for part in parts:
            if part.values[WEIGHT].data_ptr() != part.weight.data_ptr():
                part.weight.copy_(part.values[WEIGHT].view_as(part.weight))


def _adamw(engine: Any) -> torch.optim.Optimizer:
    """Find the optimizer that DeepSpeed wraps."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _stepped(engine: Any) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """List the tensors that the optimizer changes, each with its group: whole weights at stage 0, else long ones that
    hold parts of many weights."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    groups = optimizer.param_groups
    if stage == 3:
        for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            yield groups[optimizer.sub_group_to_group_id[number]], flat
    elif stage > 0:
        yield from zip(groups, _flat_groups(optimizer), strict=True)
    else:
        for group in groups:
            yield from ((group, weight) for weight in group["params"])


def stepped_together(engine: Any) -> list[list[Tensor]]:
    """List the tensors that the optimizer is given in one of its calls or groups, in the order of the calls; the same
    number of lists on every rank."""
    if engine.zero_optimization_stage() > 0:
        return [[flat] for _, flat in _stepped(engine)]
    return [list(group["params"]) for group in engine.optimizer.param_groups if group["params"]]


def _flat_groups(optimizer: Any) -> list[Tensor]:
    """Return this rank's part of each group at stages 1 and 2, for which DeepSpeed's two classes have two names."""
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return optimizer.single_partition_of_fp32_groups
    return optimizer.fp32_groups_flat_partition


def _values(adamw: torch.optim.Optimizer, stepped: Tensor, first: int, size: int) -> dict[str, Tensor]:
    state = adamw.state[stepped]
    tensors = {WEIGHT: stepped.detach()} | {kind: state[kind] for kind in (*MOMENT_KINDS, MOMENTUM) if kind in state}
    return {kind: tensor.view(-1)[first : first + size] for kind, tensor in tensors.items()}


def _part_at_stage_3(optimizer: Any, name: str, weight: Any) -> HeldPart | None:
    """Every weight is cut into equal parts, of which the last ones may be padding."""
    size = weight.ds_tensor.numel()
    start = dist.get_rank() * size
    size = min(size, weight.ds_numel - start)
    if size <= 0:
        return None
    shape = tuple(weight.ds_shape)
    if not weight.requires_grad:
        values = {WEIGHT: weight.ds_tensor.detach().view(-1)[:size]}
        return HeldPart(name, shape, start, weight, values, is_split=True)
    group, first, _ = optimizer.grad_position[optimizer.get_param_id(weight)]
    stepped = optimizer.fp32_partitioned_groups_flat[group]
    values = _values(optimizer.optimizer, stepped, first, size)
    return HeldPart(name, shape, start, weight, values, True, stepped, first)


def _part_at_stage_1_or_2(optimizer: Any, name: str, weight: Any) -> HeldPart | None:
    """All weights of a group, one after the other, are cut into one part for each rank."""
    mapping = weight._hp_mapping
    if mapping is None:
        return None
    stepped = _flat_groups(optimizer)[mapping.param_group_index]
    there = mapping.hp_fragment_address
    values = _values(optimizer.optimizer, stepped, there.start, there.numel)
    start = mapping.lp_fragment_address.start
    return HeldPart(name, tuple(weight.shape), start, weight, values, True, stepped, there.start)


def _whole(engine: Any, name: str, weight: nn.Parameter) -> HeldPart:
    """Every rank holds all of a weight that is frozen or not partitioned."""
    shape = tuple(weight.shape)
    if not weight.requires_grad:
        return HeldPart(name, shape, 0, weight, {WEIGHT: weight.detach().view(-1)}, is_split=False)
    stepped = stage_0_master(engine.optimizer, weight)
    values = _values(_adamw(engine), stepped, 0, stepped.numel())
    return HeldPart(name, shape, 0, weight, values, False, stepped)


def stage_0_master(optimizer: Any, weight: nn.Parameter) -> Tensor:
    """Find the fp32 weight at stage 0: DeepSpeed's copy in bf16, the weight itself in fp32."""
    if not hasattr(optimizer, "fp32_groups"):
        return weight
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return next(master for low, high in groups for w, master in zip(low, high, strict=True) if w is weight)
