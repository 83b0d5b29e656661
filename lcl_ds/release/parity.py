"""Compare what a release computes with what the training model computes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lcl_ds.errors import UserError
from lcl_ds.models.network import LCLModel
from lcl_ds.release.options import Dtype
from lcl_ds.release.origin import WeightOrigin

TOLERANCES: dict[Dtype, float] = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}
"""Largest difference of any feature between the training model, fp32, and a release whose weights have that dtype,
computed in fp32; in units of the largest feature where that is above 1."""
OTHER_CODE = 1e-4
"""The same of fp32 weights that another library computes with."""


@dataclass(frozen=True)
class TrainedFeatures:
    """What the training model computes of the images of an origin, fp32."""

    images: Tensor
    """[M, 3, H, W], normalised."""
    patches: Tensor
    """[M, N, width], after the final norm."""
    pooled: Tensor | None
    """[M, D]; None: no pooling was trained."""

    def by_name(self) -> dict[str, Tensor]:
        """Name the features as exports name their outputs."""
        return {"patches": self.patches} | ({} if self.pooled is None else {"pooled": self.pooled})


@torch.no_grad()
def trained_features(model: LCLModel, origin: WeightOrigin) -> TrainedFeatures:
    """Compute the features that a release must have. Raises: UserError, they are not finite."""
    images = model.vision.normalize(torch.from_numpy(origin.pixels))
    patches = model.vision(images)
    features = TrainedFeatures(images, patches, model.pooling(patches)[0] if origin.pools else None)
    if not all(values.isfinite().all() for values in features.by_name().values()):
        raise UserError("the encoder's features are not finite; release an earlier checkpoint")
    return features


def largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float, what: str) -> float:
    """Compare features by name.

    Args:
        tolerance: in units of the largest feature where that is above 1.
        what: computes ``theirs``, for the message.

    Raises:
        RuntimeError: a feature differs by more.
    """
    differences = {name: float((ours[name] - theirs[name].float()).abs().max()) for name in ours}
    limits = {name: tolerance * max(1.0, float(ours[name].abs().max())) for name in ours}
    if wrong := [name for name in ours if not differences[name] <= limits[name]]:
        found = ", ".join(f"{name} by {differences[name]:.1e} (allowed: {limits[name]:.1e})" for name in wrong)
        raise RuntimeError(f"{what} differs from the training model: {found}")
    return max(differences.values())


def parity_sentence(difference: float, tolerance: float, origin: WeightOrigin) -> str:
    """Say what was found, and what would have been allowed."""
    return (
        f"parity with the training model: max abs difference {difference:.1e} over {len(origin.pixels)} "
        f"{origin.pixels_kind}; allowed: {tolerance:.0e} of the largest feature"
    )
