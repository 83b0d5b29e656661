"""Latent Compression Learning: contrastive plus generation loss from one causal pass (paper, equation for L)."""

from dataclasses import dataclass
from typing import Literal

from lcl_kernels import contrastive_loss
from torch import Tensor, nn

from lcl_ds.batch import Batch
from lcl_ds.models.lcl import LCLModel


@dataclass(frozen=True)
class LossCounts:
    """What losses are divided by: fp32 scalars on the batch's device, over all ranks and micro-steps of one step."""

    labels: Tensor
    """Labels of the whole step."""
    pair_share: Tensor
    """Pairs of this micro-step over all ranks / pairs of the whole step."""
    pair_counts: list[int] | None = None
    """Pairs of this micro-step on each rank; None: the ranks ask each other when they need it."""


class LCLObjective(nn.Module):
    """``generation_weight * generation + contrastive_weight * contrastive``.

    Summed over ranks and micro-steps the returned losses are the means over all labels and all pairs of the step, so
    they do not depend on how rows are spread.

    Args:
        model: the network; submodule names of a saved state dict start with ``model.``.
        contrastive_weight, generation_weight: weights in the total (paper: 0.1 and 1).
        normalize: ``"global"``, or ``"per_rank"`` for the published code's per-rank means.
        gather_with_grad: whether features also learn as negatives of others (upstream ``--gather-with-grad``, which the
            published scripts set).
    """

    def __init__(
        self,
        model: LCLModel,
        contrastive_weight: float,
        generation_weight: float,
        normalize: Literal["global", "per_rank"] = "global",
        gather_with_grad: bool = True,
    ):
        super().__init__()
        self.model = model
        self.contrastive_weight = contrastive_weight
        self.generation_weight = generation_weight
        self.normalize = normalize
        self.gather_with_grad = gather_with_grad

    def forward(self, batch: Batch, counts: LossCounts) -> dict[str, Tensor]:
        """This rank's shares of ``loss`` (weighted total), ``contrastive_loss`` and ``generation_loss``, and the
        ``logit_scale`` [1] that was used."""
        hidden_states, pooled = self.model(batch)
        states = hidden_states.index_select(0, batch.label_positions)
        generation = self.model.lm_head(states, batch.labels, counts.labels)
        image, context = self.model.pair_features(hidden_states, pooled, batch)
        scale = self.model.logit_scale()
        contrastive = counts.pair_share * contrastive_loss(
            image,
            context,
            scale,
            normalize=self.normalize,
            detach_keys=not self.gather_with_grad,
            counts=counts.pair_counts,
        )
        total = self.generation_weight * generation + self.contrastive_weight * contrastive
        return {
            "loss": total,
            "contrastive_loss": contrastive,
            "generation_loss": generation,
            "logit_scale": scale.detach(),
        }
