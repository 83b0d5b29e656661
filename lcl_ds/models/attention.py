"""What a token of a packed row may attend to, as keyword arguments of a transformers decoder.

The masks are made here, from the documents of the rows, and handed over ready: families differ in what they derive
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

from lcl_ds.errors import UserError

Mode = Literal["causal", "images", "bidirectional"]
"""Within a document: only what came before; that and the rest of one's own image; everything."""

FLASH = ("flash_attention_3", "flash_attention_2")
LAYER_TYPES = {"full_attention", "sliding_attention"}
"""Kinds of layers whose masks are known here; state-space, chunked and other kinds would mix packed documents."""


def attention_arguments(
    decoder: PreTrainedModel,
    inputs_embeds: Tensor,
    position_ids: Tensor,
    *,
    implementation: str = "auto",
    mode: Mode = "causal",
    image_blocks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> dict[str, Any]:
    """Arguments that keep the documents of each row apart, ``position_ids`` among them.

    The decoder is switched to the implementation in use, which costs nothing when it is so already.

    Args:
        inputs_embeds: [R, L, H]; its device and dtype decide what ``auto`` means.
        position_ids: int64 [R, L], 0 where a document or the padding begins.
        implementation: an attention implementation of transformers, or ``auto``.
        image_blocks: int64 [R, L], number of the image that a token belongs to, -1 for none; for mode ``images``.
        cu_seqlens: int32 [D + 1], where documents begin in the rows laid end to end, and their end; for flash.
        max_seqlen: tokens of the longest document; for flash.

    Raises:
        UserError: the implementation cannot do what is asked; says which can.
    """
    if implementation == "auto":
        varlen = cu_seqlens is not None
        implementation = choose_implementation(decoder, inputs_embeds.device.type, inputs_embeds.dtype, mode, varlen)
    elif implementation in FLASH:
        _check_flash(implementation, inputs_embeds, mode)
    if decoder.config._attn_implementation != implementation:
        decoder.set_attn_implementation(implementation)
    if implementation in FLASH:
        lengths = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
        longest = {"max_length_q": max_seqlen, "max_length_k": max_seqlen}
        masks = _per_layer_type(decoder.config, lambda window: None)
        causal = {"is_causal": mode != "bidirectional"}
        return {"attention_mask": masks, "position_ids": position_ids, **lengths, **longest, **causal}
    documents = (position_ids == 0).cumsum(-1)

    def mask(window: int | None) -> Any:
        rows, length = position_ids.shape
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=rows,
            q_length=length,
            kv_length=length,
            mask_function=_visible(mode, window, documents, image_blocks),
            allow_is_causal_skip=False,
            dtype=inputs_embeds.dtype,
            device=inputs_embeds.device,
            config=decoder.config,
        )

    return {"attention_mask": _per_layer_type(decoder.config, mask), "position_ids": position_ids}


def image_blocks(position_ids: Tensor, image_positions: Tensor, tokens: int) -> Tensor:
    """int64 [R, L]: the number of the image that a token belongs to, -1 for none.

    Args:
        image_positions: int64 [M], flat position of each image's first token; one beyond the rows stands nowhere.
        tokens: tokens of an image.
    """
    blocks = position_ids.new_full((position_ids.numel() + tokens,), -1)
    slots = image_positions[:, None] + torch.arange(tokens, device=position_ids.device)
    numbers = torch.arange(len(image_positions), device=position_ids.device)[:, None].expand_as(slots)
    blocks = blocks.index_copy(0, slots.flatten(), numbers.flatten())
    return blocks[: position_ids.numel()].view_as(position_ids)


def choose_implementation(
    decoder: PreTrainedModel, device_type: str, dtype: torch.dtype, mode: Mode, varlen: bool
) -> str:
    """What ``auto`` means: on a GPU variable-length flash, else flex; sdpa elsewhere; eager where nothing else works.

    Args:
        varlen: the lengths of the documents are known.
    """
    if device_type == "cuda":
        if varlen and mode != "images" and dtype in (torch.bfloat16, torch.float16):
            for flash in FLASH:
                if why_not(decoder, flash) is None:
                    return flash
        if why_not(decoder, "flex_attention") is None:
            return "flex_attention"
    return "sdpa" if why_not(decoder, "sdpa") is None else "eager"


def why_not(decoder: PreTrainedModel, implementation: str) -> str | None:
    """Why this decoder cannot use the implementation on this machine; None when it can."""
    config, family = decoder.config, decoder.config.model_type
    match implementation:
        case "flash_attention_2" | "flash_attention_3":
            if not decoder._supports_flash_attn:
                return f"{family} does not support flash attention"
            two = implementation == "flash_attention_2"
            # Where the package is missing transformers would fetch a kernel from the Hub instead.
            if not (is_flash_attn_2_available() if two else is_flash_attn_3_available()):
                return "its package is not installed, or there is no GPU for it"
        case "flex_attention":
            if not decoder._supports_flex_attn:
                return f"{family} does not support it"
            if getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0):
                return "it has no attention dropout"
        case "sdpa":
            if not decoder._supports_sdpa or getattr(config, "attn_logit_softcapping", None):
                return f"{family} caps its attention logits, which it cannot do"
    return None


def check_attention(decoder: PreTrainedModel, implementation: str) -> None:
    """Refuse what will not work before anything is trained.

    Raises:
        ValueError: the implementation does not fit the family or the machine, or the family has layers that would mix
            packed documents.
    """
    config = decoder.config
    kinds = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if kinds or getattr(config, "attention_chunk_size", None):
        raise ValueError(
            f"decoder {config.model_type}: packed documents would see each other in layers of type "
            f"{', '.join(sorted(kinds)) or 'chunked_attention'}; use llama, gpt2 or qwen3"
        )
    if implementation != "auto" and (reason := why_not(decoder, implementation)):
        fits = [name for name in ("sdpa", "eager") if why_not(decoder, name) is None]
        raise ValueError(f"decoder.attention: {implementation}: {reason}; use auto or {' or '.join(fits)}")


def _check_flash(implementation: str, inputs_embeds: Tensor, mode: Mode) -> None:
    if mode == "images":
        raise UserError(
            f"model.decoder.attention: {implementation} cannot see images both ways; use auto, flex_attention or sdpa"
        )
    if inputs_embeds.dtype not in (torch.bfloat16, torch.float16):
        raise UserError(f"model.decoder.attention: {implementation} needs precision: bf16; use it, or auto")


def _per_layer_type(config: Any, mask: Callable[[int | None], Any]) -> Any:
    """One mask for all layers, or one for each kind of layer in a decoder that has several.

    Args:
        mask: from the width of the sliding window, None for full attention, to the mask.
    """
    window = getattr(config, "sliding_window", None)
    if kinds := getattr(config, "layer_types", None):
        return {kind: mask(window if kind == "sliding_attention" else None) for kind in sorted(set(kinds))}
    return mask(window)


def _visible(mode: Mode, window: int | None, documents: Tensor, blocks: Tensor | None) -> Callable[..., Tensor]:
    """Whether a query position sees a key position; windows of both directions hold ``2 * window - 1`` tokens."""
    if mode == "bidirectional":
        near = bidirectional_mask_function if window is None else sliding_window_bidirectional_overlay(window - 1)
    else:
        near = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    visible = and_masks(packed_sequence_mask_function(documents), near)
    if mode != "images":
        return visible
    assert blocks is not None
    return or_masks(visible, blockwise_overlay(blocks))
