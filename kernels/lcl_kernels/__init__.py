"""Memory-lean losses for vision-language pre-training, and a plain reference of each.

`linear_cross_entropy` never builds the [N, V] logits, `contrastive_loss` and `sigmoid_contrastive_loss` never build the
[M, M] similarities. The package needs torch only; on a GPU it runs Triton kernels, which are imported at their first
use.
"""

from lcl_kernels.contrastive import contrastive_loss
from lcl_kernels.linear_cross_entropy import TokenStatistics, linear_cross_entropy
from lcl_kernels.reference import (
    reference_contrastive_loss,
    reference_linear_cross_entropy,
    reference_sigmoid_contrastive_loss,
)
from lcl_kernels.sigmoid_contrastive import sigmoid_contrastive_loss
from lcl_kernels.similarity import PairStatistics

__all__ = [
    "PairStatistics",
    "TokenStatistics",
    "contrastive_loss",
    "linear_cross_entropy",
    "reference_contrastive_loss",
    "reference_linear_cross_entropy",
    "reference_sigmoid_contrastive_loss",
    "sigmoid_contrastive_loss",
]

__version__ = "0.1.0"
