"""Vision encoders of Latent Compression Learning with the attentive pooling that was trained with them.

This file lies beside the weights of a release: ``AutoModel.from_pretrained(folder, trust_remote_code=True)`` runs it,
with transformers 4.57 or later. It needs torch, transformers and safetensors alone. Without ``trust_remote_code`` the
same folder is the encoder of its family, without pooling.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    CLIPVisionModel,
    Dinov2Model,
    PreTrainedModel,
    Siglip2VisionModel,
    SiglipVisionModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import cached_file

ENCODERS: dict[str, Any] = {
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "siglip2_vision_model": Siglip2VisionModel,
    "dinov2": Dinov2Model,
}
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


class LclVisionModel(PreTrainedModel):
    """An encoder of transformers with attentive pooling.

    ``last_hidden_state`` is the patch tokens after the final norm, which is what was trained, and ``pooler_output``
    the pooling of them. SigLIP 2 takes flat patches; its images must be squares of the size of training.

    Args:
        config: of the encoder, with the sizes of the pooling under ``lcl_pooling``.
        encoder: with its weights; None: one without trained weights.
    """

    # It is the encoder that attends, and says what it can do.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: Any, encoder: PreTrainedModel | None = None):
        super().__init__(config)
        self.encoder = encoder if encoder is not None else ENCODERS[config.model_type](config)
        self.pooling = AttentivePooling(**config.lcl_pooling)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: Any, *args: Any, config: Any = None, **options: Any
    ) -> Any:
        """Load the encoder as its class in transformers does, and the pooling from a file of its own."""
        where = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        chosen = {name: options[name] for name in where if name in options}
        if config is None:
            config = AutoConfig.from_pretrained(folder, **chosen)
        for name in ("trust_remote_code", "code_revision"):
            options.pop(name, None)
        loaded = ENCODERS[config.model_type].from_pretrained(folder, *args, config=config, **options)
        encoder, *facts = loaded if isinstance(loaded, tuple) else (loaded,)
        model = cls(encoder.config, encoder)
        weights = load_file(str(cached_file(folder, POOLING_FILE, **chosen)))
        like = next(encoder.parameters())
        model.pooling.to(like.device, like.dtype).load_state_dict(weights)
        model.eval()
        return (model, *facts) if facts else model

    def save_pretrained(self, folder: Any, **options: Any) -> None:  # type: ignore[override]
        """Write what :meth:`from_pretrained` reads, this file included."""
        self.encoder.save_pretrained(folder, **options)
        pooling = {name: weight.contiguous() for name, weight in self.pooling.state_dict().items()}
        save_file(pooling, Path(folder) / POOLING_FILE, metadata={"format": "pt"})
        (Path(folder) / Path(__file__).name).write_bytes(Path(__file__).read_bytes())

    def forward(self, pixel_values: Tensor, **options: Any) -> BaseModelOutputWithPooling:
        """Encode images [images, 3, height, width], or flat patches where the family takes those."""
        outputs = self.encoder(pixel_values=pixel_values, **(options | {"return_dict": True}))
        patches = trained_patches(self.encoder, outputs.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=patches,
            pooler_output=self.pooling(patches),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def trained_patches(encoder: Any, states: Tensor) -> Tensor:
    """Return the patch tokens after the final norm, of what the family calls its last hidden state."""
    if encoder.config.model_type == "dinov2":
        return states[:, 1:]  # without the class token, which no loss of LCL reads
    if encoder.config.model_type == "clip_vision_model":  # its final norm is for the class token alone
        # Its tower is the model itself in transformers 5, and a part of it in 4.
        return getattr(encoder, "vision_model", encoder).post_layernorm(states[:, 1:])
    return states
