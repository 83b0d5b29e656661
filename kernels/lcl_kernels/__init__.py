"""Memory-lean losses for vision-language pre-training, and a plain reference of each.

`linear_cross_entropy` never builds the [N, V] logits, `contrastive_loss` never builds the [M, M] similarities. The
package imports torch only.
"""

from lcl_kernels.contrastive import contrastive_loss
from lcl_kernels.linear_cross_entropy import linear_cross_entropy
from lcl_kernels.reference import reference_contrastive_loss, reference_linear_cross_entropy

__all__ = [
    "contrastive_loss",
    "linear_cross_entropy",
    "reference_contrastive_loss",
    "reference_linear_cross_entropy",
]
