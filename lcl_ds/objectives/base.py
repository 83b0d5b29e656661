"""What all objectives share: their base settings, what their losses are divided by, the interface to the trainer."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from lcl_kernels import contrastive_loss, sigmoid_contrastive_loss
from pydantic import Field
from torch import Tensor, nn

from lcl_ds.batch import Batch
from lcl_ds.errors import UserError
from lcl_ds.metrics import Combination, check_names
from lcl_ds.models.attention.masks import Mode
from lcl_ds.models.heads import LogitBias
from lcl_ds.models.network import LCLModel
from lcl_ds.settings import Settings


class ObjectiveSettings(Settings):
    """Settings that every objective has."""

    name: str = Field(description="Objective: a module of lcl_ds/objectives.")
    normalization: Literal["global", "reference"] = Field(
        "global", description="Divide by counts over all ranks and micro-steps, or by each rank's own as published."
    )

    @property
    def normalize(self) -> Literal["global", "per_rank"]:
        """``normalization`` in the words of :func:`lcl_kernels.contrastive_loss`."""
        return "global" if self.normalization == "global" else "per_rank"

    def loss_of_guessing(self, pairs: int) -> float:
        """Return the contrastive loss of features that tell nothing apart, among so many pairs."""
        return math.log(max(1, pairs))

    def tokens_in_slot(self, encoded: int) -> int:
        """Count the tokens of an image that the decoder sees in training, of those that the encoder gives."""
        return encoded


@dataclass(frozen=True)
class LossNormalizer:
    """What a loss is divided by to become its mean; tensors are fp32 scalars on the batch's device."""

    divisor: Tensor
    """What a sum over this rank's micro-step is divided by, so that the shares of all ranks and micro-steps add up to
    the step's loss."""
    share: Tensor
    """The same for a mean over all ranks' micro-step: what it is multiplied with."""
    per_rank: list[int] | None = None
    """In this micro-step on each rank; None: the ranks ask each other when they need it."""


LossNormalizers = dict[str, LossNormalizer]
"""By the names of :meth:`Objective.count_terms`."""


class Objective(nn.Module):
    """Losses of one batch.

    Summed over ranks and micro-steps the losses are means over everything in the step, so they do not depend on how
    rows are spread. Submodule names of a saved state dict start with ``model.`` for the network; an objective's own
    heads are named beside it.

    Args:
        model: the network.
    """

    losses: ClassVar[tuple[str, ...]]
    """Losses that are recorded besides the weighted total ``loss``; their names end in ``_loss``."""
    reports: Mapping[str, Combination] = {}
    """Other outputs that are recorded, and how the ranks' values become one: ``sum`` adds up those of all ranks and
    micro-steps, ``same`` takes that of the last micro-step, which is the same on all ranks. Settings may add some."""
    takes_native: ClassVar[bool] = False
    """Whether it can train on images that keep their aspect ratio (``model.vision.resolution: native``), which have
    different numbers of tokens: it reads them through :class:`LCLModel`'s own forward alone."""
    decoder_passes: ClassVar[int] = 1
    """How often the decoder reads one sample."""
    attention_mode: ClassVar[Mode | None] = None
    """What tokens of the decoder see, where that is not for the settings to say; see :func:`prepare_network`."""
    one_transformer: ClassVar[bool] = False
    """Whether the blocks of the vision tower read whole rows, text and images, as the decoder does after them."""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        check_names(getattr(cls, "losses", ()), cls.reports)

    def __init__(self, model: LCLModel):
        super().__init__()
        if model.vision.is_native and not self.takes_native:
            name = type(self).__module__.rpartition(".")[2]
            raise UserError(
                f"model.vision.resolution: native: the objective {name} needs as many tokens of every image; use square"
            )
        self.model = model
        self.progress = 0.0
        """Fraction of the run's steps that are done; the trainer keeps it."""

    @property
    def unused(self) -> tuple[nn.Module | nn.Parameter, ...]:
        """List modules and weights of the network that no loss of this objective reaches."""
        return ()

    def count_head_states(self, images: float, pairs: float) -> float:
        """Count the states that the objective's own heads read in a step of so many images and contrastive pairs."""
        return 0.0

    def generation(self, hidden_states: Tensor, batch: Batch, normalizers: LossNormalizers) -> Tensor:
        """Compute the share of the generation loss; it needs the normalizer of ``labels``."""
        states = hidden_states.index_select(0, batch.label_positions)
        return self.model.lm_head(states, batch.labels, normalizers["labels"].divisor)

    def contrastive(
        self,
        hidden_states: Tensor,
        pooled: Tensor,
        batch: Batch,
        normalizers: LossNormalizers,
        normalize: Literal["global", "per_rank"],
    ) -> tuple[Tensor, Tensor]:
        """Compute the share of the contrastive loss; it needs the normalizer of ``pairs``.

        Returns:
            The share, and the multiplier [1] that was used.
        """
        image, context = self.model.pair_features(hidden_states, pooled, batch)
        scale, pairs = self.model.logit_scale(), normalizers["pairs"]
        loss = contrastive_loss(image, context, scale, normalize=normalize, counts=pairs.per_rank)
        return pairs.share * loss, scale.detach()

    def sigmoid_contrastive(
        self, hidden_states: Tensor, pooled: Tensor, batch: Batch, normalizers: LossNormalizers, bias: LogitBias
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the share of the sigmoid contrastive loss (SigLIP, arXiv 2303.15343, section 3.1).

        Returns:
            The share, and the multiplier [1] and the bias [1] that were used.
        """
        image, context = self.model.pair_features(hidden_states, pooled, batch)
        scale, added, pairs = self.model.logit_scale(), bias(), normalizers["pairs"]
        loss = sigmoid_contrastive_loss(image, context, scale, added, counts=pairs.per_rank)
        return pairs.share * loss, scale.detach(), added.detach()

    @abstractmethod
    def count_terms(self, batch: Batch) -> dict[str, int]:
        """Count what the losses of ``batch`` are averaged over; known on the host."""

    @abstractmethod
    def forward(self, batch: Batch, normalizers: LossNormalizers) -> dict[str, Tensor]:
        """Compute this rank's shares of ``loss`` and ``losses``, fp32 scalars, and its ``reports``, one number each."""


def sigmoid_loss_of_guessing(pairs: int) -> float:
    """Return the sigmoid loss where every answer is the fraction of those that belong together: 1 of ``pairs``."""
    others = max(1, pairs) - 1
    return math.log1p(others) + (others * math.log1p(1 / others) if others else 0.0)


def prepare_network(objective: Objective) -> None:
    """Make the network of ``objective`` what it trains: frozen where no loss reaches, for such gradients would be
    missing on every rank, and attending as the objective says."""
    if objective.attention_mode is not None:
        objective.model.use_attention_mode(objective.attention_mode)
    for weights in objective.unused:
        weights.requires_grad_(False)


def local_normalizers(objective: Objective, *batches: Batch) -> list[LossNormalizers]:
    """Make the normalizers of one process without communication: all batches together are one step."""
    tables = [objective.count_terms(batch) for batch in batches]
    device = batches[0].labels.device
    totals = {name: max(1, sum(table[name] for table in tables)) for name in tables[0]}
    return [
        {
            name: LossNormalizer(
                torch.tensor(float(totals[name]), device=device),
                torch.tensor(table[name] / totals[name], device=device),
            )
            for name in table
        }
        for table in tables
    ]
