"""What a token of a packed row may attend to, as keyword arguments of a transformers decoder.

The masks are made here, from the documents of the rows, and handed over complete: families differ in what they derive
from ``position_ids`` (OPT derives nothing), and those that derive a mask read values back from the GPU to do so.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_bidirectional_overlay,
    sliding_window_causal_mask_function,
)
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from lcl_ds.models.attention import varlen

Mode = Literal["causal", "images", "prefix", "bidirectional"]
"""What a token sees of its document: what came before it; that and the rest of its own image; the same, but of an image
only its own image; everything."""
BY_IMAGES = ("images", "prefix")
"""Modes in which the tokens of an image see each other."""

FLASH = ("flash_attention_3", "flash_attention_2")
BY_BOUNDS = (*FLASH, varlen.NAME)
"""Implementations that are told where documents begin, instead of a mask."""
PREFERRED = (*BY_BOUNDS, "flex_attention", "sdpa", "eager")
LAYER_TYPES = {"full_attention", "sliding_attention"}
"""Kinds of layers whose masks are made here; chunked, recurrent and other kinds would mix packed documents."""


def attention_arguments(
    decoder: PreTrainedModel,
    inputs_embeds: Tensor,
    position_ids: Tensor,
    *,
    mode: Mode = "causal",
    image_blocks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> dict[str, Any]:
    """Make the arguments that keep the documents of each row apart, ``position_ids`` among them.

    They are those of the attention implementation that the decoder uses, see :func:`use_best_implementation`.

    Args:
        inputs_embeds: [R, L, H].
        position_ids: int64 [R, L], 0 where a document or the padding begins.
        image_blocks: int64 [R, L], number of the image slot that a token is in, -1 for none; for :data:`BY_IMAGES`.
        cu_seqlens: int32 [D + 1], where documents begin in the rows laid end to end, and their end; None: made from
            ``position_ids``, which on a GPU waits for it.
        max_seqlen: tokens of the longest document.
    """
    used = decoder.config._attn_implementation
    if used in BY_BOUNDS:
        assert mode not in BY_IMAGES, f"{used} cannot let tokens of an image see each other"
        if cu_seqlens is None or max_seqlen is None:
            begins = (position_ids.flatten() == 0).nonzero().squeeze(1)
            cu_seqlens = torch.cat([begins, begins.new_tensor([position_ids.numel()])]).to(torch.int32)
            max_seqlen = int(cu_seqlens.diff().max())
        return {"position_ids": position_ids, **_bounds_arguments(decoder.config, mode, cu_seqlens, max_seqlen)}
    documents = (position_ids == 0).cumsum(-1)

    def mask(window: int | None) -> Any:
        rows, length = position_ids.shape
        return ALL_MASK_ATTENTION_FUNCTIONS[used](
            batch_size=rows,
            q_length=length,
            kv_length=length,
            mask_function=_visible(mode, window, documents, image_blocks),
            allow_is_causal_skip=False,
            dtype=inputs_embeds.dtype,
            device=inputs_embeds.device,
            config=decoder.config,
        )

    return {"position_ids": position_ids, "attention_mask": _per_layer_type(decoder.config, mask)}


def image_blocks(position_ids: Tensor, places: Tensor, numbers: Tensor, beyond: int = 0) -> Tensor:
    """Number the image slot that each token is in, int64 [R, L]; -1 for none.

    Args:
        places: int64 [W], flat positions of the tokens in slots.
        numbers: int64 [W], the slot of each.
        beyond: tokens behind the rows, where a slot may stand that is in none.
    """
    blocks = position_ids.new_full((position_ids.numel() + beyond,), -1).index_copy(0, places, numbers)
    return blocks[: position_ids.numel()].view_as(position_ids)


def bounds_of_images(tower: PreTrainedModel, tokens: Tensor, bounds: Tensor, longest: int) -> Any:
    """Make the attention mask that keeps images apart whose tokens lie end to end.

    Args:
        tokens: [1, T, width].
        bounds: int32 [M + 1], where images begin, and their end.
        longest: tokens of the largest image.
    """
    used = tower.config._attn_implementation
    if used == varlen.IMAGES:
        return bounds, longest
    begins = torch.zeros(1, tokens.shape[1], dtype=torch.int64, device=tokens.device)
    begins = begins.index_fill(1, bounds[:-1].long(), 1)
    return attention_arguments(tower, tokens, 1 - begins, mode="bidirectional")["attention_mask"]


def choose_implementation(
    tower: PreTrainedModel,
    wanted: str,
    mode: Mode,
    device_type: str,
    dtype: torch.dtype,
    preferred: tuple[str, ...] = PREFERRED,
) -> str:
    """Choose the wanted implementation if it can run, and otherwise the best that can.

    Args:
        wanted: ``auto``, or an attention implementation of transformers.
        preferred: best first; the last always runs.
    """
    candidates = preferred if wanted == "auto" else (wanted, *preferred)
    for name in candidates:
        if not (unsupported(tower, name, mode) or unavailable(name, device_type, dtype)):
            return name
    return preferred[-1]


def use_best_implementation(
    tower: PreTrainedModel,
    wanted: str,
    mode: Mode = "causal",
    preferred: tuple[str, ...] = PREFERRED,
    device: torch.device | None = None,
) -> None:
    """Make ``tower`` use what :func:`choose_implementation` says for its dtype and its device.

    Args:
        device: where it computes; None: where its weights are now.
    """
    weight = next(tower.parameters())
    chosen = choose_implementation(tower, wanted, mode, (device or weight.device).type, weight.dtype, preferred)
    if chosen in (varlen.NAME, varlen.IMAGES):
        varlen.register()
    switch_implementation(tower, chosen)


def switch_implementation(tower: PreTrainedModel, implementation: str) -> None:
    """Make ``tower`` use an implementation; does nothing when it does already."""
    if tower.config._attn_implementation != implementation:
        tower.set_attn_implementation(implementation)


def unsupported(tower: PreTrainedModel, implementation: str, mode: Mode = "causal") -> str | None:
    """Say why this family cannot use the implementation on any machine; None if it can."""
    config, family = tower.config, tower.config.model_type
    dropout = getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0)
    if implementation in FLASH:
        if not tower._supports_flash_attn:
            return f"transformers does not support it for {family}"
        return "it cannot let tokens of an image see each other (bidirectional_images)" if mode in BY_IMAGES else None
    if implementation in (varlen.NAME, varlen.IMAGES):
        if not tower._supports_attention_backend:
            return f"transformers does not support it for {family}"
        if mode in BY_IMAGES:
            return "it cannot let tokens of an image see each other (bidirectional_images)"
        if getattr(config, "attn_logit_softcapping", None):
            return f"it cannot cap attention logits as {family} does"
        return "it has no attention dropout" if dropout else None
    if implementation == "flex_attention":
        if not tower._supports_flex_attn:
            return f"transformers does not support it for {family}"
        return "it has no attention dropout" if dropout else None
    if implementation == "sdpa" and (not tower._supports_sdpa or getattr(config, "attn_logit_softcapping", None)):
        return f"it cannot cap attention logits as {family} does"
    return None


def unavailable(implementation: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Say why the implementation cannot run here; None if it can."""
    if implementation in FLASH:
        if dtype not in (torch.bfloat16, torch.float16):
            return "it needs precision bf16"
        # Where the package is missing transformers would fetch a kernel from the Hub instead.
        two = implementation == "flash_attention_2"
        installed = is_flash_attn_2_available() if two else is_flash_attn_3_available()
        return None if installed and device_type == "cuda" else "it needs a GPU and the flash-attn package"
    if implementation in (varlen.NAME, varlen.IMAGES) and device_type != "cpu":
        if dtype not in (torch.bfloat16, torch.float16):
            return "it needs precision bf16"
        return None if varlen.has_gpu_kernel() else "this torch has no variable-length attention"
    if implementation == "flex_attention" and device_type != "cuda":
        return "it needs a GPU to train"
    return None


