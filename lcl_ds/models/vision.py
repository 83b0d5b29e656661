"""The vision tower: a transformers encoder whose patch tokens are what the decoder sees."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from lcl_ds.models.attention import choose_implementation, switch_implementation

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""Per-channel statistics of CLIP's images, the convention of OpenCLIP and of the published LCL."""


def build_vision_config(model_type: str, hf_keys: dict[str, Any]) -> Any:
    """A transformers configuration of the encoder; ``hf_keys`` are that family's own keys."""
    return AutoConfig.for_model(model_type, **hf_keys)


def image_tokens(config: Any) -> int:
    """Patch tokens of one image."""
    return (config.image_size // config.patch_size) ** 2


def normalize_images(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [M, 3, H, W] to normalised ``dtype``; floating images are taken as normalised already."""
    if images.is_floating_point():
        return images.to(dtype)
    mean = torch.tensor(IMAGE_MEAN, device=images.device).view(3, 1, 1) * 255
    std = torch.tensor(IMAGE_STD, device=images.device).view(3, 1, 1) * 255
    return ((images - mean) / std).to(dtype)


class VisionEncoder(nn.Module):
    """Patch tokens after the final norm, from any transformers vision model with square patches.

    CLIP's class token takes part in attention and is then dropped, as published (upstream ``lcl_model.py``). Images
    have no masks, so ``auto`` is sdpa: torch takes its own flash kernel then.
    """

    def __init__(self, config: Any, attention: str = "auto"):
        super().__init__()
        self.attention = attention
        self.model: PreTrainedModel = AutoModel.from_config(config)
        self.patch_tokens = image_tokens(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[M, 3, H, W] -> [M, N, width]."""
        device, dtype = pixel_values.device.type, pixel_values.dtype
        chosen = choose_implementation(self.model, self.attention, "causal", device, dtype, ("sdpa", "eager"))
        switch_implementation(self.model, chosen)
        return patch_tokens(self.model, pixel_values)[:, -self.patch_tokens :]


def patch_tokens(model: Any, pixel_values: Tensor) -> Tensor:
    """Final-norm tokens [M, T, width] of a transformers vision model, prefix tokens (class, registers) included."""
    hidden_states = model(pixel_values=pixel_values).last_hidden_state
    if model.config.model_type == "clip_vision_model":
        # CLIPVisionModel applies its final norm to the class token only.
        hidden_states = model.post_layernorm(hidden_states)
    return hidden_states
