"""Find where the pooling query of a trained network looks in held-out images."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import align_module_device

from lcl_ds.models.network import LCLModel
from lcl_ds.models.placement import device_of
from lcl_ds.report.examples import Gaze

SHOWN = 12
"""Images that are shown."""


@torch.no_grad()
def pooling_gazes(model: LCLModel, pixels: Sequence[np.ndarray], count: int = SHOWN) -> list[Gaze]:
    """Choose images spread over all, uint8 [3, H, W] each, and weigh their patches as the pooling query does.

    Returns:
        Nothing where the network gives no numbers.
    """
    chosen = np.unique(np.linspace(0, len(pixels) - 1, min(count, len(pixels))).round().astype(int))
    images = np.stack([pixels[i] for i in chosen])
    vision, device = model.vision, device_of(model)
    patches = vision(vision.normalize(torch.from_numpy(images).to(device)))
    with align_module_device(model.pooling, device):
        weights = model.pooling.weights(patches).mean(1).cpu().numpy()
    if not np.isfinite(weights).all():
        return []
    side = math.isqrt(weights.shape[1])
    return [
        Gaze(image.transpose(1, 2, 0), of_image.reshape(side, side))
        for image, of_image in zip(images, weights, strict=True)
    ]
