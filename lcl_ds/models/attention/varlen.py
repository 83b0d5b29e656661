"""Attention of documents laid end to end, known to transformers under the name ``varlen``, and of images likewise.

On a GPU it is torch's own variable-length flash kernel, which needs no package and serves every family that goes
through transformers' attention interface, GPT-2 among them. On a CPU documents are attended one by one, so that a row
costs the squares of its documents' lengths and not the square of its own.
"""

from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "varlen"
IMAGES = "varlen_images"
"""What a vision tower uses whose images may have different shapes."""
LARGEST_HEAD = 256
"""Widest head of the flash kernel."""


def register() -> None:
    """Make both names known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, varlen_attention)
    AttentionInterface.register(IMAGES, images_attention)


def has_gpu_kernel() -> bool:
    """Say whether this torch has the variable-length kernel."""
    return find_spec("torch.nn.attention.varlen") is not None


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool = True,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within documents, as transformers calls an attention function.

    Args:
        query: [R, heads, L, D].
        key, value: [R, key-value heads, L, D]; heads may share them.
        attention_mask: ignored, documents are kept apart by their bounds.
        sliding_window: tokens that a token sees in each direction it may look, itself included.
        cu_seq_lens_q: int32 [N + 1], where documents begin in the rows laid end to end, and their end.
        max_length_q: of the longest document.

    Returns:
        [R, L, heads, D], and None for the probabilities.
    """
    rows, _heads, length, _width = query.shape
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # [R * L, heads, D]
    behind = -1 if sliding_window is None else sliding_window - 1
    window = behind, 0 if is_causal else behind
    attended: Any
    if query.device.type == "cpu":
        attended = _one_by_one(flat, cu_seq_lens_q, scaling, window)
    else:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = flat
        ends, longest = cu_seq_lens_q, max_length_q
        options: dict[str, Any] = {"scale": scaling, "window_size": window}
        if query.shape[1] != key.shape[1] and "enable_gqa" in signature(varlen_attn).parameters:
            options["enable_gqa"] = True  # torch 2.11 serves shared heads without being asked
        attended = varlen_attn(q, k, v, ends, ends, longest, longest, **options)
    return attended.unflatten(0, (rows, length)), None


def images_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: tuple[Tensor, int] | None,
    *,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within images, as transformers calls an attention function; every token sees all of its image.

    Args:
        attention_mask: bounds of images that are laid end to end, and the tokens of the longest; None: every row is an
            image. Families hand it on whole, but not all of them any other argument.
    """
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **options)
    bounds, longest = attention_mask
    count = len(bounds) - 1
    if query.shape[2] == count * longest:  # all are alike, and need no bounds: so squares are attended in any run
        query, key, value = (x[0].unflatten(1, (count, longest)).transpose(0, 1) for x in (query, key, value))
        attended, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **options)
        return attended.flatten(0, 1)[None], None
    return varlen_attention(
        module, query, key, value, None, scaling=scaling, is_causal=False, cu_seq_lens_q=bounds, max_length_q=longest
    )


@torch.compiler.disable  # or it would be compiled anew for every number of documents and each of their lengths
def _one_by_one(flat: list[Tensor], bounds: Tensor, scaling: float | None, window: tuple[int, int]) -> Tensor:
    """Attend [T, heads, D] document by document; a document shorter than the window needs no mask."""
    lengths, documents = bounds.diff().tolist(), []
    for query, key, value in zip(*(x.split(lengths) for x in flat), strict=True):
        mask, is_causal = None, window[1] == 0
        if 0 <= window[0] < len(query) - 1:
            position = torch.arange(len(query))
            distance = position[:, None] - position
            mask, is_causal = (distance <= window[0]) & (-distance <= window[1]), False
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        shared = query.shape[1] != key.shape[1]
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scaling, enable_gqa=shared
        )
        documents.append(attended[0].transpose(0, 1))
    return torch.cat(documents)
