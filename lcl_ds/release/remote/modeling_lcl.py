"""Vision encoders of Latent Compression Learning, with the attentive pooling that was trained with them.

This file lies beside the weights of a release: ``AutoModel.from_pretrained(folder, trust_remote_code=True)`` runs it,
with transformers 4.57 or later. It needs torch, transformers and safetensors alone. Without ``trust_remote_code`` the
same folder is the encoder of its family, without pooling.

What differs between families stands in ``config.json``: the class under ``architectures``, the rest under
``lcl_release``:

- ``weight_prefix``: what stands before the names of the encoder's weights in files;
- ``prefix_tokens``: how many tokens stand before those of the patches;
- ``final_norm``: the module that normalises the patch tokens; null where the encoder does it by itself;
- ``pooling``: the sizes of the pooling; null where none was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import cached_file

POOLING_FILE = "pooling.safetensors"
"""Beside the encoder's weights, so that the classes of transformers find no weight that they do not know."""
OF_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
"""Options of ``from_pretrained`` that say where a file is looked for."""


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

    def forward(self, patches: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool patches [images, patches, width], of which ``mask`` [images, patches] counts: [images, output_width]."""
        query = self.q(self.norm_q(self.query)).expand(patches.shape[0], -1, -1)
        key, value = self.k(self.norm_k(patches)), self.v(self.norm_v(patches))
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        allowed = None if mask is None else mask[:, None, None].bool()
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        return self.proj(attended.transpose(1, 2).flatten(2)).squeeze(1)


class LclVisionModel(PreTrainedModel):
    """An encoder of transformers with attentive pooling.

    ``last_hidden_state`` is the patch tokens after the final norm, which is what was trained, and ``pooler_output``
    the pooling of them, or None where none was trained.

    Args:
        config: of the encoder, with ``lcl_release`` as above.
        encoder: with its weights; None: one without trained weights.
    """

    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    # It is the encoder that attends, and says what it can do.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: Any, encoder: PreTrainedModel | None = None):
        super().__init__(config)
        self.encoder = encoder if encoder is not None else encoder_class(config)(config)
        self.pooling = AttentivePooling(**sizes) if (sizes := config.lcl_release["pooling"]) else None

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: Any, *args: Any, config: Any = None, **options: Any
    ) -> Any:
        """Load the encoder as its class in transformers does, and the pooling from a file of its own."""
        where = {name: options[name] for name in OF_HUB if name in options}
        if config is None:
            config = AutoConfig.from_pretrained(folder, **where)
        for name in ("trust_remote_code", "code_revision"):
            options.pop(name, None)
        loaded = encoder_class(config).from_pretrained(folder, *args, config=config, **options)
        encoder, *facts = loaded if isinstance(loaded, tuple) else (loaded,)
        model = cls(encoder.config, encoder)
        if model.pooling is not None:
            weights = load_file(str(cached_file(folder, POOLING_FILE, **where)))
            like = next(encoder.parameters())
            model.pooling.to(like.device, like.dtype).load_state_dict(weights)
        model.eval()
        return (model, *facts) if facts else model

    def save_pretrained(self, folder: Any, **options: Any) -> None:  # type: ignore[override]
        """Write what :meth:`from_pretrained` reads, this file included."""
        prefix = self.config.lcl_release["weight_prefix"]
        # transformers 5 leaves the prefix out of names in memory; both versions read files that have it.
        weights = {prefix + name.removeprefix(prefix): value for name, value in self.encoder.state_dict().items()}
        self.encoder.save_pretrained(folder, state_dict=weights, **options)
        if self.pooling is not None:
            pooling = {name: weight.contiguous() for name, weight in self.pooling.state_dict().items()}
            save_file(pooling, Path(folder) / POOLING_FILE, metadata={"format": "pt"})
        (Path(folder) / Path(__file__).name).write_bytes(Path(__file__).read_bytes())

    def forward(self, pixel_values: Tensor, **options: Any) -> Any:
        """Encode images [images, 3, height, width], or flat patches where the family takes those."""
        as_tuple = options.pop("return_dict", None) is False
        outputs = self.encoder(pixel_values=pixel_values, return_dict=True, **options)
        patches = self.trained_patches(outputs.last_hidden_state)
        pooled = None
        if self.pooling is not None:
            pooled = self.pooling(patches, options.get("pixel_attention_mask"))
        result = BaseModelOutputWithPooling(
            last_hidden_state=patches,
            pooler_output=pooled,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result.to_tuple() if as_tuple else result

    def trained_patches(self, states: Tensor) -> Tensor:
        """Return the patch tokens after the final norm, of what the family calls its last hidden state."""
        facts = self.config.lcl_release
        patches = states[:, facts["prefix_tokens"] :]  # no loss of LCL reads a class token
        if facts["final_norm"] is None:
            return patches
        # The tower is the model itself in transformers 5, and a part of it in 4.
        return getattr(getattr(self.encoder, "vision_model", self.encoder), facts["final_norm"])(patches)


def encoder_class(config: Any) -> Any:
    """Find the class of the encoder in transformers.

    Raises:
        ImportError: this version of transformers has none of that name.
    """
    (name,) = config.architectures
    try:
        return getattr(transformers, name)
    except AttributeError:
        raise ImportError(f"transformers {transformers.__version__} has no {name}; install a later one") from None