def _bounds_arguments(config: Any, mode: Mode, cu_seqlens: Tensor, max_seqlen: int) -> dict[str, Any]:
    """Make arguments in which documents are sequences of their own, whatever row they lie in.

    With flash, families without layer types (llama, gpt2, mistral, gemma) still look for packed rows in
    ``position_ids``, which waits for the GPU once per forward pass; no argument of transformers prevents it.
    """
    return {
        "attention_mask": _per_layer_type(config, lambda window: None),
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_seqlen,
        "max_length_k": max_seqlen,
        "is_causal": mode != "bidirectional",
    }


def _per_layer_type(config: Any, mask: Callable[[int | None], Any]) -> Any:
    """Make one mask for all layers, or one for each kind of layer in a decoder that has several.

    Args:
        mask: from the width of the sliding window, None for full attention, to the mask.
    """
    window = getattr(config, "sliding_window", None)
    if kinds := getattr(config, "layer_types", None):
        return {kind: mask(window if kind == "sliding_attention" else None) for kind in sorted(set(kinds))}
    return mask(window)


def _visible(mode: Mode, window: int | None, documents: Tensor, blocks: Tensor | None) -> Callable[..., Tensor]:
    """Say whether a query position sees a key position; windows of both directions hold ``2 * window - 1`` tokens."""
    if mode == "bidirectional":
        near = bidirectional_mask_function if window is None else sliding_window_bidirectional_overlay(window - 1)
    else:
        near = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    visible = and_masks(packed_sequence_mask_function(documents), near)
    if mode not in BY_IMAGES:
        return visible
    assert blocks is not None
    if mode == "prefix":
        visible = and_masks(visible, _is_no_image_token(blocks))
    return or_masks(visible, blockwise_overlay(blocks))


def _is_no_image_token(blocks: Tensor) -> Callable[..., Tensor]:
    """Say whether a query position is outside all images."""
    return lambda row, head, query, key: blocks[row, query] < 0
