"""What all objectives share: their base settings, what their losses are divided by, the interface to the trainer."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from lcl_kernels import contrastive_loss
from pydantic import Field
from torch import Tensor, nn

from lcl_ds.batch import Batch
from lcl_ds.errors import UserError
from lcl_ds.metrics import Combination, check_names
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
    reports: ClassVar[Mapping[str, Combination]] = {}
    """Other outputs that are recorded, and how the ranks' values become one: ``sum`` adds up those of all ranks and
    micro-steps, ``same`` takes that of the last micro-step, which is the same on all ranks."""
    takes_native: ClassVar[bool] = False
    """Whether it can train on images that keep their aspect ratio (``model.vision.resolution: native``), which have
    different numbers of tokens: it reads them through :class:`LCLModel`'s own forward alone."""
    decoder_passes: ClassVar[int] = 1
    """How often the decoder reads one sample."""

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
        detach_keys: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Compute the share of the contrastive loss; it needs the normalizer of ``pairs``.

        Returns:
            The share, and the multiplier [1] that was used.
        """
        image, context = self.model.pair_features(hidden_states, pooled, batch)
        scale, pairs = self.model.logit_scale(), normalizers["pairs"]
        loss = contrastive_loss(
            image, context, scale, normalize=normalize, detach_keys=detach_keys, counts=pairs.per_rank
        )
        return pairs.share * loss, scale.detach()

    @abstractmethod
    def count_terms(self, batch: Batch) -> dict[str, int]:
        """Count what the losses of ``batch`` are averaged over; known on the host."""

    @abstractmethod
    def forward(self, batch: Batch, normalizers: LossNormalizers) -> dict[str, Tensor]:
        """Compute this rank's shares of ``loss`` and ``losses``, fp32 scalars, and its ``reports``, one number each."""


def freeze_unused(objective: Objective) -> None:
    """Let nothing train that no loss of ``objective`` reaches: its gradients would be missing on every rank."""
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
