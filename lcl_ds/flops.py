"""How much arithmetic one optimizer step needs, by part: from the weights of a network and what the step reads.

Counted as ``torch.utils.flop_counter`` counts: two operations for each product of a matrix multiplication, and in
attention every pair of tokens of a document, also those that a causal mask or a window hides.
Elementwise work counts nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Self

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lcl_ds.grids import Grid
from lcl_ds.models.blocks import blocks_of
from lcl_ds.models.encoders import family_of
from lcl_ds.models.heads import LMHead
from lcl_ds.objectives.base import Objective

AFTER_THE_LAST_MATRIX = ("post_feedforward_layernorm", "post_mlp_layernorm", "layer_scale2")
"""Modules of a block that need the result of its last matrix for their gradients. Where a block has none of them,
recomputation stops before that matrix."""


@dataclass(frozen=True)
class Amounts:
    """Numbers that are added up, and multiplied by a factor, each for itself."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, factor: float) -> Self:
        return type(self)(*(getattr(self, field.name) * factor for field in fields(self)))


@dataclass(frozen=True)
class StepWork:
    """What all ranks together read in one step, padding included."""

    images: float
    tokens: float
    """Of the rows."""
    squares: float
    """Sum over documents and paddings of the square of their length in tokens."""
    labels: float
    """Tokens that carry generation loss."""
    pairs: float = 0.0
    """Contrastive pairs."""
    pair_products: float = 0.0
    """Sum over micro-steps of the square of the pairs that are negatives of each other."""
    grids: "GridWork | None" = None
    """Of the images, where they keep their aspect ratio; None: all are squares."""

    def __add__(self, other: "StepWork") -> "StepWork":
        grids = self.grids + other.grids if self.grids and other.grids else None
        amounts: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in AMOUNTS}
        return StepWork(**amounts, grids=grids)

    def __mul__(self, factor: float) -> "StepWork":
        amounts: dict[str, Any] = {name: getattr(self, name) * factor for name in AMOUNTS}
        return StepWork(**amounts, grids=self.grids and self.grids * factor)


AMOUNTS = tuple(field.name for field in fields(StepWork) if field.name != "grids")


@dataclass(frozen=True)
class GridWork(Amounts):
    """What images hold that keep their aspect ratio, as sums over all of them."""

    patches: float = 0.0
    tokens: float = 0.0
    """Image tokens."""
    squares: float = 0.0
    """Squares of an image's tokens."""

    @classmethod
    def of(cls, grids: Iterable[Grid]) -> "GridWork":
        """Add up images of these grids."""
        every = [(grid.patches, grid.tokens, grid.tokens**2) for grid in grids]
        return cls(*(sum(amounts) for amounts in zip(*every, strict=True))) if every else cls()


@dataclass(frozen=True)
class Flops(Amounts):
    """Operations of one part."""

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0
    """What is computed a second time: checkpointed blocks, and scores and similarities that are not kept."""

    @property
    def model(self) -> float:
        """Return what the gradient needs however it is computed: what utilisation is measured by."""
        return self.forward + self.backward

    @property
    def computed(self) -> float:
        return self.model + self.recomputed


class StepFlops:
    """The operations of one training step of all ranks, by part, as a function of what the step reads.

    Args:
        objective: also one whose weights ZeRO has partitioned or that take no memory; frozen as it is trained.
    """

    def __init__(self, objective: Objective):
        model = objective.model
        self._square = GridWork(model.vision.patch_tokens, model.kept_tokens, model.kept_tokens**2)
        nothing: dict[str, Any] = dict.fromkeys(AMOUNTS, 0.0) | {"grids": GridWork()}
        self._per_unit = {name: _count(objective, StepWork(**{**nothing, name: 1.0})) for name in AMOUNTS}
        grids = {field.name: GridWork(**{field.name: 1.0}) for field in fields(GridWork)}
        self._per_grid_unit = {
            name: _count(objective, StepWork(**{**nothing, "grids": one})) for name, one in grids.items()
        }

    def of(self, work: StepWork) -> dict[str, Flops]:
        """Count for ``vision``, ``pooling``, ``decoder``, ``head`` (own heads too) and ``contrastive``."""
        grids = work.grids or self._square * work.images
        units = [(flops, getattr(work, name)) for name, flops in self._per_unit.items()]
        units += [(flops, getattr(grids, name)) for name, flops in self._per_grid_unit.items()]
        return {
            part: sum((flops[part] * amount for flops, amount in units), Flops()) for part in self._per_unit["images"]
        }


