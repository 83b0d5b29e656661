"""Vision encoders of Latent Compression Learning with the attentive pooling that was trained with them.

This file lies beside the weights of a release: ``AutoModel.from_pretrained(folder, trust_remote_code=True)`` runs it,
with transformers 4.57 or later. It needs torch, transformers and safetensors alone. Without ``trust_remote_code`` the
same folder is the encoder of its family, without pooling.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel, Dinov2Model, Siglip2VisionModel, SiglipVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import cached_file

POOLING_FILE = "pooling.safetensors"
"""Beside the encoder's weights, so that the classes of transformers find no weight that they do not know."""


class AttentivePooling(nn.Module):
    """One learned query attends to an image's patch tokens.

    Args:
        width: of the patch tokens.
        output_width: of the pooled vector.
        heads: of the attention.
        eps: epsilon of the norms.
    """

    def __init__(self, width: int, output_width: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.norm_q = nn.LayerNorm(width, eps=eps)
        self.norm_k = nn.LayerNorm(width, eps=eps)
        self.norm_v = nn.LayerNorm(width, eps=eps)
        self.q = nn.Linear(width, output_width)
        self.k = nn.Linear(width, output_width)
        self.v = nn.Linear(width, output_width)
        self.proj = nn.Linear(output_width, output_width, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """Pool patches [images, patches, width]: [images, output_width]."""
        query = self.q(self.norm_q(self.query)).expand(patches.shape[0], -1, -1)
        key, value = self.k(self.norm_k(patches)), self.v(self.norm_v(patches))
        heads = [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value)]
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.proj(attended).squeeze(1)


class Pooled:
    """What the encoders below share; a mixin before the class of transformers.

    ``last_hidden_state`` is the patch tokens after the final norm, which is what was trained, and ``pooler_output``
    the attentive pooling of them.
    """

    _keys_to_ignore_on_load_missing = [r"^lcl_pooling\."]
    """They come from a file of their own."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.lcl_pooling = AttentivePooling(**config.lcl_pooling)

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **options: Any) -> Any:
        """Load the encoder as transformers does, and the pooling, unless ``save_pretrained`` wrote both together."""
        where = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        chosen = {name: options[name] for name in where if name in options}
        found = cached_file(folder, POOLING_FILE, _raise_exceptions_for_missing_entries=False, **chosen)
        loaded = super().from_pretrained(folder, *args, **options)
        if found is None:
            return loaded
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        like = next(model.parameters())
        weights = {name: weight.to(like.device, like.dtype) for name, weight in load_file(found).items()}
        model.lcl_pooling.load_state_dict(weights, assign=True)  # its own weights may have no memory
        return loaded

    def forward(self, pixel_values: Tensor, **options: Any) -> BaseModelOutputWithPooling:
        """Encode images [images, 3, height, width], or flat patches where the family takes those."""
        options.pop("return_dict", None)
        outputs = super().forward(pixel_values=pixel_values, **options)
        patches = self.trained_patches(outputs.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=patches,
            pooler_output=self.lcl_pooling(patches),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def trained_patches(self, states: Tensor) -> Tensor:
        """Return the patch tokens after the final norm, of what the family calls its last hidden state."""
        return states


class LclCLIPVisionModel(Pooled, CLIPVisionModel):
    """CLIP's encoder, which applies its final norm to the class token alone."""

    def trained_patches(self, states: Tensor) -> Tensor:
        # Its tower is the model itself in transformers 5, and a part of it in 4.
        return getattr(self, "vision_model", self).post_layernorm(states[:, 1:])


class LclSiglipVisionModel(Pooled, SiglipVisionModel):
    """SigLIP's encoder."""


class LclSiglip2VisionModel(Pooled, Siglip2VisionModel):
    """SigLIP 2's encoder, which takes flat patches; images must be squares of the size of training."""


class LclDinov2Model(Pooled, Dinov2Model):
    """DINOv2's encoder, whose class token no loss of LCL reads."""

    def trained_patches(self, states: Tensor) -> Tensor:
        return states[:, 1:]
