"""Pool attentively; the value path is also the projection into the decoder (published ``attentive.py``)."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lcl_ds.grids import PackedImages

POOLING_FILE = "pooling.safetensors"
"""Where a release has the weights, beside those of the encoder."""


class AttentivePooling(nn.Module):
    """One learned query attends to an image's patch tokens.

    The pooled vector and the tokens that the decoder receives share norm, value and output projection, so the pooled
    vector is a per-head weighted mean of exactly what the decoder sees. No residual, no MLP.

    Args:
        input_dim: width of the vision tower.
        output_dim: width of the decoder.
        num_heads: heads; must divide ``output_dim``, the width of the attention.
        eps: epsilon of the three norms.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(self, input_dim: int, output_dim: int, num_heads: int, eps: float = 1e-5):
        super().__init__()
        if output_dim % num_heads:
            raise ValueError(f"pooling: {num_heads} heads do not divide the decoder's width {output_dim}")
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(1, 1, input_dim))
        self.norm_q = nn.LayerNorm(input_dim, eps=eps)
        self.norm_k = nn.LayerNorm(input_dim, eps=eps)
        self.norm_v = nn.LayerNorm(input_dim, eps=eps)
        self.q = nn.Linear(input_dim, output_dim)
        self.k = nn.Linear(input_dim, output_dim)
        self.v = nn.Linear(input_dim, output_dim)
        self.proj = nn.Linear(output_dim, output_dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the query anew."""
        nn.init.normal_(self.query)

    def forward(self, patches: Tensor, images: PackedImages | None = None) -> tuple[Tensor, Tensor]:
        """Pool patches [M, N, input_dim]: pooled [M, output_dim], tokens [M, N, output_dim].

        Args:
            images: how images of different shapes lie end to end in patches [U, input_dim]; tokens are then
                [U, output_dim].
        """
        query = self.q(self.norm_q(self.query))
        key, value = self.k(self.norm_k(patches)), self.v(self.norm_v(patches))
        keys, values, mask = key, value, None
        if images is not None:
            keys, values, mask = _side_by_side(key, value, images)
        query = query.expand(keys.shape[0], -1, -1)
        attended = F.scaled_dot_product_attention(self._heads(query), self._heads(keys), self._heads(values), mask)
        attended = attended.transpose(1, 2).flatten(2)
        return self.proj(attended).squeeze(1), self.proj(value)

    def weights(self, patches: Tensor) -> Tensor:
        """Weigh patches [M, N, input_dim] as :meth:`forward` pools them: fp32 [M, heads, N], which sum to one."""
        query, key = self._heads(self.q(self.norm_q(self.query))), self._heads(self.k(self.norm_k(patches)))
        scores = query.float() @ key.float().transpose(-2, -1) / key.shape[-1] ** 0.5
        return scores.softmax(-1).squeeze(2)

    def _heads(self, states: Tensor) -> Tensor:
        """Split states [M, N, output_dim] into those of the heads [M, heads, N, D]."""
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _side_by_side(key: Tensor, value: Tensor, images: PackedImages) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lay the keys and values [U, width] of every image into a row of its own, [M, longest, width].

    Returns:
        Keys, values, and bool [M, 1, 1, longest], which of them are an image's own; None: all. One query reads them,
        so that what is read in vain is little.
    """
    shape = images.count, images.longest
    if len(key) == images.count * images.longest:
        return key.unflatten(0, shape), value.unflatten(0, shape), None
    at = torch.arange(images.longest, device=key.device)
    starts, ends = images.cu_tokens[:-1, None], images.cu_tokens[1:, None]
    places = (starts + at).clamp(max=len(key) - 1)
    keys, values = (x.index_select(0, places.flatten()).view(*places.shape, -1) for x in (key, value))
    return keys, values, (starts + at < ends)[:, None, None]


def read_released_pooling(file: Path, sizes: dict[str, Any]) -> AttentivePooling:
    """Read the pooling of a release; ``sizes`` stand in its ``config.json``."""
    pooling = AttentivePooling(sizes["width"], sizes["output_width"], sizes["heads"], sizes["eps"])
    pooling.load_state_dict(load_file(file))
    return pooling.eval()