def _count(objective: Objective, work: StepWork) -> dict[str, Flops]:
    model, grids = objective.model, work.grids
    assert grids is not None
    flops = {"vision": _vision(objective, work, grids)}
    learning = _learns(model.vision)
    flops["pooling"] = (
        Flops() if objective.one_transformer else _pooling(objective, work.images, grids.tokens, learning)
    )
    learning = learning or _learns(model.pooling)
    flops["decoder"] = _tower(model.decoder, work.tokens, work.squares, learning)
    learning = learning or _learns(model.decoder)
    own_heads = [module for name, module in objective.named_children() if name != "model"]
    states = work.tokens if objective.one_transformer else objective.count_head_states(work.images, work.pairs)
    flops["head"] = _products([model.lm_head], work.labels, learning) + _products(own_heads, states, learning)
    similarities = 2 * work.pair_products * model.context_head.proj.out_features
    flops["contrastive"] = _products([model.context_head], work.pairs, learning) + Flops(
        similarities, 2 * similarities, similarities
    )
    return flops


def total(flops: dict[str, Flops]) -> Flops:
    """Add up all parts."""
    return sum(flops.values(), Flops())


def size_of(weights: Iterable[Tensor]) -> int:
    """Count the elements of whole weights, also of those that are spread over ranks."""
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)


def _vision(objective: Objective, work: StepWork, grids: GridWork) -> Flops:
    tower: Any = objective.model.vision.model
    # Pixels need no gradient. Positions that are resized to an image's shape count nothing.
    embedded = _products([tower.embeddings], grids.patches, input_learns=False, passes_through=False)
    prefix = family_of(tower.config).has_class_token
    tokens, squares = grids.tokens + work.images * prefix, grids.squares + prefix * (2 * grids.tokens + work.images)
    if objective.one_transformer:  # images stand in the rows
        tokens, squares = work.tokens, work.squares
    learning = objective.one_transformer and _learns(objective.model.decoder.get_input_embeddings())
    return embedded + _tower(tower.encoder, tokens, squares, learning, config=tower.config)


def _tower(tower: Any, tokens: float, squares: float, learning: bool, config: Any = None) -> Flops:
    """Count the blocks of a transformers model: its matrices on every token, and attention."""
    config = config or tower.config
    flops = _products([tower], tokens, learning)
    learns = learning or _learns(tower)
    attention = 4 * squares * query_width(config)
    for block in blocks_of(tower):
        flops += Flops(attention, 2 * attention * learns, 0.5 * attention * learns)
        if block.gradient_checkpointing and learns:
            repeated = sum(2 * tokens * elements for _, elements in _recomputed_matrices(block))
            flops += Flops(recomputed=repeated + attention)
    return flops


def query_width(config: Any) -> int:
    """Return the width of all heads' queries together."""
    heads = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def _pooling(objective: Objective, images: float, tokens: float, learning: bool) -> Flops:
    pooling = objective.model.pooling
    learning = learning or _learns(pooling)
    # The projection runs on the tokens and on the pooled vector. The one query of a call counts nothing.
    shown = _products([pooling.v, pooling.proj], tokens, learning)
    pooled = _products([pooling.k], tokens, learning) + _products([pooling.proj], images, learning)
    attention = 4 * tokens * pooling.proj.out_features
    pooled += Flops(attention, 2 * attention * learning, 0.5 * attention * learning)
    is_read = not any(unused is pooling.query for unused in objective.unused)
    return shown + (pooled if is_read else Flops(pooled.forward))


def _products(modules: Iterable[nn.Module], rows: float, input_learns: bool, passes_through: bool = True) -> Flops:
    """Count the products of so many rows with every matrix of the modules.

    Args:
        input_learns: whether gradients are wanted of what comes in.
        passes_through: whether, where a matrix is trained, gradients go through it to weights before it.
    """
    matrices = [matrix for module in modules for matrix in _matrices(module)]
    trained = sum(elements for weight, elements in matrices if weight.requires_grad)
    every = sum(elements for _, elements in matrices)
    through = every if input_learns or (trained and passes_through) else 0
    return Flops(2 * rows * every, 2 * rows * (trained + through))


def _matrices(module: nn.Module) -> list[tuple[Tensor, float]]:
    """List the weights that rows are multiplied with, in the order of the modules, and the elements that a row meets.

    Of a mixture of experts a row meets those that it is sent to.
    """
    matrices: list[tuple[Tensor, float]] = []
    for part in module.modules():
        config = getattr(part, "config", None)
        for weight in part.parameters(recurse=False):
            size = size_of([weight])
            if isinstance(part, (nn.Linear, Conv1D, nn.Conv2d, LMHead)) and weight is part.weight:
                matrices.append((weight, size))
            elif type(part).__name__.endswith("Experts") and config is not None:
                matrices.append((weight, size * config.num_experts_per_tok / _experts(weight)))
    return matrices


def _experts(weight: Tensor) -> int:
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def _recomputed_matrices(block: nn.Module) -> list[tuple[Tensor, float]]:
    matrices = _matrices(block)
    needs_all = any(name in AFTER_THE_LAST_MATRIX for name, _ in block.named_children())
    return matrices if needs_all else matrices[:-1]


def _learns(module: nn.Module) -> bool:
    return any(weight.requires_grad for weight in module.parameters())
